"""Products and softmax weights beside the model's own kernel.

A block of rows and a few heads at a time.

Always in float32, whatever the model's precision: a product of two bfloat16 matrices is rounded to
8 bits, too few for a softmax to start from. Blocks take few heads and many rows, not the other way
round: one head's keys then stay in the core's cache, and keys in half precision are converted once
per head. Keys that no row of a block may see are not computed, which is why blocks are not taller
still.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from avl.attention import soft_cap
from avl.kernels.backend import COMPILED, backend_for
from avl.kernels.row_products import row_products
from avl_analysis.capture.sample_call import SampleCall

BLOCK_BYTES = (3 << 20, 8 << 20)
"""Least and most bytes of one block of products of the plain kernel on a processor, with the keys
converted for it: larger ones leave the caches, in smaller ones starting an operation costs more
than doing it. In between it is a fiftieth of the layer's maps, so that short prompts take little
memory beside a model, too.
"""
COMPILED_BLOCK_BYTES = 3 << 20
"""Most bytes of a block of the compiled kernel; about what a core's own cache holds."""
COMPILED_BLOCK_ROWS = 256
"""Most rows of such a block: oneDNN converts the keys anew for every product, so that taller ones
pay.
"""
DEVICE_BLOCK_BYTES = (16 << 20, 128 << 20)
"""The same elsewhere, where starting a kernel costs more than moving data."""
BLOCK_ROWS = 128
"""Most rows of a block: it computes every key that its last row sees, and the more rows, the more
of that is hidden from the others.
"""
LEAST_ROWS = 16
"""Rows below which a matrix product is slow, however long they are."""


@dataclass(frozen=True)
class ProductBlock:
    """Products of some rows with the keys they may see; valid until the next one is asked for.

    Attributes:
        heads: query heads.
        rows: rows.
        span: keys outside of which these rows see nothing.
        products: (heads, rows, keys of the span) float32, which may be overwritten; -inf where a
            key is hidden, except behind `ends`.
        ends: (rows,) int64, how many leading keys of the span each row may see at most.
        scaling: factor on the products that is still to be applied.
    """

    heads: slice
    rows: slice
    span: slice
    products: Tensor
    ends: Tensor
    scaling: float


