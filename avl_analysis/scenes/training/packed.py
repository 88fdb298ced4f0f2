"""The model's forward pass over packed batches, as a function of its own parameters.

The same computation as the transformers module (``tests/scenes`` holds them together), arranged for
training on few CPU cores: bfloat16 copies of the parameters, plain matrix products and a bfloat16
softmax, the picture's prefix computed once for all branches. Rows of branches meet the prefix keys
in one product without a mask and each other only inside their row, so no mask as long as the whole
sequence ever exists. The last decoder layer is computed only where an answer token is scored.

Note: softmax weights are computed and dropped on the spot; no loss here or anywhere else
looks at them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaConfig

from avl_analysis.scenes.language import IMAGE_TOKENS
from avl_analysis.scenes.training.batches import PREFIX, Batch, prefix_ids

HEAD = 32
VISION = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."
DECODER = "model.language_model."
Weights = Mapping[str, Tensor]


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last axis.

    torch's own backward is many times slower in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # The mean is summed in float32; in bfloat16, with 8 bits of precision, it would be coarse.
        inverse = ((x * x).mean(-1, keepdim=True, dtype=torch.float32) + eps).rsqrt().to(x.dtype)
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, inverse, weight = ctx.saved_tensors
        scaled = grad * weight
        # The gradient's part along x, which normalisation takes out: d unit / dx = (1 - unit unit^T
        # / n) / rms.
        shared = (scaled * unit).mean(-1, keepdim=True, dtype=torch.float32).to(grad.dtype)
        product = (grad * unit).reshape(-1, grad.shape[-1])
        return (
            (scaled - unit * shared) * inverse,
            product.sum(0, dtype=torch.float32).to(weight.dtype),
            None,
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square normalisation over the last axis, with a fast backward."""
    return _RMSNorm.apply(x, weight, eps)


