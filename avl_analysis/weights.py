"""Softmax weights beside the model's own kernel, a block of rows and a few heads at a time.

Always in float32, whatever the model's precision: a product of two bfloat16 matrices is rounded to 8 bits, too few
for a softmax to start from. Blocks take few heads and many rows, not the other way round: one head's keys then stay
in the core's cache, and keys in half precision are converted once per head. Keys that no row of a block may see are
not computed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from avl_analysis.view import View

BLOCK_BYTES = 2 << 20
"""Size of one block of weights on a CPU, about what stays in a core's own cache."""
DEVICE_BLOCK_BYTES = 128 << 20
"""Size of one block elsewhere, where starting a kernel costs more than moving data."""

Block = tuple[slice, slice, Tensor]
"""Rows; keys outside of which the weights of these rows are 0; the weights, (heads, rows, keys) float32."""


def weight_blocks(view: View) -> Iterator[tuple[slice, Iterator[Block]]]:
    """A few query heads after another: which, and their blocks of rows. A block is overwritten by the next."""
    if view.weights is not None:
        heads, rows, keys = view.weights.shape
        yield slice(0, heads), iter([(slice(0, rows), slice(0, keys), view.weights)])
        return
    (_, rows, dim), (key_heads, keys, _), groups = view.query.shape, view.key.shape, view.groups
    elements = (BLOCK_BYTES if view.query.device.type == "cpu" else DEVICE_BLOCK_BYTES) // 4
    size = max(1, min(rows, elements // (groups * keys)))
    together = elements // (groups * size * keys)
    if view.key.dtype != torch.float32:  # the converted keys of the heads shall fit as well
        together = min(together, elements // (keys * dim))
    together = max(1, min(key_heads, together))
    buffer = torch.empty(together * groups * size * keys, device=view.query.device)
    for first in range(0, key_heads, together):
        some = slice(first, min(first + together, key_heads))
        yield slice(some.start * groups, some.stop * groups), _row_blocks(view, some, size, buffer)


def _row_blocks(view: View, key_heads: slice, size: int, buffer: Tensor) -> Iterator[Block]:
    count, groups, rows = key_heads.stop - key_heads.start, view.groups, view.query.shape[1]
    heads = slice(key_heads.start * groups, key_heads.stop * groups)
    key = view.key[key_heads].float()
    query = view.query[heads].float().mul(view.scaling)
    for start in range(0, rows, size):
        at = slice(start, min(start + size, rows))
        span = view.sight.span(at)
        shape = (count * groups, at.stop - at.start, span.stop - span.start)
        weights = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
        _products(query[:, at].reshape(count, -1, query.shape[2]), key[:, span], weights)
        _softmax(weights, view, heads, at, span)
        yield at, span, weights


def _products(query: Tensor, key: Tensor, out: Tensor) -> None:
    """query (n, rows, dim) x key (n, keys, dim) transposed, into out."""
    if query.shape[1] == 1:  # a matrix times a vector is much faster this way round
        torch.bmm(key, query.transpose(1, 2), out=out.view(*key.shape[:2], 1))
    else:
        torch.bmm(query, key.transpose(1, 2), out=out.view(*query.shape[:2], key.shape[1]))


def _softmax(logits: Tensor, view: View, heads: slice, rows: slice, span: slice) -> None:
    """Turn scaled products into weights, in place."""
    if view.softcap is not None:
        logits.div_(view.softcap).tanh_().mul_(view.softcap)
    if view.bias is not None:
        logits += view.bias[heads if len(view.bias) > 1 else slice(None), rows, span]
    view.sight.hide(logits, heads, rows, span)
    share = None
    if view.sinks is not None:
        sinks = view.sinks[heads, rows] if view.sinks.shape[1] > 1 else view.sinks[heads]
        share = torch.sigmoid(logits.logsumexp(-1) - sinks)[..., None]
    torch.softmax(logits, -1, out=logits)
    if share is not None:
        logits *= share
    view.sight.clear_blind(logits, heads, rows)


def row_weights(view: View) -> Tensor:
    """Weights of all rows at once, (query heads, rows, keys) float32; for a decode step, or a short prompt."""
    whole = torch.zeros(view.query.shape[0], view.query.shape[1], view.key.shape[1], device=view.query.device)
    for heads, blocks in weight_blocks(view):
        for rows, span, weights in blocks:
            whole[heads, rows, span] = weights
    return whole
