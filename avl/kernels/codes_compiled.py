"""Storing keys and values in a few bits, and attending to them as they are stored.

`codes.py` says what is computed.

All functions work on some of the (row of the batch, head) pairs, `pairs[i] = (row, head)`, so that
threads can share the pairs among them. Keys and values as a model makes them come as a flat view of
their memory with strides, because heads lie far apart in it; bfloat16 numbers come as their 16
bits.
"""

from __future__ import annotations

from numba import float32, int32, njit, uint8

from avl.kernels.compiled import (
    as_float32,
    compiled,
    kept_on_disk,
    larger,
    nearest,
    smaller,
)

exact = kept_on_disk()
"""Like `compiled`, with every operation as written: what is stored must not depend on who stored
it.
"""


inlined = njit(inline="always", error_model="numpy")
"""Compiled as part of its callers, so that a caller can write the length of a loop out.

Of a loop of unknown length LLVM takes 64 steps at once, and does 32 or 16 one by one. And only
where the length is known do sums over many keys stay in registers.
"""


@compiled
def _load(target, source, strides, row, head, number):
    """Copy one key or value of a head as float32; number -1, for none, takes the first.

    Args:
        target: (width,).
        source: flat view of all keys or values; strides from row to row, head to head, and so on.
        row, head, number: which of them.
    """
    place = row * strides[0] + head * strides[1] + max(number, 0) * strides[2]
    # A slice first: numba checks an index that is added up in the loop for being negative, and
    # does not vectorise a loop that does.
    numbers = source[place : place + target.shape[0]]
    for channel in range(target.shape[0]):
        target[channel] = as_float32(numbers[channel])


# -- storing ---------------------------------------------------------------------------------------


@exact
def _widen(low, high, numbers):
    for channel in range(numbers.shape[0]):
        low[channel] = smaller(low[channel], numbers[channel])
        high[channel] = larger(high[channel], numbers[channel])


@exact
def channel_extremes(pairs, source, strides, index, group_size, low, high, scratch):
    """Smallest and largest number of each channel in each group of keys.

    Args:
        pairs: (row, head).
        source: flat view of all keys; strides from row to row, head to head, key to key.
        index: (batch, 1 or heads, n) which keys, -1 for none.
        group_size: keys of a group.
        low: (batch, heads, groups, width) float32, lowered in place; high: likewise, raised.
        scratch: (width,) float32.
    """
    for pair in range(pairs.shape[0]):
        row, head = pairs[pair]
        own = min(head, index.shape[1] - 1)  # one index set may stand for all heads
        for at in range(index.shape[2]):
            key = index[row, own, at]
            if key >= 0:
                _load(scratch, source, strides, row, head, key)
                group = at // group_size
                _widen(low[row, head, group], high[row, head, group], scratch)


@inlined
def _extremes(numbers, length):
    low, high = numbers[0], numbers[0]
    for place in range(length):
        low, high = smaller(low, numbers[place]), larger(high, numbers[place])
    return low, high


@exact
def value_extremes(pairs, source, strides, index, low, high, scratch):
    """Smallest and largest number of each token in each group of channels.

    Args:
        pairs, source, strides, index, scratch: as in `channel_extremes`.
        low: (batch, heads, n, groups) float32, written; high: likewise.
    """
    width, groups = scratch.shape[0], low.shape[3]
    size = width // groups
    for pair in range(pairs.shape[0]):
        row, head = pairs[pair]
        own = min(head, index.shape[1] - 1)  # one index set may stand for all heads
        for at in range(index.shape[2]):
            _load(scratch, source, strides, row, head, index[row, own, at])
            for group in range(groups):
                some = scratch[group * size : (group + 1) * size]
                if size == 32:
                    ends = _extremes(some, 32)
                else:
                    ends = _extremes(some, size)
                low[row, head, at, group], high[row, head, at, group] = ends


@exact
def _round(codes, numbers, low, step, most):
    for channel in range(numbers.shape[0]):
        code = nearest((numbers[channel] - low[channel]) / larger(step[channel], float32(1e-12)))
        codes[channel] = smaller(larger(code, float32(0.0)), most)


@inlined
def _round_alike(codes, numbers, low, step, most, length):
    divisor = larger(step, float32(1e-12))
    for channel in range(length):
        code = nearest((numbers[channel] - low) / divisor)
        codes[channel] = smaller(larger(code, float32(0.0)), most)


