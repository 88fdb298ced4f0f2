"""One query, or one row of weights, against keys and values as they lie in memory.

`row_products.py` says what they are for. Both functions work on some of the key/value heads, so
that threads can share the heads among them, and take keys and values as a flat view with strides:
a cache hands out parts of larger buffers, in which the numbers of a head lie side by side and
heads far apart.
"""

from __future__ import annotations

from numba import carray, float32

from avl.kernels.compiled import as_float32, compiled, pointer


@compiled
def _dot(key, query):
    total = float32(0.0)
    for channel in range(key.shape[0]):
        total += as_float32(key[channel]) * query[channel]
    return total


@compiled
def score_head(query, keys, start, step, result):
    """Products of the queries that share a key/value head with its keys.

    Args:
        query: (queries, width) float32.
        keys: flat view of the keys' memory, bfloat16 numbers as their 16 bits.
        start: of the head's first key in it; `step` from one key to the next.
        result: (queries, keys) float32.
    """
    width = query.shape[1]
    # Queries inside keys: a key is read from memory once for all queries that share its head.
    for key in range(result.shape[1]):
        place = start + key * step
        for head in range(result.shape[0]):
            result[head, key] = _dot(keys[place : place + width], query[head])


@compiled
def products(first, last, query, keys, strides, shared, result):
    """Products of queries with keys.

    Args:
        first: the first key/value head to work on; last: the one behind the last.
        query: (query heads, width) float32.
        keys: flat view of the keys' memory, bfloat16 numbers as their 16 bits.
        strides: of key/value heads and of keys in it.
        shared: query heads per key/value head.
        result: (query heads, keys) float32.
    """
    for head in range(first, last):
        own = slice(head * shared, (head + 1) * shared)
        score_head(query[own], keys, head * strides[0], strides[1], result[own])


@compiled
def _add_four(total, one, two, three, four, first, second, third, fourth):
    """Add four values times their weights.

    Four at a time, so that a sum is read and written once for four numbers read: with one value at
    a time, moving the sums takes as long as reading the values.
    """
    for channel in range(total.shape[0]):
        total[channel] += (
            first * as_float32(one[channel])
            + second * as_float32(two[channel])
            + third * as_float32(three[channel])
            + fourth * as_float32(four[channel])
        )


@compiled
def _add_one(total, value, weight):
    for channel in range(total.shape[0]):
        total[channel] += weight * as_float32(value[channel])


@compiled
def weighted_head(weights, values, start, step, result):
    """Add a head's values by the weights of the queries that share it.

    Args:
        weights: (queries, values) float32.
        values: flat view of the values' memory, bfloat16 numbers as their 16 bits.
        start: of the head's first value in it; `step` from one value to the next.
        result: (queries, width) float32, where they are added.
    """
    width, count = result.shape[1], weights.shape[1]
    fours = count - count % 4
    for key in range(0, fours, 4):
        # Slices of the length of the sum: numba checks indices that are computed inside a loop for
        # being negative, and does not vectorise a loop that does.
        place = start + key * step
        one = values[place : place + width]
        two = values[place + step : place + step + width]
        three = values[place + 2 * step : place + 2 * step + width]
        four = values[place + 3 * step : place + 3 * step + width]
        for head in range(result.shape[0]):
            a, b = weights[head, key], weights[head, key + 1]
            c, d = weights[head, key + 2], weights[head, key + 3]
            if a == float32(0.0) and b == a and c == a and d == a:
                continue  # not attended: a sparse step leaves out most of what is held
            _add_four(result[head], one, two, three, four, a, b, c, d)
    for key in range(fours, count):
        place = start + key * step
        for head in range(result.shape[0]):
            _add_one(result[head], values[place : place + width], weights[head, key])


@compiled
def sums(first, last, weights, values, strides, shared, result):
    """Sums of values by weights; values whose weight is 0 may be left unread.

    Args:
        first: the first key/value head to work on; last: the one behind the last.
        weights: (query heads, values) float32.
        values: flat view of the values' memory, bfloat16 numbers as their 16 bits.
        strides: of key/value heads and of values in it.
        shared: query heads per key/value head.
        result: (query heads, width) float32, zeros.
    """
    for head in range(first, last):
        own = slice(head * shared, (head + 1) * shared)
        weighted_head(weights[own], values, head * strides[0], strides[1], result[own])


@compiled
def head_means(weights_at, batch, heads, keys, result_at):
    """Means over heads.

    Args:
        weights_at: address of (batch, heads, keys) float32.
        batch, heads, keys: its shape.
        result_at: address of (batch, keys) float32.
    """
    weights = carray(pointer(weights_at), (batch, heads, keys), float32)
    result = carray(pointer(result_at), (batch, keys), float32)
    for row in range(batch):
        total = result[row]
        total[:] = weights[row, 0]
        for head in range(1, heads):
            own = weights[row, head]
            for key in range(keys):
                total[key] += own[key]
        for key in range(keys):
            total[key] *= float32(1.0 / heads)
