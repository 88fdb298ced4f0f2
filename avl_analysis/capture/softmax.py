"""Softmax weights beside the model's own kernel, a block of rows and a few heads at a time.

Always in float32, whatever the model's precision: a product of two bfloat16 matrices is rounded to
8 bits, too few for a softmax to start from. Blocks take few heads and many rows, not the other way
round: one head's keys then stay in the core's cache, and keys in half precision are converted once
per head. Keys that no row of a block may see are not computed, which is why blocks are not taller
still.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from avl_analysis.capture.sample_call import SampleCall

BLOCK_BYTES = (3 << 20, 8 << 20)
"""Least and most bytes of one block of weights on a CPU, with the keys converted for it: larger
ones leave the caches, in smaller ones starting an operation costs more than doing it. In between it
is a fiftieth of the layer's maps, so that short prompts take little memory beside a model, too.
"""
DEVICE_BLOCK_BYTES = (16 << 20, 128 << 20)
"""The same elsewhere, where starting a kernel costs more than moving data."""
BLOCK_ROWS = 128
"""Most rows of a block: it computes every key that its last row sees, and the more rows, the more
of that is hidden from the others.
"""

ROW_BYTES = 6 << 20
"""Bytes of keys converted to float32 at a time for the one row of a decode step."""

Block = tuple[slice, slice, slice, Tensor]
"""Query heads; rows; keys outside of which the weights of these rows are 0; the weights, (heads,
rows, keys) float32. A block is valid until the next one is asked for, and may be overwritten.
"""


def share_of_maps(view: SampleCall, least: int, most: int) -> int:
    """A fiftieth of the bytes of the layer's maps in float32, within bounds."""
    maps = view.query.shape[0] * view.query.shape[1] * view.key.shape[1] * 4
    return max(least, min(most, maps // 50))


def weight_blocks(view: SampleCall, kv_heads: slice) -> Iterator[Block]:
    """The weights of the query heads that read these key heads, head after head and
    row after row."""
    groups, rows, keys = view.groups, view.query.shape[1], view.key.shape[1]
    if view.weights is not None:
        heads = slice(kv_heads.start * groups, kv_heads.stop * groups)
        yield heads, slice(0, rows), slice(0, keys), view.weights[heads].clone()
        return
    limits = BLOCK_BYTES if view.query.device.type == "cpu" else DEVICE_BLOCK_BYTES
    elements = share_of_maps(view, *limits) // 4
    size = max(1, min(rows, BLOCK_ROWS, elements // (groups * keys)))
    converts = (
        view.key.dtype != torch.float32
    )  # the converted keys of these heads shall fit as well
    count, each = (
        kv_heads.stop - kv_heads.start,
        keys * (groups * size + converts * view.key.shape[2]),
    )
    together = -(-count // -(-count // max(1, elements // each)))  # parts of about one size
    buffer = torch.empty(together * groups * size * keys, device=view.query.device)
    converted = None
    if converts:  # one buffer for all: fresh memory costs more than the conversion
        converted = torch.empty(together, keys, view.key.shape[2], device=view.query.device)
    for first in range(kv_heads.start, kv_heads.stop, together):
        some = slice(first, min(first + together, kv_heads.stop))
        key = (
            view.key[some]
            if converted is None
            else converted[: some.stop - first].copy_(view.key[some])
        )
        yield from _row_blocks(view, some, key, size, buffer)


def _row_blocks(
    view: SampleCall, kv_heads: slice, key: Tensor, size: int, buffer: Tensor
) -> Iterator[Block]:
    count, groups, rows = kv_heads.stop - kv_heads.start, view.groups, view.query.shape[1]
    heads = slice(kv_heads.start * groups, kv_heads.stop * groups)
    for start in range(0, rows, size):
        at = slice(start, min(start + size, rows))
        span = view.sight.span(at)
        shape = (count * groups, at.stop - at.start, span.stop - span.start)
        weights = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
        query = view.query[heads, at].float() * view.scaling
        _products(query.reshape(count, -1, query.shape[2]), key[:, span], weights)
        _softmax(weights, view, heads, at, span)
        yield heads, at, span, weights


def _products(query: Tensor, key: Tensor, out: Tensor) -> None:
    """query (n, rows, dim) x key (n, keys, dim) transposed, into out."""
    if query.shape[1] == 1:  # a matrix times a vector is much faster this way round
        torch.bmm(key, query.transpose(1, 2), out=out.view(*key.shape[:2], 1))
    else:
        torch.bmm(query, key.transpose(1, 2), out=out.view(*query.shape[:2], key.shape[1]))


def _softmax(logits: Tensor, view: SampleCall, heads: slice, rows: slice, span: slice) -> None:
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


def row_weights(view: SampleCall) -> Tensor:
    """Weights of all rows at once, (query heads, rows, keys) float32; for decode steps."""
    if view.weights is not None:
        return view.weights.clone()
    kv_heads, keys, dim = view.key.shape
    query = view.query.float().mul(view.scaling).view(kv_heads, -1, dim)
    logits = torch.empty(*query.shape[:2], keys, device=query.device)
    if view.key.dtype == torch.float32:
        _products(query, view.key, logits)
    else:  # one buffer for all: fresh memory costs more than the conversion
        limits = ROW_BYTES if query.device.type == "cpu" else DEVICE_BLOCK_BYTES[1]
        together = max(1, min(kv_heads, limits // (keys * dim * 4)))
        buffer = torch.empty(together, keys, dim, device=query.device)
        for first in range(0, kv_heads, together):
            some = slice(first, min(first + together, kv_heads))
            _products(query[some], buffer[: some.stop - first].copy_(view.key[some]), logits[some])
    logits = logits.view(view.query.shape[0], view.query.shape[1], keys)
    _softmax(logits, view, slice(0, len(logits)), slice(0, logits.shape[1]), slice(0, keys))
    return logits
