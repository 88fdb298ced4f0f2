"""Storing keys and values in a few bits, and attending to them as they are stored; `codes.py` says
what is computed.

All functions work on some of the (row of the batch, head) pairs, `pairs[i] = (row, head)`, so that
threads can share the pairs among them. Keys and values as a model makes them come as a flat view of
their memory with strides, because heads lie far apart in it; bfloat16 numbers come as their 16
bits.
"""

from __future__ import annotations

from typing import Any

from numba import float32, int32, njit, types, uint8
from numba.extending import overload

from avl.kernels.compiled import compiled, from_bits, larger, nearest, smaller

exact = njit(nogil=True, cache=True, error_model="numpy")
"""Like `compiled`, with every operation as written: what is stored must not depend on who stored
it.
"""


def _load(target: Any, source: Any) -> None:
    """Copy numbers as float32."""


@overload(_load, jit_options={"nogil": True})
def _load_compiled(target: Any, source: Any) -> Any:
    if source.dtype == types.float32:

        def from_float32(target: Any, source: Any) -> None:
            for place in range(source.shape[0]):
                target[place] = source[place]

        return from_float32

    def from_bfloat16(target: Any, source: Any) -> None:
        for place in range(source.shape[0]):
            target[place] = from_bits(int32(int32(source[place]) << int32(16)))

    return from_bfloat16


# -- storing ---------------------------------------------------------------------------------------


@exact
def _widen(low, high, numbers):
    for channel in range(numbers.shape[0]):
        low[channel] = smaller(low[channel], numbers[channel])
        high[channel] = larger(high[channel], numbers[channel])


@exact
def channel_extremes(pairs, source, strides, offset, index, group_size, low, high, scratch):
    """Smallest and largest number of each channel in each group of `group_size` keys; `index` is -1
    for no key.
    """
    width = low.shape[3]
    for pair in range(pairs.shape[0]):
        row, head = pairs[pair]
        own = min(head, index.shape[1] - 1)
        start = offset + row * strides[0] + head * strides[1]
        for at in range(index.shape[2]):
            key = index[row, own, at]
            if key >= 0:
                place = start + key * strides[2]
                _load(scratch, source[place : place + width])
                group = at // group_size
                _widen(low[row, head, group], high[row, head, group], scratch)


@exact
def _extremes(numbers):
    low, high = numbers[0], numbers[0]
    for place in range(numbers.shape[0]):
        low, high = smaller(low, numbers[place]), larger(high, numbers[place])
    return low, high


@exact
def value_extremes(pairs, source, strides, offset, index, low, high, scratch):
    """Smallest and largest number of each token in each group of channels."""
    width, groups = scratch.shape[0], low.shape[3]
    size = width // groups
    for pair in range(pairs.shape[0]):
        row, head = pairs[pair]
        own = min(head, index.shape[1] - 1)
        start = offset + row * strides[0] + head * strides[1]
        for at in range(index.shape[2]):
            place = start + max(index[row, own, at], 0) * strides[2]
            _load(scratch, source[place : place + width])
            for group in range(groups):
                ends = _extremes(scratch[group * size : (group + 1) * size])
                low[row, head, at, group], high[row, head, at, group] = ends


@exact
def _round(codes, numbers, low, step, most):
    for channel in range(numbers.shape[0]):
        code = nearest((numbers[channel] - low[channel]) / larger(step[channel], float32(1e-12)))
        codes[channel] = smaller(larger(code, float32(0.0)), most)


@exact
def _round_alike(codes, numbers, low, step, most):
    divisor = larger(step, float32(1e-12))
    for channel in range(numbers.shape[0]):
        code = nearest((numbers[channel] - low) / divisor)
        codes[channel] = smaller(larger(code, float32(0.0)), most)


