"""A decode step's attention in one call; `row_attention.py` says what is computed.

In one call, because a decode step of a small model is a matter of how often Python is asked: as
operations of torch, a row's attention takes some twenty of them. For the same reason tensors come
as addresses.

Index spaces: a head is found by `flat`, which counts the key/value heads of all rows of the batch
one after another, so that threads can share them whatever the batch is; `row` and `own` are its row
and its number among that row's. Query heads that share a key/value head follow one another. Keys
are counted with those in few bits first.
"""

from __future__ import annotations

from numba import carray, float32, int32

from avl.kernels import codes_compiled, row_products_compiled
from avl.kernels.compiled import bits_of, compiled, from_bits, pointer
from avl.kernels.prompt_rows_compiled import exponentials, largest


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
def attend(
    heads,
    kv_heads,
    shared,
    like,
    count,
    query_at,
    factor,
    width,
    keys_at,
    key_strides,
    value_width,
    values_at,
    value_strides,
    codes,
    key_bits,
    value_bits,
    scratch,
    weights_at,
    output_at,
):
    """Weights and sums of values of one query row per row of the batch.

    Args:
        heads: (n,) which flat heads.
        kv_heads: key/value heads of a row; shared: query heads of each.
        like: an array of the keys' and values' type.
        count: keys and values of a head.
        query_at: address of (rows * query heads, width) float32.
        factor: scaling times log2(e).
        width: of a key.
        keys_at: address of the first key; key_strides from row to row, head to head, key to key.
        value_width, values_at, value_strides: likewise.
        codes: arrays of keys and values in few bits: keys (batch, key/value heads, m, bytes),
            groups (batch, 1 or key/value heads, m), limits of keys (batch, key/value heads,
            groups, 2, width) as 16 bits each, values, and their limits (batch, key/value heads, m,
            groups of channels, 2), likewise; m is 0 where there are none.
        key_bits, value_bits: of a code.
        scratch: (n,) float32, as `scratch_size` says; 0 where bytes are not full of codes.
        weights_at: address of (rows * query heads, m + count) float32.
        output_at: address of (rows * query heads, value_width) float32, zeros.
    """
    coded_keys, groups, key_limits, coded_values, value_limits = codes
    coded, factor32 = coded_keys.shape[2], float32(factor)
    key_groups, value_groups = key_limits.shape[2], value_limits.shape[3]
    filled = coded_keys.shape[3] * (8 // key_bits)
    # Where each part of the scratch memory begins.
    of_values = key_groups * 2 * width
    folded_at = of_values + coded * value_groups * 2
    constants_at = folded_at + key_groups * filled
    for at in range(heads.shape[0]):
        flat = heads[at]
        row, own = flat // kv_heads, flat % kv_heads
        first = flat * shared  # query head, counted over all rows of the batch
        query = carray(pointer(query_at + 4 * first * width), (shared, width), float32)
        weights = carray(
            pointer(weights_at + 4 * first * (coded + count)), (shared, coded + count), float32
        )
        output = carray(
            pointer(output_at + 4 * first * value_width), (shared, value_width), float32
        )
        first_key = row * key_strides[0] + own * key_strides[1]
        first_value = row * value_strides[0] + own * value_strides[1]
        # From the first key of all to the head's last: slices are checked against the length.
        keys = carray(
            pointer(keys_at), (first_key + (count - 1) * key_strides[2] + width,), like.dtype
        )
        values = carray(
            pointer(values_at),
            (first_value + (count - 1) * value_strides[2] + value_width,),
            like.dtype,
        )
        row_products_compiled.score_head(query, keys, first_key, key_strides[2], weights[:, coded:])
        # One softmax over both kinds of keys, whose weights lie side by side: nothing is joined.
        if coded == 0:
            for head in range(shared):
                _softmax(weights[head], factor32)
        else:
            # Limits are read in float32 by all queries that share the head: converted once.
            halves = scratch[:of_values]
            _from_half(halves, key_limits[row, own].reshape(of_values))
            limits_of_keys = halves.reshape((key_groups, 2, width))
            halves = scratch[of_values:folded_at]
            _from_half(halves, value_limits[row, own].reshape(folded_at - of_values))
            limits_of_values = halves.reshape((coded, value_groups, 2))
            # Padded to full bytes with zeros, which no call writes to.
            folded = scratch[folded_at:constants_at].reshape((key_groups, filled))
            constants = scratch[constants_at:]
            for head in range(shared):
                codes_compiled.score_head(
                    query[head],
                    coded_keys[row, own],
                    groups[row, min(own, groups.shape[1] - 1)],
                    limits_of_keys,
                    key_bits,
                    weights[head, :coded],
                    folded,
                    constants,
                )
                _softmax(weights[head], factor32)
                codes_compiled.weighted_head(
                    weights[head, :coded],
                    coded_values[row, own],
                    limits_of_values,
                    value_bits,
                    output[head],
                    constants[:value_groups],
                )
        row_products_compiled.weighted_head(
            weights[:, coded:], values, first_value, value_strides[2], output
        )
