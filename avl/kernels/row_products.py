"""Products of one row of queries with keys, in float32 whatever the keys' precision."""

from __future__ import annotations

import torch
from torch import Tensor

from avl.kernels.backend import COMPILED, backend_for, on_threads
from avl.kernels.memory import flat_view

CONVERTED_BYTES = (6 << 20, 128 << 20)
"""Bytes of keys that the plain version converts to float32 at a time: on a processor, elsewhere."""
_SMALL = 1 << 18
"""Numbers that a thread must have to itself to be worth starting."""


def row_products(query: Tensor, keys: Tensor) -> Tensor:
    """Products of each query with the keys of its head.

    The compiled version reads bfloat16 keys as they are. Keys in float32 need nothing of the kind,
    and other precisions are converted, a few heads at a time.

    Args:
        query: (query heads, width) float32, a multiple of the key/value heads.
        keys: (key/value heads, n, width).

    Returns:
        (query heads, n) float32.
    """
    if keys.dtype == torch.bfloat16 and backend_for(keys.device) == COMPILED:
        return _compiled(query, keys)
    heads, count, width = keys.shape
    grouped = query.view(heads, -1, width)
    result = torch.empty(*grouped.shape[:2], count, dtype=torch.float32, device=keys.device)
    if keys.dtype == torch.float32:
        _multiply(keys, grouped, result)
    else:
        most = CONVERTED_BYTES[keys.device.type != "cpu"]
        together = max(1, min(heads, most // (count * width * 4)))
        # One buffer for all: fresh memory costs more than the conversion.
        buffer = torch.empty(together, count, width, dtype=torch.float32, device=keys.device)
        for first in range(0, heads, together):
            some = slice(first, min(first + together, heads))
            converted = buffer[: some.stop - first].copy_(keys[some])
            _multiply(converted, grouped[some], result[some])
    return result.flatten(0, 1)


def _multiply(keys: Tensor, query: Tensor, result: Tensor) -> None:
    """keys (n, keys, width) x query (n, rows, width) transposed: result (n, rows, keys)."""
    if query.shape[1] == 1:  # a matrix times a vector is much faster this way round
        torch.bmm(keys, query.transpose(1, 2), out=result.view(*keys.shape[:2], 1))
    else:
        torch.bmm(query, keys.transpose(1, 2), out=result)


def _compiled(query: Tensor, keys: Tensor) -> Tensor:
    from avl.kernels.row_products_compiled import products  # importing numba takes a while

    heads, count = len(query), keys.shape[1]
    result = torch.empty(heads, count, dtype=torch.float32)
    flat, strides = flat_view(keys)
    arrays = query.contiguous().numpy(), flat, strides, heads // len(keys), result.numpy()
    parts = max(1, min(torch.get_num_threads(), heads, query.numel() * count // _SMALL))
    shares = torch.arange(heads).tensor_split(parts)
    on_threads(lambda some: products(some.numpy(), *arrays), list(shares))
    return result