@exact
def _pack(stored, codes, bits):
    """Write codes, several to a byte; neighbouring channels lie in neighbouring bytes."""
    width = stored.shape[0]
    for byte in range(width):
        stored[byte] = uint8(int32(codes[byte]))
    for place in range(1, 8 // bits):
        part = codes[place * width : (place + 1) * width]
        for byte in range(width):
            stored[byte] |= uint8(int32(part[byte]) << int32(bits * place))


@exact
def store_keys(pairs, source, strides, offset, index, groups, limits, bits, stored, scratch, codes):
    """Codes of keys; `codes` is longer than a key where the last byte is not full, and 0 there."""
    width, most = scratch.shape[0], float32((1 << bits) - 1)
    for pair in range(pairs.shape[0]):
        row, head = pairs[pair]
        own = min(head, index.shape[1] - 1)
        start = offset + row * strides[0] + head * strides[1]
        for at in range(index.shape[2]):
            place = start + max(index[row, own, at], 0) * strides[2]
            _load(scratch, source[place : place + width])
            group = groups[row, min(head, groups.shape[1] - 1), at]
            _round(
                codes[:width],
                scratch,
                limits[row, head, group, 0],
                limits[row, head, group, 1],
                most,
            )
            _pack(stored[row, head, at], codes, bits)


@exact
def store_values(pairs, source, strides, offset, index, limits, bits, stored, scratch, codes):
    """Codes of values."""
    width, groups, most = scratch.shape[0], limits.shape[3], float32((1 << bits) - 1)
    size = width // groups
    for pair in range(pairs.shape[0]):
        row, head = pairs[pair]
        own = min(head, index.shape[1] - 1)
        start = offset + row * strides[0] + head * strides[1]
        for at in range(index.shape[2]):
            place = start + max(index[row, own, at], 0) * strides[2]
            _load(scratch, source[place : place + width])
            for group in range(groups):
                some = slice(group * size, (group + 1) * size)
                own_limits = limits[row, head, at, group]
                _round_alike(codes[some], scratch[some], own_limits[0], own_limits[1], most)
            _pack(stored[row, head, at], codes, bits)


# -- attending -------------------------------------------------------------------------------------


@compiled
def _dot_eight(stored, query):
    total = float32(0.0)
    for byte in range(stored.shape[0]):
        total += float32(int32(stored[byte])) * query[byte]
    return total


@compiled
def _dot_four(stored, one, other):
    total = float32(0.0)
    for byte in range(stored.shape[0]):
        pair = int32(stored[byte])
        total += (
            float32(int32(pair & int32(15))) * one[byte]
            + float32(int32(pair >> int32(4))) * other[byte]
        )
    return total


@compiled
def _dot_two(stored, first, second, third, fourth):
    total = float32(0.0)
    for byte in range(stored.shape[0]):
        four = int32(stored[byte])
        total += float32(int32(four & int32(3))) * first[byte]
        total += float32(int32((four >> int32(2)) & int32(3))) * second[byte]
        total += float32(int32((four >> int32(4)) & int32(3))) * third[byte]
        total += float32(int32(four >> int32(6))) * fourth[byte]
    return total


@compiled
def _fold(query, low, step, folded):
    """Fold a group's limits into a query: returns query . low, and writes query * step."""
    total = float32(0.0)
    for channel in range(query.shape[0]):
        total += query[channel] * low[channel]
        folded[channel] = query[channel] * step[channel]
    return total


@compiled
def scores(pairs, query, stored, groups, limits, bits, result, folded, constants):
    """Products of queries with stored keys.

    Args:
        pairs: (row, query head); query (batch, query heads, width), scaled.
        stored: (batch, key/value heads, n, bytes); groups (batch, 1 or key/value heads, n).
        limits: (batch, key/value heads, groups, 2, width), low and step.
        result: (batch, query heads, n).
        folded: (groups, bytes * codes per byte), 0 behind `width`; constants (groups,); both
            scratch.
    """
    bytes_, width, shared = stored.shape[3], query.shape[2], query.shape[1] // stored.shape[1]
    for pair in range(pairs.shape[0]):
        row, head = pairs[pair]
        own = head // shared
        for group in range(limits.shape[2]):
            low, step = limits[row, own, group, 0], limits[row, own, group, 1]
            constants[group] = _fold(query[row, head], low, step, folded[group, :width])
        numbers, of_key = stored[row, own], groups[row, min(own, groups.shape[1] - 1)]
        scored = result[row, head]
        for key in range(numbers.shape[0]):
            group = of_key[key]
            parts = folded[group]
            if bits == 8:
                total = _dot_eight(numbers[key], parts)
            elif bits == 4:
                total = _dot_four(numbers[key], parts[:bytes_], parts[bytes_:])
            else:
                total = _dot_two(
                    numbers[key],
                    parts[:bytes_],
                    parts[bytes_ : 2 * bytes_],
                    parts[2 * bytes_ : 3 * bytes_],
                    parts[3 * bytes_ :],
                )
            scored[key] = constants[group] + total


@compiled
def _add_codes(target, stored, shift, mask, factor):
    for byte in range(stored.shape[0]):
        target[byte] += factor * float32(int32((int32(stored[byte]) >> shift) & mask))


@compiled
def weighted_values(pairs, weights, stored, limits, bits, result, constants):
    """Sums of stored values by weights.

    Args:
        pairs: (row, query head); weights (batch, query heads, n).
        stored: (batch, key/value heads, n, bytes).
        limits: (batch, key/value heads, n, groups of channels, 2), low and step.
        result: (batch, query heads, width), zeros; constants (groups of channels,) scratch.
    """
    bytes_, width, groups = stored.shape[3], result.shape[2], limits.shape[3]
    size, shared, mask = (
        width // groups,
        weights.shape[1] // stored.shape[1],
        int32((1 << bits) - 1),
    )
    for pair in range(pairs.shape[0]):
        row, head = pairs[pair]
        own = head // shared
        mine, numbers, total = weights[row, head], stored[row, own], result[row, head]
        constants[:] = float32(0.0)
        for key in range(numbers.shape[0]):
            weight = mine[key]
            if weight == float32(0.0):  # not attended
                continue
            for group in range(groups):
                factor = weight * limits[row, own, key, group, 1]
                constants[group] += weight * limits[row, own, key, group, 0]
                channel, stop = group * size, (group + 1) * size
                # The codes of a group's channels may lie in two places of their bytes.
                while channel < stop:
                    place = channel // bytes_
                    end = min(stop, (place + 1) * bytes_)
                    some = numbers[key, channel - place * bytes_ : end - place * bytes_]
                    _add_codes(total[channel:end], some, int32(bits * place), mask, factor)
                    channel = end
        for group in range(groups):
            for channel in range(group * size, (group + 1) * size):
                total[channel] += constants[group]
