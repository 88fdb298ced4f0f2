"""A decode step's attention in one call; `row_attention.py` says what is computed.

In one call, because a decode step of a small model is a matter of how often Python is asked: as
operations of torch, writing a key and attending to all takes some thirty of them. For the same
reason tensors come as addresses, most of them in tables (`tables.py`).

Index spaces: a head is found by `flat`, which counts the key/value heads of all rows of the batch
one after another, so that threads can share them whatever the batch is; `row` and `own` are its row
and its number among that row's. Query heads that share a key/value head follow one another. Keys
are counted with those in few bits first.
"""

from __future__ import annotations

from numba import carray, float32, int16, int32, int64, uint8, uint16

from avl.kernels import codes_compiled, row_products_compiled
from avl.kernels.compiled import bits_of, compiled, copy, from_bits, pointer
from avl.kernels.prompt_rows_compiled import exponentials, largest
from avl.kernels.tables import (
    CAPACITY,
    CODE_FIELDS,
    CODED,
    CODED_KEYS_AT,
    CODED_VALUES_AT,
    GROUP_HEADS,
    GROUPS_AT,
    KEY_BITS,
    KEY_BYTES,
    KEY_GROUPS,
    KEY_LIMITS_AT,
    KEY_STRIDES,
    KEYS_AT,
    KV_HEADS,
    POSITION_HEADS,
    POSITIONS_AT,
    SCORES_AT,
    SLOT_FIELDS,
    VALUE_BITS,
    VALUE_BYTES,
    VALUE_GROUPS,
    VALUE_LIMITS_AT,
    VALUE_STRIDES,
    VALUE_WIDTH,
    VALUES_AT,
    WIDTH,
)


@compiled
def _softmax(row, factor):
    """Turn products into weights in place; `factor` is that of the softmax times log2(e)."""
    inverse = float32(1.0) / exponentials(row, largest(row), factor)
    for key in range(row.shape[0]):
        row[key] *= inverse


@compiled
def _from_half(target, source):
    """Copy half precision numbers, given as their 16 bits, as float32.

    numba has no half precision for processors. Exponent and digits move to where float32 has them;
    the exponents are counted from another zero, which a product with 2^112 mends, for numbers below
    the normal ones, too. The largest exponent stands for infinity and NaN in both.
    """
    for place in range(source.shape[0]):
        bits = int32(source[place])
        number = from_bits(int32(int32(bits & int32(0x7FFF)) << int32(13))) * from_bits(
            int32(0x77800000)
        )
        wide = bits_of(number)
        if int32(bits & int32(0x7C00)) == int32(0x7C00):
            wide = int32(wide | int32(0x7F800000))
        target[place] = from_bits(int32(wide | int32(int32(bits & int32(0x8000)) << int32(16))))


@compiled
def _know(table, row, own, slot, position, score):
    """Write what is known of a head's new key; heads beyond those of the positions write nothing.

    Positions and scores may be one for all heads, keys and values never are.
    """
    heads, capacity = table[POSITION_HEADS], table[CAPACITY]
    if own >= heads:
        return
    place = (row * heads + own) * capacity
    carray(pointer(table[POSITIONS_AT] + 4 * place), (capacity,), int32)[slot] = position
    if table[SCORES_AT] != 0:
        carray(pointer(table[SCORES_AT] + 4 * place), (capacity,), float32)[slot] = score


@compiled
def _add_received(scores, weights):
    """Add the weights of the query heads that share a head to its scores."""
    for key in range(scores.shape[0]):
        # Their sum is taken first, as in the plain version.
        total = weights[0, key]
        for head in range(1, weights.shape[0]):
            total += weights[head, key]
        scores[key] += total


