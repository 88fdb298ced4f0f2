"""Moving keys and values between slots of a buffer; `slots.py` says what is computed.

What is moved is bytes, whatever numbers they are, and comes as an address: see `pointer`. A
compiled copy of a few hundred bytes a head takes less time than one operation of torch takes to
start.
"""

from __future__ import annotations

from math import inf

from numba import carray, float32, int32, int64, uint8

from avl.kernels.compiled import bits_of, compiled, pointer
from avl.kernels.tables import (
    CAPACITY,
    KEY_STRIDES,
    KEYS_AT,
    KV_HEADS,
    POSITION_HEADS,
    POSITIONS_AT,
    SLOT_FIELDS,
    VALUE_STRIDES,
    VALUE_WIDTH,
    VALUES_AT,
    WIDTH,
)

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
def _copy(target, source):
    for place in range(source.shape[0]):
        target[place] = source[place]


@compiled
def _rank(score):
    """A number that orders scores as they are ordered, as 32 bits without a sign.

    The bits of a float32 number order positive numbers, and negative ones the other way round.
    """
    bits = bits_of(score)
    flipped = int32(bits ^ int32(bits >> int32(31)) & int32(0x7FFFFFFF))
    return int64(flipped) + (int64(1) << 31)


@compiled
def _least_of_best(scores, count):
    """The rank of the worst of the `count` best scores, and how many of that rank are among them.

    The rank is found bit by bit, from the highest on: the largest number that at least `count`
    ranks reach.
    """
    least = int64(0)
    for bit in range(31, -1, -1):
        tried, reached = least | (int64(1) << bit), 0
        for at in range(scores.shape[0]):
            reached += _rank(scores[at]) >= tried
        if reached >= count:
            least = tried
    better = 0
    for at in range(scores.shape[0]):
        better += _rank(scores[at]) > least
    return least, count - better


@compiled
def _swap_words(address, step, words, first, second):
    """Swap slots first[i] and second[i] of a head, `words` numbers of 32 bits each.

    Slots are `step` bytes apart.
    """
    for pair in range(first.shape[0]):
        one = carray(pointer(address + step * first[pair]), (words,), int32)
        other = carray(pointer(address + step * second[pair]), (words,), int32)
        for word in range(words):
            kept = one[word]
            one[word] = other[word]
            other[word] = kept


@compiled
def exchange_best(
    table_at, size, row, first_slot, second_slot, first_at, others, second_at, count, scores_at,
    pairs_at,
):  # fmt: skip
    """Have the second of two segments of a row hold the best keys; see `slots.exchange_best`.

    Args:
        table_at: address of a table of slots, with positions.
        size: bytes of a number of keys and values.
        row: of the batch.
        first_slot: first slot of the first segment, second_slot: of the second.
        first_at: address of (others,) float32 scores of the first segment.
        second_at: address of (count,) float32 scores of the second segment.
        scores_at: address of (others + count,) float32, which become the scores after the exchange.
        pairs_at: address of (2, count) int32 to work in.
    """
    scores = carray(pointer(scores_at), (others + count,), float32)
    _copy(scores[:others], carray(pointer(first_at), (others,), float32))
    _copy(scores[others:], carray(pointer(second_at), (count,), float32))
    least, equal = _least_of_best(scores, count)
    # Of equal keys those belong to the best that need not move.
    pairs, leaving = carray(pointer(pairs_at), (2, count), int32), 0
    for at in range(others, others + count):
        rank = _rank(scores[at])
        if rank > least or (rank == least and equal > 0):
            equal -= rank == least
            continue
        pairs[1, leaving] = at
        leaving += 1
    number = 0
    for at in range(others):
        rank = _rank(scores[at])
        if rank < least or (rank == least and equal == 0):
            continue
        equal -= rank == least
        pairs[0, number] = at
        number += 1
    # As many enter as leave.
    for pair in range(number):
        entering, leaves = pairs[0, pair], pairs[1, pair]
        scores[entering], scores[leaves] = scores[leaves], scores[entering]
        pairs[0, pair] = first_slot + entering
        pairs[1, pair] = second_slot + leaves - others
    first, second = pairs[0, :number], pairs[1, :number]
    table = carray(pointer(table_at), (SLOT_FIELDS,), int64)
    # Heads outside: slots of a head lie side by side, those of another far away.
    for head in range(table[KV_HEADS]):
        place = row * table[KEY_STRIDES] + head * table[KEY_STRIDES + 1]
        width = size * table[WIDTH]
        _swap_words(table[KEYS_AT] + size * place, width, width // 4, first, second)
        place = row * table[VALUE_STRIDES] + head * table[VALUE_STRIDES + 1]
        width = size * table[VALUE_WIDTH]
        _swap_words(table[VALUES_AT] + size * place, width, width // 4, first, second)
    for head in range(table[POSITION_HEADS]):
        line = row * table[POSITION_HEADS] + head
        _swap_words(table[POSITIONS_AT] + 4 * line * table[CAPACITY], 4, 1, first, second)
