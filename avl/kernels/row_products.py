"""Attention of one row: products of a query with keys, and sums of values by weights.

In float32, whatever the precision of keys and values, and reading each of them once. torch's own
products do not: a product of bfloat16 matrices copies keys that are part of a larger buffer, sums
by weights read values against the order in which they lie, and SDPA's kernels are made for many
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from avl.kernels.backend import COMPILED, backend_for, on_threads
from avl.kernels.memory import flat_view

CONVERTED_BYTES = (6 << 20, 128 << 20)
"""Bytes of keys that the plain version converts to float32 at a time: on a processor, elsewhere."""
_SMALL = 1 << 18
"""Numbers that a thread must have to itself to be worth starting."""
_FEW = 1 << 16
"""Float32 numbers below which starting a compiled function takes longer than torch's product."""


def row_products(query: Tensor, keys: Tensor) -> Tensor:
    """Products of each query with the keys of its head.

    The compiled version reads bfloat16 keys as they are. Keys in float32 need nothing of the kind
    where a head has one query, and other precisions are converted, a few heads at a time.

    Args:
        query: (query heads, width) float32, a multiple of the key/value heads.
        keys: (key/value heads, n, width).

    Returns:
        (query heads, n) float32.
    """
    if _compiled_for(keys) and (keys.dtype == torch.bfloat16 or len(query) > len(keys)):
        result = torch.empty(len(query), keys.shape[1], dtype=torch.float32)
        return _compiled("products", query, keys, result)
    grouped = query.view(len(keys), -1, keys.shape[2])
    result = torch.empty(*grouped.shape[:2], keys.shape[1], dtype=torch.float32, device=keys.device)

    def multiply(some: slice, converted: Tensor) -> None:
        if grouped.shape[1] == 1:  # a matrix times a vector is much faster this way round
            out = result[some].transpose(1, 2)
            torch.bmm(converted, grouped[some].transpose(1, 2), out=out)
        else:
            torch.bmm(grouped[some], converted.transpose(1, 2), out=result[some])

    _in_float32(keys, multiply)
    return result.flatten(0, 1)


def row_sums(weights: Tensor, values: Tensor) -> Tensor:
    """Sums of the values of each head by weights.

    Args:
        weights: (query heads, n) float32, a multiple of the key/value heads.
        values: (key/value heads, n, width), finite.

    Returns:
        (query heads, width) float32.
    """
    if _compiled_for(values):
        result = torch.zeros(len(weights), values.shape[2], dtype=torch.float32)
        return _compiled("sums", weights, values, result)
    grouped = weights.view(len(values), -1, values.shape[1])
    result = grouped.new_empty(*grouped.shape[:2], values.shape[2])

    def multiply(some: slice, converted: Tensor) -> None:
        torch.bmm(grouped[some], converted, out=result[some])

    _in_float32(values, multiply)
    return result.flatten(0, 1)


def head_means(weights: Tensor) -> Tensor:
    """Means over heads: (batch, heads, keys) weights, (batch, keys) results."""
    compiled = backend_for(weights.device) == COMPILED and weights.dtype == torch.float32
    if not compiled or not weights.is_contiguous() or weights.requires_grad:
        return weights.mean(1)
    from avl.kernels import row_products_compiled  # importing numba takes a while

    # torch's mean over any but the last axis takes longer to start than these few numbers take.
    result = torch.empty(weights.shape[0], weights.shape[2], dtype=torch.float32)
    row_products_compiled.head_means(weights.data_ptr(), *weights.shape, result.data_ptr())
    return result


def _in_float32(source: Tensor, use: Callable[[slice, Tensor], None]) -> None:
    """Have keys or values used in float32, all at once or a few heads at a time."""
    heads, count, width = source.shape
    if source.dtype == torch.float32:
        use(slice(0, heads), source)
        return
    most = CONVERTED_BYTES[source.device.type != "cpu"]
    together = max(1, min(heads, most // max(1, count * width * 4)))
    # One buffer for all: fresh memory costs more than the conversion.
    buffer = torch.empty(together, count, width, dtype=torch.float32, device=source.device)
    for first in range(0, heads, together):
        some = slice(first, min(first + together, heads))
        use(some, buffer[: some.stop - first].copy_(source[some]))


def _compiled_for(source: Tensor) -> bool:
    if backend_for(source.device) != COMPILED:
        return False
    return source.dtype == torch.bfloat16 or (
        source.dtype == torch.float32 and source.numel() >= _FEW
    )


def _compiled(name: str, rows: Tensor, source: Tensor, result: Tensor) -> Tensor:
    from avl.kernels import row_products_compiled  # importing numba takes a while

    function, heads = getattr(row_products_compiled, name), len(source)
    flat, strides = flat_view(source)
    arrays = rows.contiguous().numpy(), flat, strides, len(rows) // heads, result.numpy()
    on_threads(lambda part: function(*part, *arrays), head_parts(heads, source.numel()))
    return result


def head_parts(heads: int, size: int) -> Sequence[tuple[int, int]]:
    """First of some heads and the one behind their last, in as many parts as it pays to have.

    Args:
        heads: how many.
        size: numbers that all of them together have to do with.
    """
    if size < 2 * _SMALL:
        return ((0, heads),)
    return _parts(heads, max(1, min(torch.get_num_threads(), heads, size // _SMALL)))


@lru_cache(64)
def _parts(heads: int, parts: int) -> Sequence[tuple[int, int]]:
    """`heads` in equal parts; the same ones at every step of a generation."""
    ends = [heads * part // parts for part in range(parts + 1)]
    return list(pairwise(ends))