@compiled
def _attend_to_codes(query, weights, output, codes_at, row, kv_heads, own, factor, scratch_at):
    """Weights of all keys of a head, and the part of the output that keys in few bits have.

    Args:
        query: (query heads, width).
        weights: (query heads, m + count); the products of the keys in full are there.
        output: (query heads, value width), zeros, where values are added.
        codes_at: address of a table of codes.
        row: of the batch; kv_heads: heads of a row; own: number of the head among them.
        factor: of the softmax times log2(e).
        scratch_at: address of as many float32 numbers as `Codes.scratch` says.
    """
    table = carray(pointer(codes_at), (CODE_FIELDS,), int64)
    coded, key_bits, value_bits = table[CODED], table[KEY_BITS], table[VALUE_BITS]
    key_groups, value_groups, width = table[KEY_GROUPS], table[VALUE_GROUPS], query.shape[1]
    flat = row * kv_heads + own
    of_keys, of_values = key_groups * 2 * width, coded * value_groups * 2
    stored = table[KEY_BYTES]
    keys = carray(pointer(table[CODED_KEYS_AT] + flat * coded * stored), (coded, stored), uint8)
    filled = stored * (8 // key_bits)
    stored = table[VALUE_BYTES]
    values = carray(pointer(table[CODED_VALUES_AT] + flat * coded * stored), (coded, stored), uint8)
    # One set of groups may stand for all heads of a row.
    line = row * table[GROUP_HEADS] + min(own, table[GROUP_HEADS] - 1)
    groups = carray(pointer(table[GROUPS_AT] + 2 * line * coded), (coded,), int16)
    key_limits = carray(pointer(table[KEY_LIMITS_AT] + 2 * flat * of_keys), (of_keys,), uint16)
    value_limits = carray(
        pointer(table[VALUE_LIMITS_AT] + 2 * flat * of_values), (of_values,), uint16
    )
    # Limits are read in float32 by all queries that share the head: converted once.
    wide_key_limits = carray(pointer(scratch_at), (key_groups, 2, width), float32)
    _from_half(wide_key_limits.reshape(of_keys), key_limits)
    scratch_at += 4 * of_keys
    wide_value_limits = carray(pointer(scratch_at), (coded, value_groups, 2), float32)
    _from_half(wide_value_limits.reshape(of_values), value_limits)
    scratch_at += 4 * of_values
    folded = carray(pointer(scratch_at), (key_groups, filled), float32)
    folded[:, width:] = float32(0.0)  # the last byte's codes may be more than there are channels
    scratch_at += 4 * key_groups * filled
    constants = carray(pointer(scratch_at), (max(key_groups, value_groups),), float32)
    for head in range(query.shape[0]):
        codes_compiled.score_head(
            query[head],
            keys,
            groups,
            wide_key_limits,
            key_bits,
            weights[head, :coded],
            folded,
            constants,
        )
        # One softmax over both kinds of keys, whose weights lie side by side: nothing is joined.
        _softmax(weights[head], factor)
        codes_compiled.weighted_head(
            weights[head, :coded],
            values,
            wide_value_limits,
            value_bits,
            output[head],
            constants[:value_groups],
        )


@compiled
def attend(
    first_head,
    last_head,
    like,
    table_at,
    codes_at,
    coded,
    slots_at,
    slot,
    position,
    score,
    first,
    last,
    scored,
    new_key_at,
    new_value_at,
    query_at,
    shared,
    factor,
    scratch_at,
    weights_at,
    output_at,
):
    """Write a new key and value of each head, then attend to keys of one query row of each.

    Args:
        first_head: the first of the flat heads to work on; last_head: the one behind the last.
        like: an array of the keys' and values' type.
        table_at: address of a table of slots.
        codes_at: address of a table of codes; 0 where there are none.
        coded: keys in few bits.
        slots_at: address of (rows, position heads) int64, the slots that are written; 0: all heads
            write to `slot`.
        position: of the new token; score: what its key starts with.
        first: first slot that is read; last: the one behind the last.
        scored: first slot of those whose keys' weights are added to their scores, which are kept
            head by head; -1: no weights are added.
        new_key_at: address of (rows * key/value heads, width) new keys; 0: none is written.
        new_value_at: address of (rows * key/value heads, value width) new values.
        query_at: address of (rows * query heads, width) float32.
        shared: query heads of each key/value head.
        factor: scaling times log2(e).
        scratch_at: as in `_attend_to_codes`; 0 without codes.
        weights_at: address of (rows * query heads, coded + last - first) float32.
        output_at: address of (rows * query heads, value width) float32.
    """
    table = carray(pointer(table_at), (SLOT_FIELDS,), int64)
    kv_heads, width, value_width = table[KV_HEADS], table[WIDTH], table[VALUE_WIDTH]
    key_step, value_step = table[KEY_STRIDES + 2], table[VALUE_STRIDES + 2]
    count, factor32, size = coded + last - first, float32(factor), like.itemsize
    for flat in range(first_head, last_head):
        row, own = flat // kv_heads, flat % kv_heads
        # From the head's first key to its last: slices are checked against the length.
        place = row * table[KEY_STRIDES] + own * table[KEY_STRIDES + 1]
        keys = carray(
            pointer(table[KEYS_AT] + size * place), ((last - 1) * key_step + width,), like.dtype
        )
        place = row * table[VALUE_STRIDES] + own * table[VALUE_STRIDES + 1]
        values = carray(
            pointer(table[VALUES_AT] + size * place),
            ((last - 1) * value_step + value_width,),
            like.dtype,
        )
        if new_key_at != 0:
            if slots_at != 0:
                heads = table[POSITION_HEADS]
                line = row * heads + min(own, heads - 1)
                slot = carray(pointer(slots_at), (line + 1,), int64)[line]
            new = carray(pointer(new_key_at + size * flat * width), (width,), like.dtype)
            copy(keys[slot * key_step : slot * key_step + width], new)
            new = carray(
                pointer(new_value_at + size * flat * value_width), (value_width,), like.dtype
            )
            copy(values[slot * value_step : slot * value_step + value_width], new)
            _know(table, row, own, slot, position, float32(score))
        head = flat * shared  # the first query head, counted over all rows of the batch
        query = carray(pointer(query_at + 4 * head * width), (shared, width), float32)
        weights = carray(pointer(weights_at + 4 * head * count), (shared, count), float32)
        output = carray(pointer(output_at + 4 * head * value_width), (shared, value_width), float32)
        output[:] = float32(0.0)
        own_weights = weights[:, coded:]
        row_products_compiled.score_head(query, keys, first * key_step, key_step, own_weights)
        if codes_at == 0:
            for head in range(shared):
                _softmax(weights[head], factor32)
        else:
            _attend_to_codes(
                query, weights, output, codes_at, row, kv_heads, own, factor32, scratch_at
            )
        if scored >= 0:
            capacity = table[CAPACITY]
            scores = carray(pointer(table[SCORES_AT] + 4 * flat * capacity), (capacity,), float32)
            _add_received(scores[scored:last], own_weights[:, scored - first :])
        row_products_compiled.weighted_head(
            own_weights, values, first * value_step, value_step, output
        )
