"""The decoder as a function of its parameters, over rows of text and over packed conversations about pictures.

Only what differs from ``packed`` is here: logits at every position instead of scored ones, plain causal rows, and rows
some of whose tokens see only a part of the picture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlavaConfig

from avl_analysis.scenes.packed import (
    DECODER,
    HEAD,
    Weights,
    _prefix_attention,
    _rows_attention,
    rms_norm,
    rotate,
)
from avl_analysis.scenes.training.large.conversations import Batch
from avl_analysis.scenes.training.large.language import OPENING, PREFIX

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def angles(text: LlamaConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (..., 1, 16) of rotary angles at integer positions (...)."""
    theta = text.rope_parameters["rope_theta"]
    speed = theta ** -(torch.arange(0, HEAD, 2, dtype=torch.float32) / HEAD)
    angle = positions[..., None, None].float() * speed
    return angle.cos().to(dtype), angle.sin().to(dtype)


def layers(
    weights: Weights, text: LlamaConfig, x: Tensor, positions: Tensor, attend: Attend
) -> Tensor:
    """Hidden states (B, S, width) after the last layer's norm; ``attend`` mixes (B, S, heads, 32) values."""
    w, (b, length, _) = weights, x.shape
    cos, sin = angles(text, positions, x.dtype)
    scale = HEAD**-0.5
    for layer in range(text.num_hidden_layers):
        at = f"{DECODER}layers.{layer}."
        h = rms_norm(x, w[at + "input_layernorm.weight"], text.rms_norm_eps)
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


def _causal(length: int, dtype: torch.dtype) -> Tensor:
    return torch.full((length, length), -1e4, dtype=dtype).triu(1)


def text_logits(weights: Weights, text: LlamaConfig, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits (B, S, vocabulary) of plain rows of text (B, S)."""
    table = weights[DECODER + "embed_tokens.weight"]
    mask = _causal(ids.shape[1], table.dtype)
    hidden = layers(
        weights,
        text,
        F.embedding(ids, table),
        positions,
        lambda q, k, v: _prefix_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask),
    )
    return F.linear(hidden, table)


def packed_logits(
    weights: Weights,
    config: LlavaConfig,
    image: Tensor,
    batch: Batch,
    dropped: Tensor | None = None,
) -> Tensor:
    """Logits (B, R, L, vocabulary) of packed rows after projected image tokens (B, I, width).

    ``dropped`` (B, I) bool hides image tokens from the rows' answering tokens (from the assistant's mark on).
    """
    table = weights[DECODER + "embed_tokens.weight"]
    b, r, length = batch.ids.shape
    dtype = table.dtype
    x = torch.cat(
        [
            F.embedding(torch.tensor(OPENING), table).expand(b, -1, -1),
            image,
            F.embedding(batch.ids.view(b, -1), table),
        ],
        1,
    )
    positions = torch.cat(
        [torch.arange(PREFIX).expand(b, -1), PREFIX + batch.offsets.view(b, -1)], 1
    )
    causal = _causal(PREFIX, dtype)
    same = batch.branch[..., :, None] == batch.branch[..., None, :]
    allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
    inside = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -1e4)[:, None, :, None]
    outer = None
    if dropped is not None:
        hidden = (
            F.pad(dropped, (len(OPENING), 0))[:, None, None] & batch.answering[..., None]
        )  # (B, R, L, P)
        outer = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -1e4)[:, None, :, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kp, vp = (t[:, :PREFIX].transpose(1, 2).contiguous() for t in (k, v))
        qr, kr, vr = (t[:, PREFIX:].view(b, r, length, -1, HEAD) for t in (q, k, v))
        rows = _rows_attention(qr, kr, vr, kp, vp, inside, outer).view(b, r * length, -1)
        return torch.cat([_prefix_attention(q[:, :PREFIX], kp, vp, causal), rows], 1)

    hidden = layers(weights, config.text_config, x, positions, attend)[:, PREFIX:]
    return F.linear(hidden, table).view(b, r, length, -1)
