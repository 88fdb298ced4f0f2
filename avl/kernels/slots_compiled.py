"""Moving keys and values between slots of a buffer; `slots.py` says what is computed.

What is moved is bytes, whatever numbers they are, and comes as an address: see `pointer`. A
compiled copy of a few hundred bytes a head takes less time than one operation of torch takes to
start.
"""

from __future__ import annotations

from math import inf

from numba import carray, float32, int32, int64, uint8

from avl.kernels.compiled import compiled, pointer

LARGEST = 3.4028234663852886e38
"""The largest float32 number."""


@compiled
def _write(target_at, target_strides, source_at, source_strides, heads, slot, width, size):
    """Copy one slot of each head: `width` numbers of `size` bytes; strides count numbers."""
    for row in range(heads[0]):
        for head in range(heads[1]):
            to = row * target_strides[0] + head * target_strides[1] + slot * target_strides[2]
            start = row * source_strides[0] + head * source_strides[1]
            target = carray(pointer(target_at + size * to), (width * size,), uint8)
            source = carray(pointer(source_at + size * start), (width * size,), uint8)
            for byte in range(width * size):
                target[byte] = source[byte]


@compiled
def write_slot(
    heads,
    slot,
    size,
    keys_at,
    key_strides,
    key_at,
    new_key_strides,
    key_width,
    values_at,
    value_strides,
    value_at,
    new_value_strides,
    value_width,
    positions_at,
    position_heads,
    capacity,
    position,
    scores_at,
    score,
):
    """Write one key and value of each row and head into a slot, and what is known of it.

    Args:
        heads: rows and key/value heads.
        slot: which.
        size: bytes of a number.
        keys_at: address of the buffer's keys; key_strides in numbers; values likewise.
        key_at: address of the new keys, one a head; new_key_strides in numbers; key_width numbers
            of one; values likewise.
        positions_at: address of (rows, position_heads, capacity) int32.
        position_heads: heads of positions and scores.
        capacity: slots of the buffer.
        position: of the new token.
        scores_at: address of as many float32 numbers; 0 where there are none.
        score: of the new key.
    """
    _write(keys_at, key_strides, key_at, new_key_strides, heads, slot, key_width, size)
    _write(values_at, value_strides, value_at, new_value_strides, heads, slot, value_width, size)
    # Positions and scores may be one for all heads; keys and values never are.
    lines = heads[0] * position_heads
    positions = carray(pointer(positions_at), (lines, capacity), int32)
    for line in range(lines):
        positions[line, slot] = position
    if scores_at != 0:
        scores = carray(pointer(scores_at), (lines, capacity), float32)
        for line in range(lines):
            scores[line, slot] = score


@compiled
def add_received(scores_at, weights_at, shape, start, stop, first):
    """Add the weights of the query heads that share a head to its scores.

    Args:
        scores_at: address of (lines, capacity) float32.
        weights_at: address of (lines, query heads, keys) float32.
        shape: lines (rows times heads), capacity, query heads, keys.
        start: first slot that is added to, for the key `first`; stop: the slot behind the last.
    """
    lines, capacity, shared, keys = shape
    scores = carray(pointer(scores_at), (lines, capacity), float32)
    weights = carray(pointer(weights_at), (lines, shared, keys), float32)
    for line in range(lines):
        target = scores[line, start:stop]
        # Query heads inside: their sum is taken first, as in the plain version.
        for at in range(stop - start):
            total = weights[line, 0, first + at]
            for head in range(1, shared):
                total += weights[line, head, first + at]
            target[at] += total


@compiled
def drop_worst(positions_at, scores_at, lines, capacity, start, stop, newest, slots_at, dropped_at):
    """Empty the worst slot of each line; see `slots.drop_worst`.

    Args:
        positions_at: address of (lines, capacity) int32, scores_at of as many float32 numbers.
        lines: rows times heads.
        capacity: slots of the buffer; start, stop: the range that is looked at.
        newest: keys at this position or later are safe.
        slots_at: address of (lines,) int64, the slots found; dropped_at: of (lines,) int32.
    """
    positions = carray(pointer(positions_at), (lines, capacity), int32)
    scores = carray(pointer(scores_at), (lines, capacity), float32)
    slots = carray(pointer(slots_at), (lines,), int64)
    dropped = carray(pointer(dropped_at), (lines,), int32)
    for line in range(lines):
        worst, least = start, float32(inf)
        for slot in range(start, stop):
            position = positions[line, slot]
            if position < 0 or position >= newest:
                continue
            # Protected keys, of infinite score, are worse than safe ones, and the first of equal
            # ones goes, as torch's argmin has it.
            score = min(scores[line, slot], float32(LARGEST))
            if score < least:
                worst, least = slot, score
        slots[line], dropped[line] = worst, positions[line, worst]
        positions[line, worst] = -1


@compiled
def pair_up(best_at, count, scores_at, others, slots, chosen_at, pairs_at):
    """Slots that change places, and their scores swapped; see `slots.exchange_best`.

    Args:
        best_at: address of (count,) int64, numbers of the best keys of both segments.
        count: keys of the second segment.
        scores_at: address of (others + count,) float32.
        others: keys of the first segment.
        slots: first slot of either segment.
        chosen_at: address of (others + count,) bytes, zeros, to work in.
        pairs_at: address of (2, count) int64, the slots found.

    Returns:
        How many pairs there are.
    """
    best = carray(pointer(best_at), (count,), int64)
    scores = carray(pointer(scores_at), (others + count,), float32)
    pairs = carray(pointer(pairs_at), (2, count), int64)
    chosen = carray(pointer(chosen_at), (others + count,), uint8)
    for at in range(count):
        chosen[best[at]] = 1
    number, leaving = 0, others
    for entering in range(others):
        if chosen[entering] == 0:
            continue
        # As many enter as leave, so that there is one left for each.
        while chosen[leaving] == 1:
            leaving += 1
        pairs[0, number], pairs[1, number] = slots[0] + entering, slots[1] + leaving - others
        scores[entering], scores[leaving] = scores[leaving], scores[entering]
        number, leaving = number + 1, leaving + 1
    return number


@compiled
def swap_slots(address, heads, slots, words, first_at, second_at, count):
    """Swap slots first[i] and second[i] of every head.

    Args:
        address: of (heads, slots, words) numbers of 32 bits, contiguous.
        heads, slots, words: its shape.
        first_at: address of (count,) int64 slots; second_at: likewise, none of them in both.
        count: how many pairs.
    """
    numbers = carray(pointer(address), (heads, slots, words), int32)
    first = carray(pointer(first_at), (count,), int64)
    second = carray(pointer(second_at), (count,), int64)
    # Heads outside: slots of a head lie side by side, those of another far away.
    for head in range(heads):
        for pair in range(count):
            one, other = numbers[head, first[pair]], numbers[head, second[pair]]
            for word in range(words):
                kept = one[word]
                one[word] = other[word]
                other[word] = kept