class _Rotate(torch.autograd.Function):
    """Rotary positions on (..., heads, 32) in the two-halves convention.

    The backward turns the other way.
    """

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty_like(x)
        a, b = x[..., : HEAD // 2], x[..., HEAD // 2 :]
        torch.sub(a * cos, b * sin, out=out[..., : HEAD // 2])
        torch.add(b * cos, a * sin, out=out[..., HEAD // 2 :])
        return out

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _Rotate.turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.turn(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions applied to queries or keys, with a fast backward."""
    return _Rotate.apply(x, cos, sin)


def vision(weights: Weights, config: LlavaConfig, pixels: Tensor) -> Tensor:
    """Patch features of pictures (B, 3, 96, 96): (B, patches, width), the projector's input."""
    w, tower, heads = weights, config.vision_config, config.vision_config.num_attention_heads
    width, count, dtype = (
        tower.hidden_size,
        len(pixels),
        w[VISION + "embeddings.class_embedding"].dtype,
    )
    patch, grid = tower.patch_size, tower.image_size // tower.patch_size
    # (B, rows, columns, channels, y, x). Patches do not overlap, so the convolution that embeds
    # them is one matrix product, with the axes in the order of its weight.
    tiles = pixels.to(dtype).view(count, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    x = (
        tiles.reshape(count, grid * grid, -1)
        @ w[VISION + "embeddings.patch_embedding.weight"].view(width, -1).T
    )
    # The class token comes first, as the position embeddings expect, and is left out at the end.
    first = w[VISION + "embeddings.class_embedding"].expand(count, 1, width)
    x = torch.cat([first, x], 1) + w[VISION + "embeddings.position_embedding.weight"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, (width,), w[name + ".weight"], w[name + ".bias"], tower.layer_norm_eps
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    # Spelt so in transformers.
    x = norm(x, VISION + "pre_layrnorm")
    for layer in range(tower.num_hidden_layers):
        at = f"{VISION}encoder.layers.{layer}."
        h = norm(x, at + "layer_norm1")
        q, k, v = (
            linear(h, f"{at}self_attn.{p}_proj").view(count, -1, heads, HEAD).transpose(1, 2)
            for p in "qkv"
        )
        # (B, heads, 1 + patches, 32); every patch sees every other.
        mixed = ((q * HEAD**-0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).reshape(x.shape), at + "self_attn.out_proj")
        h = F.gelu(linear(norm(x, at + "layer_norm2"), at + "mlp.fc1"))
        x = x + linear(h, at + "mlp.fc2")
    return x[:, 1:]


def project(weights: Weights, features: Tensor) -> Tensor:
    """Image tokens as the decoder takes them: (B, patches, width)."""
    w = weights
    h = F.gelu(F.linear(features, w[PROJECTOR + "linear_1.weight"], w[PROJECTOR + "linear_1.bias"]))
    return F.linear(h, w[PROJECTOR + "linear_2.weight"], w[PROJECTOR + "linear_2.bias"])


def angles(config: LlavaConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (..., 1, 16) of rotary angles at integer positions (...)."""
    theta = config.text_config.rope_parameters["rope_theta"]
    pairs = torch.arange(0, HEAD, 2, dtype=torch.float32, device=positions.device)
    # Computed in float32: bfloat16 cannot tell large positions apart.
    speed = theta ** -(pairs / HEAD)
    angle = positions[..., None, None].float() * speed
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rows_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kp: Tensor,
    vp: Tensor,
    mask: Tensor,
    prefix_mask: Tensor | None = None,
) -> Tensor:
    """Rows attend to the prefix and to themselves.

    Args:
        q: queries of the rows (B, R, L, heads, 32), already scaled.
        k: keys of the rows (B, R, L, groups, 32).
        v: values of the rows (B, R, L, groups, 32).
        kp: keys of the prefix (B, groups, P, 32).
        vp: values of the prefix (B, groups, P, 32).
        mask: added to the scores inside the rows (B, 1, R, 1, L, L).
        prefix_mask: added to the scores on the prefix (B, 1, R, 1, L, P); None hides nothing of it.

    Returns:
        (B, R, L, heads * 32).
    """
    b, r, length, heads, _ = q.shape
    groups, prefix = kp.shape[1], kp.shape[2]
    per = heads // groups
    q = (
        q.view(b, r, length, groups, per, HEAD).permute(0, 3, 1, 4, 2, 5).contiguous()
    )  # B, groups, R, per, L, 32
    k, v = (t.permute(0, 3, 1, 2, 4).reshape(b * groups * r, length, HEAD) for t in (k, v))
    # On the prefix, (B, groups, R, per, L, P). All rows and query heads of a group share its keys,
    # so they are one long axis of a single product.
    outer = (q.view(b, groups, -1, HEAD) @ kp.transpose(-1, -2)).view(
        b, groups, r, per, length, prefix
    )
    outer = outer if prefix_mask is None else outer + prefix_mask
    # Inside the rows, (B, groups, R, per, L, L): every row has its own keys.
    inner = torch.bmm(q.view(b * groups * r, per * length, HEAD), k.transpose(1, 2))
    inner = inner.view(b, groups, r, per, length, length) + mask
    # One softmax over both, as in a sequence that has the prefix in front of the row.
    weight = torch.cat([outer, inner], -1).softmax(-1)
    out = (weight[..., :prefix].reshape(b, groups, -1, prefix) @ vp).view(q.shape)
    inside = torch.bmm(weight[..., prefix:].reshape(b * groups * r, per * length, length), v)
    return (
        (out + inside.view(q.shape)).permute(0, 2, 4, 1, 3, 5).reshape(b, r, length, heads * HEAD)
    )


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The prefix attends causally to itself.

    Q (B, P, heads, 32), k and v (B, groups, P, 32) -> (B, P, heads * 32).
    """
    b, prefix, heads, _ = q.shape
    groups = k.shape[1]
    q = (
        q.view(b, prefix, groups, heads // groups, HEAD)
        .permute(0, 2, 3, 1, 4)
        .reshape(b, groups, -1, HEAD)
    )
    # (B, groups, query heads of a group, P, P)
    scores = (q @ k.transpose(-1, -2)).view(b, groups, -1, prefix, prefix) + mask
    out = (scores.softmax(-1).view(b, groups, -1, prefix) @ v).view(b, groups, -1, prefix, HEAD)
    return out.permute(0, 3, 1, 2, 4).reshape(b, prefix, heads * HEAD)


def _masks(batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Additive masks of packed conversations.

    Causal over the prefix (P, P); within rows, causal and inside one branch (B, 1, R, 1, L, L).
    """
    length = batch.ids.shape[-1]
    same = batch.branch[..., :, None] == batch.branch[..., None, :]
    allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
    # exp(-1e4) is 0 in every dtype.
    rows = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -1e4)
    return torch.full((PREFIX, PREFIX), -1e4, dtype=dtype).triu(1), rows[:, None, :, None]


def decode(weights: Weights, config: LlavaConfig, image: Tensor, batch: Batch) -> Tensor:
    """Logits (N, vocabulary) at the batch's scored positions.

    Given projected image tokens (B, 144, width).
    """
    w, text, dtype = weights, config.text_config, image.dtype
    b, r, length = batch.ids.shape
    table = w[DECODER + "embed_tokens.weight"]
    # The prefix up to the picture, whose own ids are only placeholders.
    before = F.embedding(torch.tensor(prefix_ids()[: PREFIX - IMAGE_TOKENS]), table)
    rows = F.embedding(batch.ids, table).view(b, r * length, -1)
    x = torch.cat([before.expand(b, -1, -1), image, rows], 1)  # (B, P + R * L, width)
    # Every branch counts from the end of the prefix, as if it were alone behind the picture.
    positions = torch.cat(
        [torch.arange(PREFIX).expand(b, -1), PREFIX + batch.offsets.view(b, -1)], 1
    )
    cos, sin = angles(config, positions, dtype)
    causal, inside = _masks(batch, dtype)
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    for layer in range(text.num_hidden_layers):
        at, last = f"{DECODER}layers.{layer}.", layer == text.num_hidden_layers - 1
        # The last layer needs queries of the rows only, but keys and values of everything.
        start = PREFIX if last else 0
        h = rms_norm(x, w[at + "input_layernorm.weight"], text.rms_norm_eps)
        q = F.linear(h[:, start:], w[at + "self_attn.q_proj.weight"]).view(b, -1, heads, HEAD)
        # Rotation is linear, so scaling cos and sin scales the queries without another pass over
        # them.
        q = rotate(q, cos[:, start:] * HEAD**-0.5, sin[:, start:] * HEAD**-0.5)
        k = rotate(
            F.linear(h, w[at + "self_attn.k_proj.weight"]).view(b, -1, groups, HEAD), cos, sin
        )
        v = F.linear(h, w[at + "self_attn.v_proj.weight"]).view(b, -1, groups, HEAD)
        kp, vp = (t[:, :PREFIX].transpose(1, 2).contiguous() for t in (k, v))
        # The parts behind the prefix, (B, R, L, heads or groups, 32); q may have lost the prefix
        # already.
        qr, kr, vr = (
            t[:, PREFIX - begin :].view(b, r, length, -1, HEAD)
            for t, begin in ((q, start), (k, 0), (v, 0))
        )
        mixed = rows_attention(qr, kr, vr, kp, vp, inside).view(b, r * length, -1)
        if last:  # nothing reads the other positions' outputs
            mixed = mixed.reshape(b * r * length, -1)[batch.scored]
            # The residual of the same positions; from here on x is (N, width).
            x = x[:, PREFIX:].reshape(b * r * length, -1)[batch.scored]
        else:
            mixed = torch.cat([prefix_attention(q[:, :PREFIX], kp, vp, causal), mixed], 1)
        x = x + F.linear(mixed, w[at + "self_attn.o_proj.weight"])
        h = rms_norm(x, w[at + "post_attention_layernorm.weight"], text.rms_norm_eps)
        h = F.silu(F.linear(h, w[at + "mlp.gate_proj.weight"])) * F.linear(
            h, w[at + "mlp.up_proj.weight"]
        )
        x = x + F.linear(h, w[at + "mlp.down_proj.weight"])
    # Input and output embedding are tied.
    return F.linear(rms_norm(x, w[DECODER + "norm.weight"], text.rms_norm_eps), table)