@exact
def _add_shifted(target, codes, factor):
    for byte in range(target.shape[0]):
        target[byte] += codes[byte] * factor


@exact
def _to_bytes(stored, codes):
    for byte in range(stored.shape[0]):
        stored[byte] = uint8(int32(codes[byte]))


@exact
def _pack(stored, codes, bits):
    """Write codes, several to a byte; neighbouring channels lie in neighbouring bytes.

    The codes of a byte are added up as numbers in `codes`, exactly: numba shifts by a number that
    is not known when it compiles in 64 bits, which takes several times as long.
    """
    width = stored.shape[0]
    for place in range(1, 8 // bits):
        part = codes[place * width : (place + 1) * width]
        _add_shifted(codes[:width], part, float32(1 << (bits * place)))
    _to_bytes(stored, codes[:width])


@exact
def store_keys(pairs, source, strides, index, groups, limits, bits, stored, scratch, codes):
    """Codes of keys.

    Args:
        pairs, source, strides, index, scratch: as in `channel_extremes`.
        groups: (batch, 1 or heads, n) group of each key.
        limits: (batch, heads, groups, 2, width) float32, low and step.
        bits: of a code.
        stored: (batch, heads, n, bytes) uint8, written.
        codes: scratch, longer than a key where the last byte is not full, and 0 there.
    """
    width, most = scratch.shape[0], float32((1 << bits) - 1)
    for pair in range(pairs.shape[0]):
        row, head = pairs[pair]
        own = min(head, index.shape[1] - 1)  # one index set may stand for all heads
        for at in range(index.shape[2]):
            _load(scratch, source, strides, row, head, index[row, own, at])
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
def store_values(pairs, source, strides, index, limits, bits, stored, scratch, codes):
    """Codes of values.

    Args:
        pairs, source, strides, index, scratch: as in `channel_extremes`.
        limits: (batch, heads, n, groups of channels, 2) float32, low and step.
        bits, stored, codes: as in `store_keys`.
    """
    width, groups, most = scratch.shape[0], limits.shape[3], float32((1 << bits) - 1)
    size = width // groups
    for pair in range(pairs.shape[0]):
        row, head = pairs[pair]
        own = min(head, index.shape[1] - 1)  # one index set may stand for all heads
        for at in range(index.shape[2]):
            _load(scratch, source, strides, row, head, index[row, own, at])
            for group in range(groups):
                some = slice(group * size, (group + 1) * size)
                low, step = limits[row, head, at, group]
                if size == 32:
                    _round_alike(codes[some], scratch[some], low, step, most, 32)
                else:
                    _round_alike(codes[some], scratch[some], low, step, most, size)
            _pack(stored[row, head, at], codes, bits)


# -- attending -------------------------------------------------------------------------------------


@compiled
def _dot_eight(stored, query):
    total = float32(0.0)
    for byte in range(stored.shape[0]):
        total += float32(int32(stored[byte])) * query[byte]
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
def _score_eight(numbers, of_key, folded, constants, result):
    for key in range(numbers.shape[0]):
        group = of_key[key]
        result[key] = constants[group] + _dot_eight(numbers[key], folded[group])


@inlined
def _score_pairs(numbers, of_key, folded, constants, result, half):
    for key in range(numbers.shape[0]):
        group, stored, total = of_key[key], numbers[key], float32(0.0)
        one, other = folded[group, :half], folded[group, half:]
        for byte in range(half):
            pair = int32(stored[byte])
            low, high = float32(int32(pair & int32(15))), float32(int32(pair >> int32(4)))
            total += low * one[byte] + high * other[byte]
        result[key] = constants[group] + total


@compiled
def _score_four(numbers, of_key, folded, constants, result):
    half = numbers.shape[1]
    if half == 32:
        _score_pairs(numbers, of_key, folded, constants, result, 32)
    else:
        _score_pairs(numbers, of_key, folded, constants, result, half)


@inlined
def _score_quarters(numbers, of_key, folded, constants, result, part):
    for key in range(numbers.shape[0]):
        group, stored, total = of_key[key], numbers[key], float32(0.0)
        one, two = folded[group, :part], folded[group, part : 2 * part]
        three, four = folded[group, 2 * part : 3 * part], folded[group, 3 * part :]
        for byte in range(part):
            codes = int32(stored[byte])
            total += (
                float32(int32(codes & int32(3))) * one[byte]
                + float32(int32((codes >> int32(2)) & int32(3))) * two[byte]
                + float32(int32((codes >> int32(4)) & int32(3))) * three[byte]
                + float32(int32(codes >> int32(6))) * four[byte]
            )
        result[key] = constants[group] + total


@compiled
def _score_two(numbers, of_key, folded, constants, result):
    part = numbers.shape[1]
    if part == 32:
        _score_quarters(numbers, of_key, folded, constants, result, 32)
    elif part == 16:
        _score_quarters(numbers, of_key, folded, constants, result, 16)
    else:
        _score_quarters(numbers, of_key, folded, constants, result, part)


@compiled
def score_head(query, numbers, of_key, limits, bits, result, folded, constants):
    """Products of one query with the stored keys of its head.

    A group's limits are folded into the query before any of its keys is read, so that the loop
    over keys, which is the long one, multiplies with codes alone.

    Args:
        query: (width,).
        numbers: (n, bytes); of_key (n,) group of each key.
        limits: (groups, 2, width), low and step.
        bits: of a code.
        result: (n,).
        folded: (groups, bytes * codes per byte), 0 behind `width`; constants (groups,); scratch.
    """
    width = query.shape[0]
    for group in range(limits.shape[0]):
        low, step = limits[group]
        constants[group] = _fold(query, low, step, folded[group, :width])
    # One loop for each width of a code: a choice inside the loop would keep it from being
    # vectorised.
    if bits == 8:
        _score_eight(numbers, of_key, folded, constants, result)
    elif bits == 4:
        _score_four(numbers, of_key, folded, constants, result)
    else:
        _score_two(numbers, of_key, folded, constants, result)


@compiled
def scores(pairs, query, stored, groups, limits, bits, result, folded, constants):
    """Products of queries with stored keys.

    Args:
        pairs: (row, query head); query (batch, query heads, width).
        stored: (batch, key/value heads, n, bytes); groups (batch, 1 or key/value heads, n).
        limits: (batch, key/value heads, groups, 2, width), low and step.
        bits: of a code.
        result: (batch, query heads, n).
        folded: scratch, as in `score_head`; so is constants.
    """
    shared = query.shape[1] // stored.shape[1]
    for pair in range(pairs.shape[0]):
        row, head = pairs[pair]
        own = head // shared
        of_key = groups[row, min(own, groups.shape[1] - 1)]
        score_head(
            query[row, head],
            stored[row, own],
            of_key,
            limits[row, own],
            bits,
            result[row, head],
            folded,
            constants,
        )


# A code that does not begin at a byte's first bit is taken with a mask, as a number that is too
# large by a power of two, and its factor is smaller by the same: numba shifts by a number that is
# not known when it compiles in 64 bits, which takes three times as long.


@compiled
def _add_codes(target, stored, mask, factor):
    for byte in range(stored.shape[0]):
        target[byte] += factor * float32(int32(int32(stored[byte]) & mask))


@inlined
def _sum_run(weights, numbers, limits, group, unit, mask, total, length):
    """Sums of channels of one group whose codes lie in bytes in a row, at the same bits.

    Over the leading values that make up fours.

    Args:
        weights: (n,) of the values.
        numbers: (n, channels) bytes with the codes.
        limits: (n, groups, 2).
        group: which group.
        unit: factor on codes taken with `mask`.
        mask: the channels' bits in a byte.
        total: (channels,) where codes are added.
        length: channels.

    Returns:
        What is to be added to every channel of the group.
    """
    constant = float32(0.0)
    for key in range(0, weights.shape[0] - 3, 4):
        one, two, three, four = weights[key], weights[key + 1], weights[key + 2], weights[key + 3]
        if one == float32(0.0) and two == one and three == one and four == one:  # not attended
            continue
        constant += (
            one * limits[key, group, 0]
            + two * limits[key + 1, group, 0]
            + three * limits[key + 2, group, 0]
            + four * limits[key + 3, group, 0]
        )
        one *= unit * limits[key, group, 1]
        two *= unit * limits[key + 1, group, 1]
        three *= unit * limits[key + 2, group, 1]
        four *= unit * limits[key + 3, group, 1]
        a, b, c, d = numbers[key], numbers[key + 1], numbers[key + 2], numbers[key + 3]
        for byte in range(length):
            total[byte] += (
                one * float32(int32(int32(a[byte]) & mask))
                + two * float32(int32(int32(b[byte]) & mask))
                + three * float32(int32(int32(c[byte]) & mask))
                + four * float32(int32(int32(d[byte]) & mask))
            )
    return constant


@compiled
def _sum_by_four(weights, numbers, limits, bits, total, constants):
    """Sums of the leading values that make up fours; returns how many these are."""
    bytes_, most, groups = numbers.shape[1], (1 << bits) - 1, limits.shape[1]
    size, fours = total.shape[0] // groups, weights.shape[0] - weights.shape[0] % 4
    for group in range(groups):
        channel, stop = group * size, (group + 1) * size
        # The codes of a group's channels may lie in several places of their bytes.
        while channel < stop:
            place = channel // bytes_
            end = min(stop, (place + 1) * bytes_)
            shift = bits * place
            length, unit = end - channel, float32(1.0 / (1 << shift))
            numbers_of_run = numbers[:, channel - place * bytes_ : end - place * bytes_]
            mask, own = int32(most << shift), total[channel:end]
            if length == 32:
                constant = _sum_run(weights, numbers_of_run, limits, group, unit, mask, own, 32)
            elif length == 16:
                constant = _sum_run(weights, numbers_of_run, limits, group, unit, mask, own, 16)
            else:
                constant = _sum_run(weights, numbers_of_run, limits, group, unit, mask, own, length)
            if channel == group * size:
                constants[group] += constant
            channel = end
    return fours


@compiled
def _sum_one_by_one(weights, numbers, limits, bits, total, constants):
    """Like `_sum_by_four`, of all values, one at a time."""
    bytes_, most, groups = numbers.shape[1], (1 << bits) - 1, limits.shape[1]
    size = total.shape[0] // groups
    for key in range(numbers.shape[0]):
        weight = weights[key]
        if weight == float32(0.0):  # not attended
            continue
        for group in range(groups):
            constants[group] += weight * limits[key, group, 0]
            factor = weight * limits[key, group, 1]
            channel, stop = group * size, (group + 1) * size
            # The codes of a group's channels may lie in two places of their bytes.
            while channel < stop:
                place = channel // bytes_
                end = min(stop, (place + 1) * bytes_)
                some = numbers[key, channel - place * bytes_ : end - place * bytes_]
                shift = bits * place
                scaled = factor * float32(1.0 / (1 << shift))
                _add_codes(total[channel:end], some, int32(most << shift), scaled)
                channel = end


@compiled
def weighted_head(weights, numbers, limits, bits, total, constants):
    """Add one head's stored values by weights.

    Args:
        weights: (n,); numbers (n, bytes).
        limits: (n, groups of channels, 2), low and step.
        bits: of a code.
        total: (width,) where they are added.
        constants: (groups of channels,) scratch.
    """
    groups = limits.shape[1]
    size = total.shape[0] // groups
    # What is to be added to all channels of a group is summed up apart, once per value.
    constants[:] = float32(0.0)
    done = _sum_by_four(weights, numbers, limits, bits, total, constants)
    _sum_one_by_one(weights[done:], numbers[done:], limits[done:], bits, total, constants)
    for group in range(groups):
        for channel in range(group * size, (group + 1) * size):
            total[channel] += constants[group]


@compiled
def weighted_values(pairs, weights, stored, limits, bits, result, constants):
    """Sums of stored values by weights.

    Args:
        pairs: (row, query head); weights (batch, query heads, n).
        stored: (batch, key/value heads, n, bytes).
        limits: (batch, key/value heads, n, groups of channels, 2), low and step.
        bits: of a code.
        result: (batch, query heads, width), zeros; constants (groups of channels,) scratch.
    """
    shared = weights.shape[1] // stored.shape[1]
    for pair in range(pairs.shape[0]):
        row, head = pairs[pair]
        own = head // shared
        weighted_head(
            weights[row, head],
            stored[row, own],
            limits[row, own],
            bits,
            result[row, head],
            constants,
        )
