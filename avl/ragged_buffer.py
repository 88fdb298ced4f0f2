"""Keys of one layer whose key/value heads hold different numbers of them.

Keys and values of all rows and heads lie behind one another in two flat tensors, so that no memory
goes to heads with fewer keys; a table says where each slot of each head lies. Positions and scores
are kept as in `KeyBuffer`, with slots that a head does not own (position -1, no entry in the
table). A step reads a copy in which all heads are as long as the longest.

Every head gains one key per step, and drops one when its row does, so heads differ by as much as
they did after the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from avl.buffer import BufferSizes, KeyBuffer, roomy
from avl.kernels.tables import SlotTable
from avl.policies.base import Choice


@dataclass(eq=False, kw_only=True)
class RaggedBuffer(KeyBuffer):
    """A buffer without secondary, core or quantised keys; `keys` and `values` are flat.

    Attributes:
        keys: (capacity, head dim) of all rows and heads.
        values: (capacity, head dim).
        table: (batch, heads, slots) int64 index of each slot's entry, -1 where a head has no such
            slot.
        entries: entries in use, from the first on.
    """

    table: Tensor
    entries: int

    @classmethod
    def from_choice(
        cls, keys: Tensor, values: Tensor, positions: Tensor, choice: Choice, heads: int
    ) -> RaggedBuffer:
        """Hold what a policy chose; arguments as of `KeyBuffer.from_choice`."""
        (index,) = choice.always_attended
        index = index.expand(-1, heads, -1)
        owned = index >= 0
        batch, _, slots = index.shape
        entries = int(owned.sum())
        capacity = roomy(slots)
        table = torch.full((batch, heads, capacity), -1, dtype=torch.int64, device=keys.device)
        # Entries are numbered in the order of (row, head, slot), which is also the order in which
        # boolean indexing below takes keys and values.
        table[:, :, :slots] = torch.where(owned, owned.flatten().cumsum(0).view_as(index) - 1, -1)
        row, head, _ = owned.nonzero(as_tuple=True)
        flat_keys = keys.new_empty(roomy(entries), keys.shape[3])
        flat_values = values.new_empty(roomy(entries), values.shape[3])
        flat_keys[:entries] = keys[row, head, index[owned]]
        flat_values[:entries] = values[row, head, index[owned]]
        held_positions = torch.full(
            (batch, heads, capacity), -1, dtype=torch.int32, device=keys.device
        )
        taken = positions.expand(-1, heads, -1).gather(2, index.clamp_min(0))
        held_positions[:, :, :slots] = taken.masked_fill(~owned, -1)
        scores = None
        if choice.scores is not None:
            scores = torch.zeros(batch, heads, capacity, device=keys.device)
            by_head = choice.scores.expand(-1, heads, -1)
            scores[:, :, :slots] = by_head.gather(2, index.clamp_min(0)).float()
        return cls(
            keys=flat_keys,
            values=flat_values,
            positions=held_positions,
            scores=scores,
            secondary_width=0,
            filled=slots,
            padding_slots=[0] * batch,
            free_slots=[0] * batch,
            core_spans=[(0, 0)] * batch,
            secondary_scores=None,
            core_scores_at_refresh=None,
            quantized=None,
            quantized_held=[0] * batch,
            storage=choice.storage,
            sparse_budget=[0] * batch,
            budget_share=list(choice.budget_share) or [1.0] * batch,
            evictable=list(choice.evictable),
            table=table,
            entries=entries,
        )

    # -- reading -----------------------------------------------------------------------------------

    @property
    def slot_table(self) -> SlotTable:
        """Of positions and scores; keys and values do not lie as it says."""
        shape = (*self.positions.shape[:2], -1, -1)
        keys, values = (flat[None, None].expand(shape) for flat in (self.keys, self.values))
        return SlotTable(keys, values, self.positions, self.scores)

    def ragged(self, refresh: bool) -> bool:
        return True

    def held_in_buffer(self) -> list[int]:
        """Keys each row holds, mean over its heads, rounded down."""
        owned = (self.table[:, :, : self.filled] >= 0).sum((1, 2)).tolist()
        heads = self.table.shape[1]
        # A free slot is owned (it has an entry) but holds no key.
        return [n // heads - free for n, free in zip(owned, self.free_slots, strict=True)]

    def reads(self, *, refresh: bool) -> list[int]:
        return self.held()

    def _read_from(self, first: int, quantized: bool) -> tuple[Tensor, Tensor]:
        """Keys and values, a copy; slots that a head does not have hold any finite numbers."""
        # Slots that a head does not own read entry 0; their position is -1, so they are masked.
        index = self.table[:, :, first : self.filled].clamp_min(0)
        return self.keys[index], self.values[index]

    # -- bytes -------------------------------------------------------------------------------------

    def sizes_later(self) -> Callable[[], BufferSizes]:
        sizes = self._sizes_now()
        return lambda: sizes

    def _sizes_now(self) -> BufferSizes:
        """Sizes, every tensor asked."""
        batch, heads, _ = self.table.shape
        allocated = self.keys.nbytes + self.values.nbytes
        entry = allocated // self.keys.shape[0]  # one key and its value
        by_row = (self.positions[:, :, : self.filled] >= 0).sum((1, 2)).tolist()
        return BufferSizes(
            held=self.held(),
            in_use=self.entries * entry,
            allocated=allocated,
            host=0,
            by_row=[float(count * entry) for count in by_row],
            bookkeeping=sum(tensor.nbytes for tensor in self.bookkeeping()),
            position=batch * heads * entry,
        )

    def bookkeeping(self) -> list[Tensor]:
        return [*super().bookkeeping(), self.table]

    # -- one key more ------------------------------------------------------------------------------

    def reserve(self) -> Tensor | None:
        if min(self.free_slots) == 0:
            self._add_slot()
        slots, self.next_free_slot = self.next_free_slot, None
        if slots is None:
            free = (self.positions < 0) & (self.table >= 0)
            free = free[:, :, : self.filled]
            slots = free.to(torch.uint8).argmax(2, keepdim=True)
        self.free_slots = [free_slots - 1 for free_slots in self.free_slots]
        return slots

    def write(
        self, slots: Tensor | None, key: Tensor, value: Tensor, position: int, arrival: float
    ) -> None:
        assert slots is not None, "heads of different lengths have no last slot in common"
        self.positions.scatter_(2, slots, position)
        if self.scores is not None:
            self.scores.scatter_(2, slots, arrival)
        entry = self.table.gather(2, slots).flatten()
        self.keys[entry] = key.flatten(0, 2)
        self.values[entry] = value.flatten(0, 2)

    def _add_slot(self) -> None:
        """Give every head of every row one more slot."""
        if self.filled == self.table.shape[2]:
            self._grow()
        batch, heads, _ = self.table.shape
        count = batch * heads
        if self.entries + count > self.keys.shape[0]:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_empty(roomy(self.entries + count), old.shape[1])
                new[: self.entries] = old[: self.entries]
                setattr(self, name, new)
        added = torch.arange(self.entries, self.entries + count, device=self.table.device)
        self.table[:, :, self.filled] = added.view(batch, heads)
        self.positions[:, :, self.filled] = -1
        # A slot may stay empty in some rows, and what is read there must be finite.
        self.keys[self.entries : self.entries + count] = 0
        self.values[self.entries : self.entries + count] = 0
        self.entries += count
        self.filled += 1
        self.free_slots = [free + 1 for free in self.free_slots]

    def _grow(self) -> None:
        """Make room for more slots in the table, positions and scores."""
        capacity = roomy(self.filled)
        for name, empty in (("table", -1), ("positions", -1), ("scores", 0)):
            old = getattr(self, name)
            if old is not None:
                new = old.new_full((*old.shape[:2], capacity), empty)
                new[:, :, : self.filled] = old[:, :, : self.filled]
                setattr(self, name, new)

    def select(self, rows: Tensor) -> None:
        table = self.table.index_select(0, rows)
        owned = table >= 0
        keys, values = self.keys[table[owned]], self.values[table[owned]]
        self.entries = len(keys)
        self.table = torch.where(owned, owned.flatten().cumsum(0).view_as(table) - 1, -1)
        self.keys = keys.new_empty(roomy(self.entries), keys.shape[1])
        self.values = values.new_empty(roomy(self.entries), values.shape[1])
        self.keys[: self.entries], self.values[: self.entries] = keys, values
        self._select_rows(rows, ("positions", "scores", "next_free_slot"))
