"""Attention of one query row per row of the batch, over keys in full and keys in few bits.

The reference is `avl.attention.row_logits` and `attend_with`, which also take masks, caps and
sinks; here is what an ordinary decode step needs, compiled into one call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avl.kernels.backend import on_threads
from avl.kernels.row_products import head_parts
from avl.kernels.tables import SlotTable, Table, readable, scratch


@dataclass(frozen=True)
class Codes:
    """Keys and values in few bits as the compiled function takes them.

    Attributes:
        table: where they lie.
        width: keys.
        scratch: float32 numbers that a thread needs beside them.
    """

    table: Table
    width: int
    scratch: int

    @classmethod
    def of(
        cls,
        keys: Tensor,
        groups: Tensor,
        key_limits: Tensor,
        values: Tensor,
        value_limits: Tensor,
        bits: tuple[int, int],
    ) -> Codes:
        """Of these tensors, on a processor, as `avl.kernels.codes` describes them.

        Args:
            keys: (batch, key/value heads, m, bytes).
            groups: (batch, 1 or key/value heads, m) int16.
            key_limits: (batch, key/value heads, groups, 2, width) half precision.
            values: (batch, key/value heads, m, bytes).
            value_limits: (batch, key/value heads, m, groups of channels, 2) half precision.
            bits: of a key's and of a value's code.
        """
        tensors = [part.contiguous() for part in (keys, groups, key_limits, values, value_limits)]
        keys, groups, key_limits, values, value_limits = tensors
        count, key_groups, width = keys.shape[2], key_limits.shape[2], key_limits.shape[4]
        value_groups = value_limits.shape[3]
        numbers = (
            count,
            *bits,
            keys.data_ptr(),
            keys.shape[3],
            groups.data_ptr(),
            groups.shape[1],
            key_groups,
            key_limits.data_ptr(),
            values.data_ptr(),
            values.shape[3],
            value_limits.data_ptr(),
            value_groups,
        )
        # Limits in float32, which are made head by head, so that no second copy of them is ever
        # held; a query with the limits of each group; and a number for each group.
        limits = key_groups * 2 * width + count * value_groups * 2
        folded = key_groups * keys.shape[3] * (8 // bits[0])
        scratch = limits + folded + max(key_groups, value_groups)
        return cls(Table(numbers, tensors), count, scratch)


class NewKey(NamedTuple):
    """Where a new key and value of each row and head are written before they are attended to.

    Attributes:
        position: sequence index of the token.
        score: what the key starts with.
        slot: where it is written.
        slots: (batch, position heads, 1) int64, where each head writes instead; or None.
    """

    position: int
    score: float
    slot: int
    slots: Tensor | None = None


_NOTHING = NewKey(0, 0.0, 0)
"""What the compiled function gets where there is no new key."""
_LOG2_E = 1 / math.log(2)


def compiled_for(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `row_attention` can run: on a processor, and where no gradients are wanted."""
    return readable(keys, values) and not gradients_wanted(query, keys, values)


def gradients_wanted(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether gradients are to flow through attention, which compiled code cuts off."""
    return torch.is_grad_enabled() and (
        query.requires_grad or keys.requires_grad or values.requires_grad
    )


def row_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, codes: Codes | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of values by the softmax of the queries' products with keys.

    Args:
        query: (batch, query heads, 1, width), a multiple of the key/value heads.
        keys: (batch, key/value heads, n, width), at least one.
        values: (batch, key/value heads, n, width of a value).
        scaling: factor on the products.
        codes: keys and values in front of these.

    Returns:
        Sums (batch, 1, query heads, width of a value) and weights (batch, key/value heads, query
            heads of each, keys), those of the codes first; float32.
    """
    # No copies, where they are as attention layers make them: one row of a head follows another.
    keys, values = (part if part.stride(3) == 1 else part.contiguous() for part in (keys, values))
    attention = SlotAttention(SlotTable(keys, values), (0, keys.shape[2]), codes)
    output, weights = attention(query, scaling)
    assert weights is not None
    return output, weights


class SlotAttention:
    """`row_attention` over some slots of a buffer, and what else a decode step does there.

    What is known before the query is prepared here, so that many layers can be prepared together.

    Attributes:
        weights_wanted: whether weights are returned.
    """

    def __init__(
        self,
        table: SlotTable,
        slots: tuple[int, int],
        codes: Codes | None = None,
        new: NewKey | None = None,
        *,
        scored: int | None = None,
        weights_wanted: bool = True,
    ) -> None:
        """Prepare.

        Args:
            table: of the buffer.
            slots: first slot that is read, and the one behind the last.
            codes: keys and values in front of those in the slots.
            new: where a new key is written first; None: there is none.
            scored: first slot of those whose keys' weights are added to their scores, which must be
                kept for each key/value head; None: none.
            weights_wanted: whether weights are returned.
        """
        self.weights_wanted, (first, last) = weights_wanted, slots
        # Tensors whose addresses are noted are held.
        self._table, self._codes, self._new = table, codes, new
        codes_at, coded, self._between = 0, 0, 0
        if codes is not None:
            codes_at, coded, self._between = codes.table.address, codes.width, codes.scratch
        self._count, kv_heads = coded + last - first, table.batch * table.kv_heads
        # As many threads as there is work for: a small model's step is over before a thread starts.
        self._parts = head_parts(kv_heads, kv_heads * self._count * table.width)
        position, score, slot, where = new or _NOTHING
        where_at = 0 if where is None else where.data_ptr()
        of_table = table.like, table.address, codes_at, coded
        of_slots = first, last, -1 if scored is None else scored
        self._prepared = (*of_table, where_at, slot, position, float(score), *of_slots)

    def __call__(
        self,
        query: Tensor,
        scaling: float,
        key: Tensor | None = None,
        value: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: (batch, query heads, 1, width), a multiple of the key/value heads.
            scaling: factor on the products.
            key: (batch, key/value heads, 1, width), of the buffer's own type, where a new key is
                written.
            value: (batch, key/value heads, 1, width of a value), likewise.

        Returns:
            As of `row_attention`; None in the place of weights that are not wanted.
        """
        table, heads, parts = self._table, query.shape[1], self._parts
        shared = heads // table.kv_heads
        # All tensors are held until the call is over, as the compiled function gets addresses.
        # Nothing is copied where it is as attention layers make it.
        query = query.float().contiguous()
        new = 0, 0
        if key is not None and value is not None:
            key, value = key.contiguous(), value.contiguous()
            new = key.data_ptr(), value.data_ptr()
        output = torch.empty(table.batch, 1, heads, table.value_width, dtype=torch.float32)
        between, weights = self._between * len(parts), None
        if self.weights_wanted:
            shape = table.batch, table.kv_heads, shared, self._count
            weights = torch.empty(shape, dtype=torch.float32)
            scratch_at, weights_at = scratch(between), weights.data_ptr()
        else:
            scratch_at = scratch(between + table.batch * heads * self._count)
            weights_at = scratch_at + 4 * between
        of_query = *new, query.data_ptr(), shared, scaling * _LOG2_E
        results, attend = (weights_at, output.data_ptr()), _attend()
        if len(parts) == 1:
            attend(*parts[0], *self._prepared, *of_query, scratch_at, *results)
            return output, weights

        def some(number: int) -> None:
            own_scratch_at = scratch_at + 4 * self._between * number
            attend(*parts[number], *self._prepared, *of_query, own_scratch_at, *results)

        on_threads(some, range(len(parts)))
        return output, weights


@cache
def _attend() -> Any:
    """The compiled function; importing numba takes a while."""
    from avl.kernels.row_attention_compiled import attend

    return attend
