"""Products of one query with keys in bfloat16; `row_products.py` says what they are for."""

from __future__ import annotations

from numba import float32, int32

from avl.kernels.compiled import compiled, from_bits


@compiled
def _dot(key, query):
    """A bfloat16 number is the upper half of a float32 number's bits."""
    total = float32(0.0)
    for channel in range(key.shape[0]):
        total += from_bits(int32(int32(key[channel]) << int32(16))) * query[channel]
    return total


@compiled
def products(heads, query, keys, strides, shared, result):
    """Products of queries with keys.

    Args:
        heads: (n,) which query heads.
        query: (query heads, width) float32.
        keys: flat view of the keys' memory, bfloat16 numbers as their 16 bits.
        strides: of key/value heads and of keys in it.
        shared: query heads per key/value head.
        result: (query heads, keys) float32.
    """
    width = query.shape[1]
    for at in range(heads.shape[0]):
        head = heads[at]
        start, own, products_of_head = (head // shared) * strides[0], query[head], result[head]
        for key in range(result.shape[1]):
            place = start + key * strides[1]
            products_of_head[key] = _dot(keys[place : place + width], own)
