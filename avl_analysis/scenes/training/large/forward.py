"""The decoder as a function of its parameters, over rows of text and over packed conversations.

Only what differs from ``packed`` is here: logits at every position instead of scored ones, plain
causal rows, and rows some of whose tokens see only a part of the picture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaConfig

from avl_analysis.scenes.training.large.conversations import TuningBatch
from avl_analysis.scenes.training.large.language import OPENING, PREFIX
from avl_analysis.scenes.training.packed import (
    DECODER,
    HEAD,
    Weights,
    angles,
    prefix_attention,
    rms_norm,
    rotate,
    rows_attention,
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def layers(
    weights: Weights, config: LlavaConfig, x: Tensor, positions: Tensor, attend: Attend
) -> Tensor:
    """Hidden states (B, S, width) after the last norm.

    Args:
        weights: the model's parameters by name.
        config: the model's configuration.
        x: embedded tokens (B, S, width).
        positions: of the tokens, (B, S) int64.
        attend: attention output (B, S, heads * 32) of scaled and rotated queries (B, S, heads, 32),
            rotated keys and values (B, S, groups, 32).
    """
    w, text, (b, length, _) = weights, config.text_config, x.shape
    cos, sin = angles(config, positions, x.dtype)
    scale = HEAD**-0.5
    for layer in range(text.num_hidden_layers):
        at = f"{DECODER}layers.{layer}."
        h = rms_norm(x, w[at + "input_layernorm.weight"], text.rms_norm_eps)
        # (B, S, heads or groups, 32)
        q, k, v = (
            F.linear(h, w[f"{at}self_attn.{p}_proj.weight"]).view(b, length, -1, HEAD)
            for p in "qkv"
        )
        mixed = attend(rotate(q, cos * scale, sin * scale), rotate(k, cos, sin), v)
        x = x + F.linear(mixed, w[at + "self_attn.o_proj.weight"])
        h = rms_norm(x, w[at + "post_attention_layernorm.weight"], text.rms_norm_eps)
        h = F.silu(F.linear(h, w[at + "mlp.gate_proj.weight"])) * F.linear(
            h, w[at + "mlp.up_proj.weight"]
        )
        x = x + F.linear(h, w[at + "mlp.down_proj.weight"])
    return rms_norm(x, w[DECODER + "norm.weight"], text.rms_norm_eps)


def _causal(length: int, like: Tensor) -> Tensor:
    """Additive causal mask of ``like``'s type and device."""
    return like.new_full((length, length), -1e4).triu(1)


def text_logits(weights: Weights, config: LlavaConfig, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits (B, S, vocabulary) of plain rows of text (B, S)."""
    table = weights[DECODER + "embed_tokens.weight"]
    mask = _causal(ids.shape[1], table)
    # Text alone is a prefix with no rows behind it.
    hidden = layers(
        weights,
        config,
        F.embedding(ids, table),
        positions,
        lambda q, k, v: prefix_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask),
    )
    return F.linear(hidden, table)


def packed_logits(
    weights: Weights,
    config: LlavaConfig,
    image: Tensor,
    batch: TuningBatch,
    dropped: Tensor | None = None,
) -> Tensor:
    """Logits (B, R, L, vocabulary) of packed rows after projected image tokens (B, I, width).

    Args:
        weights: the model's parameters by name.
        config: the model's configuration.
        image: projected image tokens.
        batch: the rows.
        dropped: image tokens (B, I) bool to hide from the tokens that answer, the last prompt token
            among them. The tokens of the question still see the whole picture.
    """
    table = weights[DECODER + "embed_tokens.weight"]
    b, r, length = batch.ids.shape
    x = torch.cat(
        [
            F.embedding(torch.tensor(OPENING, device=table.device), table).expand(b, -1, -1),
            image,
            F.embedding(batch.ids.view(b, -1), table),
        ],
        1,
    )
    positions = torch.cat(
        [
            torch.arange(PREFIX, device=table.device).expand(b, -1),
            PREFIX + batch.offsets.view(b, -1),
        ],
        1,
    )
    causal = _causal(PREFIX, table)
    same = batch.branch[..., :, None] == batch.branch[..., None, :]
    allowed = same & torch.ones_like(same).tril()
    inside = table.new_zeros(allowed.shape).masked_fill_(~allowed, -1e4)[:, None, :, None]
    # (B, 1, R, 1, L, P) where image tokens are hidden; the system text in front of them never is.
    outer = None
    if dropped is not None:
        hidden = (
            F.pad(dropped, (len(OPENING), 0))[:, None, None] & batch.answering[..., None]
        )  # (B, R, L, P)
        outer = table.new_zeros(hidden.shape).masked_fill_(hidden, -1e4)[:, None, :, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kp, vp = (t[:, :PREFIX].transpose(1, 2).contiguous() for t in (k, v))
        qr, kr, vr = (t[:, PREFIX:].view(b, r, length, -1, HEAD) for t in (q, k, v))
        rows = rows_attention(qr, kr, vr, kp, vp, inside, outer).view(b, r * length, -1)
        return torch.cat([prefix_attention(q[:, :PREFIX], kp, vp, causal), rows], 1)

    hidden = layers(weights, config, x, positions, attend)[:, PREFIX:]
    return F.linear(hidden, table).view(b, r, length, -1)