def share_of_maps(view: SampleCall, least: int, most: int) -> int:
    """A fiftieth of the bytes of the layer's maps in float32, within bounds.

    Args:
        view: of one row of the batch; its maps are (query heads, rows, keys).
        least: fewest bytes that are returned.
        most: most bytes that are returned.
    """
    maps = view.query.shape[0] * view.query.shape[1] * view.key.shape[1] * 4
    return max(least, min(most, maps // 50))


def product_blocks(view: SampleCall, kv_heads: slice) -> Iterator[ProductBlock]:
    """Products of the query heads that read these key heads, head after head and row after row."""
    keys, dim = view.key.shape[1:]
    # One buffer for all products; every block overwrites the last one's.
    together, size = _block_size(view, kv_heads)
    new, converts = view.query.new_empty, view.key.dtype != torch.float32
    buffer = new(together * view.groups * size * keys, dtype=torch.float32)
    # One buffer for all keys and one for all queries: fresh memory costs more than the conversion.
    # Keys are converted once for all rows of their heads, queries a block of rows at a time, which
    # is once, too.
    some_keys = new(together, keys, dim, dtype=torch.float32) if converts else None
    some_queries = new(together * view.groups, size, dim, dtype=torch.float32) if converts else None
    for first in range(kv_heads.start, kv_heads.stop, together):
        # Key heads `some`, and the query heads that read them.
        some = slice(first, min(first + together, kv_heads.stop))
        heads = slice(some.start * view.groups, some.stop * view.groups)
        key = view.key[some]
        if some_keys is not None:
            key = some_keys[: len(key)].copy_(key)
        yield from _row_blocks(view, heads, key, size, buffer, some_queries)


def _block_size(view: SampleCall, kv_heads: slice) -> tuple[int, int]:
    """Key heads and rows of a block."""
    groups, rows, (_, keys, dim) = view.groups, view.query.shape[1], view.key.shape
    if backend_for(view.query.device) == COMPILED:
        # Rows whose products with all keys fit, for the query heads of one key head; not fewer than
        # make a matrix product worth while.
        fitting = COMPILED_BLOCK_BYTES // (4 * groups * keys)
        return 1, max(1, min(rows, COMPILED_BLOCK_ROWS, max(fitting, LEAST_ROWS)))
    limits = BLOCK_BYTES if view.query.device.type == "cpu" else DEVICE_BLOCK_BYTES
    # Numbers in float32 that a block may hold, products and converted keys together.
    elements = share_of_maps(view, *limits) // 4
    size = max(1, min(rows, BLOCK_ROWS, elements // (groups * keys)))
    converted = dim if view.key.dtype != torch.float32 else 0  # these keys shall fit as well
    count = kv_heads.stop - kv_heads.start
    together = max(1, elements // (keys * (groups * size + converted)))
    return -(-count // -(-count // together)), size  # parts of about one size


def _row_blocks(
    view: SampleCall,
    heads: slice,
    key: Tensor,
    size: int,
    buffer: Tensor,
    queries: Tensor | None,
) -> Iterator[ProductBlock]:
    """Blocks of some query heads.

    Args:
        view: the layer.
        heads: query heads.
        key: (key heads, keys, dim) float32, what they read.
        size: most rows of a block.
        buffer: float32 numbers, room for the products of a block.
        queries: (query heads or more, size, dim) float32, room for queries that are to be
            converted; None where they are float32.
    """
    (rows, dim), count = view.query.shape[1:], len(key)
    # Whatever is added to products, or bends them, needs them scaled; else the kernel does it.
    scaled = not view.visible_keys.causal or any(
        part is not None for part in (view.softcap, view.bias, view.sinks)
    )
    for start in range(0, rows, size):
        at = slice(start, min(start + size, rows))
        # Keys outside of the span are seen by no row of the block and not computed: under a causal
        # mask that halves the work.
        span = view.visible_keys.span(at)
        query = view.query[heads, at]
        if queries is not None:
            query = queries[: len(query), : query.shape[1]].copy_(query)
        shape = (len(query), query.shape[1], span.stop - span.start)
        products = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
        # (key heads, group x rows, dim) with (key heads, span, dim): the query heads of a key head
        # are further rows of its product.
        _products(query.reshape(count, -1, dim), key[:, span], products)
        if scaled:
            _bend(products.mul_(view.scaling), view, heads, at, span)
            if not view.visible_keys.causal:
                view.visible_keys.hide(products, heads, at, span)
        # Where the mask is causal the kernel hides what lies behind each row's end by itself.
        ends = view.visible_keys.ends(at)
        yield ProductBlock(heads, at, span, products, ends, 1.0 if scaled else view.scaling)


def _products(query: Tensor, key: Tensor, out: Tensor) -> None:
    """query (n, rows, dim) x key (n, keys, dim) transposed, into out."""
    if query.shape[1] == 1:  # a matrix times a vector is much faster this way round
        torch.bmm(key, query.transpose(1, 2), out=out.view(*key.shape[:2], 1))
    elif len(query) == 1:  # oneDNN takes half the time for one product that is no batch
        torch.mm(query[0], key[0].T, out=out.view(query.shape[1], key.shape[1]))
    else:
        torch.bmm(query, key.transpose(1, 2), out=out.view(*query.shape[:2], key.shape[1]))


def _bend(logits: Tensor, view: SampleCall, heads: slice, rows: slice, span: slice) -> None:
    """Cap scaled products and add what the model adds to them, in place."""
    soft_cap(logits, view.softcap)
    if view.bias is not None:
        logits += view.bias[heads if len(view.bias) > 1 else slice(None), rows, span]


def _softmax(logits: Tensor, view: SampleCall) -> None:
    """Turn scaled products of all heads, rows and keys into weights, in place."""
    heads, rows, keys = (slice(0, count) for count in logits.shape)
    _bend(logits, view, heads, rows, keys)
    view.visible_keys.hide(logits, heads, rows, keys)
    share = None
    if view.sinks is not None:
        # sum_k exp(l_k) / (sum_k exp(l_k) + exp(sink)): what the sink leaves of a plain softmax.
        share = torch.sigmoid(logits.logsumexp(-1) - view.sinks)[..., None]
    torch.softmax(logits, -1, out=logits)
    if share is not None:
        logits *= share
    view.visible_keys.clear_blind(logits, heads, rows)


def row_weights(view: SampleCall) -> Tensor:
    """Weights of all rows at once, (query heads, rows, keys) float32; for decode steps."""
    if view.weights is not None:
        return view.weights.clone()
    kv_heads, keys, dim = view.key.shape
    query = view.query.float().mul(view.scaling)
    if query.shape[1] == 1:
        logits = row_products(query[:, 0], view.key)[:, None]
    else:
        grouped = query.reshape(kv_heads, -1, dim)
        logits = (grouped @ view.key.float().transpose(1, 2)).view(len(query), -1, keys)
    _softmax(logits, view)
    return logits
