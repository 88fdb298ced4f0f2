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
def _write(target_at, target_strides, source_at, source_strides, heads, slot, size):
    """Copy one slot of each head, `size` bytes; strides, from row to row and so on, in bytes."""
    for row in range(heads[0]):
        for head in range(heads[1]):
            to = target_at + row * target_strides[0] + head * target_strides[1]
            start = source_at + row * source_strides[0] + head * source_strides[1]
            target = carray(pointer(to + slot * target_strides[2]), (size,), uint8)
            source = carray(pointer(start), (size,), uint8)
            for byte in range(size):
                target[byte] = source[byte]


@compiled
def write_slot(
    heads,
    slot,
    keys_at,
    key_strides,
    key_at,
    new_key_strides,
    key_size,
    values_at,
    value_strides,
    value_at,
    new_value_strides,
    value_size,
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
        keys_at: address of the buffer's keys; key_strides in bytes; values likewise.
        key_at: address of the new keys, one a head; new_key_strides in bytes; key_size bytes of
            one; values likewise.
        positions_at: address of (rows, position_heads, capacity) int32.
        position_heads: heads of positions and scores.
        capacity: slots of the buffer.
        position: of the new token.
        scores_at: address of as many float32 numbers; 0 where there are none.
        score: of the new key.
    """
    _write(keys_at, key_strides, key_at, new_key_strides, heads, slot, key_size)
    _write(values_at, value_strides, value_at, new_value_strides, heads, slot, value_size)
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
