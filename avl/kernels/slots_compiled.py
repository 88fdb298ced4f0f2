"""Dropping keys from slots of a buffer and exchanging them; `slots.py` says what is computed.

Tensors come as addresses, most of them in a table of slots (`tables.py`). What is moved is words of
32 bits, whatever numbers they are.
"""

from __future__ import annotations

from math import inf

from numba import carray, float32, int32, int64

from avl.kernels.compiled import bits_of, compiled, copy, pointer
from avl.kernels.tables import (
    CAPACITY,
    KEY_STRIDES,
    KEYS_AT,
    KV_HEADS,
    POSITION_HEADS,
    POSITIONS_AT,
    SCORES_AT,
    SLOT_FIELDS,
    VALUE_STRIDES,
    VALUE_WIDTH,
    VALUES_AT,
    WIDTH,
)

LARGEST = 3.4028234663852886e38
"""The largest float32 number."""


@compiled
def drop_worst(table_at, batch, start, stop, newest, slots_at, dropped_at):
    """Empty the worst slot of each row and head; see `slots.drop_worst`.

    Args:
        table_at: address of a table of slots, with positions and scores.
        batch: rows.
        start, stop: the range that is looked at.
        newest: keys at this position or later are safe.
        slots_at: address of (rows * heads,) int64, the slots found; dropped_at: of as many int32.
    """
    table = carray(pointer(table_at), (SLOT_FIELDS,), int64)
    lines, capacity = batch * table[POSITION_HEADS], table[CAPACITY]
    positions = carray(pointer(table[POSITIONS_AT]), (lines, capacity), int32)
    scores = carray(pointer(table[SCORES_AT]), (lines, capacity), float32)
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
    copy(scores[:others], carray(pointer(first_at), (others,), float32))
    copy(scores[others:], carray(pointer(second_at), (count,), float32))
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
        step, words = size * table[KEY_STRIDES + 2], size * table[WIDTH] // 4
        _swap_words(table[KEYS_AT] + size * place, step, words, first, second)
        place = row * table[VALUE_STRIDES] + head * table[VALUE_STRIDES + 1]
        step, words = size * table[VALUE_STRIDES + 2], size * table[VALUE_WIDTH] // 4
        _swap_words(table[VALUES_AT] + size * place, step, words, first, second)
    for head in range(table[POSITION_HEADS]):
        line = row * table[POSITION_HEADS] + head
        _swap_words(table[POSITIONS_AT] + 4 * line * table[CAPACITY], 4, 1, first, second)
