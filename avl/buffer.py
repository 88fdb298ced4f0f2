"""The keys and values of one layer: one buffer, allocated ahead, and what lies in which slot.

Softmax attention does not depend on the order of its keys, and their positions are baked in by the
rotary embedding. So a layer keeps its keys in the order that makes reading cheap, `[secondary |
core | always attended ... growing]`: an ordinary decode step reads a suffix of the buffer, a view,
without mask, gather or copy; a refresh step reads everything. A new core is swapped into place
(segments.py). A key that is dropped leaves a free slot, which the next token's key takes. Keys may
also lie in a quantised tier (quantized_tier.py), outside the buffer; a refresh step reads them in
front of it.

The rows of a batch may hold different numbers of keys. Then some slots are empty (position -1), and
attention needs a mask, made from the positions; `ragged` says, without looking at a tensor, when
there is nothing to mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avl.kernels.row_attention import NewKey, SlotAttention
from avl.kernels.slots import drop_worst
from avl.kernels.tables import SlotTable
from avl.key_pages import KeyPages
from avl.policies.base import Choice
from avl.quantized_tier import QuantizedTier, Storage
from avl.selection import members


class BufferSizes(NamedTuple):
    """What a buffer holds.

    Attributes:
        held: keys of each row (per key/value head).
        in_use: bytes of keys and values in use on the model's device.
        allocated: bytes of the key and value buffers there.
        host: bytes of keys and values in host memory beside another device.
        by_row: bytes of keys and values that each row holds, wherever they lie.
        bookkeeping: bytes of positions and scores.
        position: bytes of one position's keys and values in all rows and heads.
        coded: whether some keys are held in few bits.
    """

    held: list[int]
    in_use: int
    allocated: int
    host: int
    by_row: list[float]
    bookkeeping: int
    position: int
    coded: bool = False


class _FixedBytes(NamedTuple):
    """Bytes that change only when a tensor is replaced.

    Attributes:
        position, allocated, host, bookkeeping, coded: as in `BufferSizes`.
        beside: bytes on the model's device that stand for keys and values outside the buffer: of
            the quantised tier and of the bounds of pages.
        beside_by_row: bytes of each row outside the buffer, wherever they lie.
    """

    position: int
    allocated: int
    beside: int
    beside_by_row: list[float]
    host: int
    bookkeeping: int
    coded: bool


@dataclass(eq=False, kw_only=True)
class KeyBuffer:
    """Keys and values of one layer, as a policy's choice left them. Made by `from_choice`.

    It decides nothing and knows nothing of models.

    Attributes:
        keys: (batch, key/value heads, capacity, head dim).
        values: (batch, key/value heads, capacity, head dim).
        positions: (batch, heads, capacity) int32 sequence index of each slot, -1 if empty; heads is
            1 while all key/value heads hold the same keys.
        scores: (batch, heads, capacity) float32 worth of each key when one must go, or None.
        secondary_width: slots of the first segment.
        filled: slots in use, from the first on.
        padding_slots: empty slots per row in the secondary segment; they stand in front.
        free_slots: empty slots per row behind the secondary segment, anywhere.
        pages: bounds of the keys page by page, where steps read some pages only; else None.
        next_free_slot: (batch, heads, 1) an empty slot behind the secondary segment in every row,
            where known; else None.
        core_spans: first slot of the core of each row, and the slot behind its last.
        secondary_scores: (batch, secondary) worth of the secondary keys when last ranked, kept only
            if they may be dropped.
        core_scores_at_refresh: (batch, 1, largest core) importance of the core's keys when they
            were chosen, or None.
        quantized: keys outside the buffer, or None.
        quantized_held: their number per row.
        storage: how the tier stores keys, as in `Choice`.
        sparse_budget: image keys a sparse refresh attends to, per row.
        evictable: number of always attended keys that may be dropped, per row.
        budget_share: what the policy wants to be told of each row when asked for its limit.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None
    secondary_width: int
    filled: int
    padding_slots: list[int]
    free_slots: list[int]
    core_spans: list[tuple[int, int]]
    secondary_scores: Tensor | None
    core_scores_at_refresh: Tensor | None
    quantized: QuantizedTier | None
    quantized_held: list[int]
    storage: Storage
    sparse_budget: list[int]
    budget_share: list[float]
    evictable: list[int] = field(default_factory=list)
    pages: KeyPages | None = None
    next_free_slot: Tensor | None = None
    # Asked once, and again when a tensor was replaced.
    _fixed_bytes: _FixedBytes | None = field(default=None, init=False)
    _slot_table: SlotTable | None = field(default=None, init=False)

    @classmethod
    def from_choice(
        cls, keys: Tensor, values: Tensor, positions: Tensor, choice: Choice, heads: int
    ) -> KeyBuffer:
        """Hold what a policy chose, and nothing else.

        Args:
            keys: (batch, key/value heads, n, head dim), all there are.
            values: (batch, key/value heads, n, head dim).
            positions: (batch, 1 or heads, n) sequence index of each key, -1 for none.
            choice: index sets into the n keys.
            heads: 1 if all key/value heads will always hold the same keys, else their number.
        """
        secondary = choice.secondary
        if secondary is None:
            secondary = choice.always_attended[0][..., :0]
        core = [] if choice.core is None else [choice.core]
        # One set with all empty entries in front, so that a row's core and its always attended keys
        # lie behind one another and `core_spans` can say where the core is.
        segments = [secondary, *_padding_in_front([*core, *choice.always_attended])]
        secondary_width = secondary.shape[2]
        filled = sum(index.shape[2] for index in segments)
        batch, capacity = keys.shape[0], roomy(filled)
        buffer = cls(
            keys=keys.new_empty(*keys.shape[:2], capacity, keys.shape[3]),
            values=values.new_empty(*values.shape[:2], capacity, values.shape[3]),
            # int32 is enough for sequence indices and halves the bookkeeping that is reported
            # beside the bytes.
            positions=torch.full(
                (batch, heads, capacity), -1, dtype=torch.int32, device=keys.device
            ),
            scores=None
            if choice.scores is None
            else torch.zeros(batch, heads, capacity, device=keys.device),
            secondary_width=secondary_width,
            filled=filled,
            padding_slots=[],
            free_slots=[],
            core_spans=[],
            secondary_scores=_scores_at(choice.secondary_scores, secondary),
            core_scores_at_refresh=_core_scores(choice),
            quantized=None,
            quantized_held=[0] * batch,
            storage=choice.storage,
            sparse_budget=list(choice.sparse_budget) or [0] * batch,
            budget_share=list(choice.budget_share) or [1.0] * batch,
        )
        buffer._copy_segments(keys, values, positions, segments, choice.scores)
        # Counted once, on the host: from here on the numbers are kept up to date as Python
        # integers, so that no decode step has to wait for a device to know whether there is
        # anything to mask.
        empty = buffer.positions[:, 0, :filled] < 0
        buffer.padding_slots = empty[:, :secondary_width].sum(1).tolist()
        buffer.free_slots = empty[:, secondary_width:].sum(1).tolist()
        # Behind the secondary segment every row starts with its empty slots; then comes its core.
        cores = [0] * batch if choice.core is None else (choice.core[:, 0] >= 0).sum(1).tolist()
        starts = [secondary_width + free for free in buffer.free_slots]
        buffer.core_spans = [(a, a + n) for a, n in zip(starts, cores, strict=True)]
        if choice.quantized is not None and choice.quantized.shape[2]:
            # Keys in full precision count among those that share limits, too: a key that is later
            # exchanged with the tier then finds the limits it would have had.
            images = [index for index in (choice.secondary, choice.core) if index is not None]
            buffer.quantized = QuantizedTier.hold(
                choice.storage, keys, values, positions, choice.quantized, images
            )
            buffer.quantized_held = buffer.quantized.held()
        if choice.page_size:
            slots = slice(0, filled)
            buffer.pages = KeyPages.of(
                buffer.keys[:, :, slots], buffer.positions[:, :, slots], choice.page_size
            )
        buffer.evictable = list(choice.evictable) or buffer.held()
        return buffer

    def _copy_segments(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        segments: Sequence[Tensor],
        scores: Tensor | None,
    ) -> None:
        """Copy the keys at some index sets into the slots, one set behind the other."""
        heads, start = self.positions.shape[1], 0
        for index in segments:
            slots = slice(start, start + index.shape[2])
            start = slots.stop
            _take(keys, index, self.keys[:, :, slots])
            _take(values, index, self.values[:, :, slots])
            # (batch, 1, n) as long as neither the choice nor the positions differ between heads;
            # assigning it to (batch, heads, slots) repeats it.
            shared = max(index.shape[1], positions.shape[1]) == 1
            entries = index.clamp_min(0).expand(-1, 1 if shared else heads, -1)
            taken = positions.expand(-1, entries.shape[1], -1).gather(2, entries)
            self.positions[:, :, slots] = taken.masked_fill(index < 0, -1)
            if self.scores is not None and scores is not None:
                self.scores[:, :, slots] = scores.expand(-1, heads, -1).gather(
                    2, entries.expand(-1, heads, -1)
                )

    def __getstate__(self) -> dict[str, Any]:
        """Attributes for a copy, whose tensors lie elsewhere than the table says."""
        return {**vars(self), "_slot_table": None}

    # -- reading -----------------------------------------------------------------------------------

    @property
    def slot_table(self) -> SlotTable:
        """The buffer's tensors as kernels take them."""
        if self._slot_table is None:
            self._slot_table = SlotTable(self.keys, self.values, self.positions, self.scores)
        return self._slot_table

    @property
    def first_used_slot(self) -> int:
        """First slot that holds anything in some row."""
        return min(self.padding_slots)

    @property
    def quantized_width(self) -> int:
        """Slots of the quantised tier."""
        return 0 if self.quantized is None else self.quantized.width

    @property
    def has_secondary(self) -> bool:
        """Whether there are slots that an ordinary step does not read."""
        return self.secondary_width > 0 or self.quantized is not None

    @property
    def stored(self) -> int:
        """Slots in all: of the quantised tier and of the buffer."""
        return self.quantized_width + self.filled

    def first_slot_read(self, refresh: bool) -> int:
        """First slot of the buffer that a step reads."""
        return self.first_used_slot if refresh else self.secondary_width

    def slots_read(self, refresh: bool) -> int:
        """Keys that `attended` returns."""
        width = self.quantized_width if refresh and self.coded_tier(refresh) is None else 0
        return width + self.filled - self.first_slot_read(refresh)

    def slots_before_core(self, refresh: bool) -> int:
        """Slots that a step reads in front of the core: quantised and secondary ones."""
        if not refresh:
            return 0
        return self.quantized_width + self.secondary_width - self.first_used_slot

    def ragged(self, refresh: bool) -> bool:
        """Whether any slot that a step reads is empty in some row."""
        # Padding that all rows share is not read at all (`first_used_slot`); only what one row has
        # and another has not must be masked.
        return any(self.free_slots) or (refresh and self._padded)

    @property
    def _padded(self) -> bool:
        """Whether a slot that only refreshes read is empty in some row."""
        width = self.quantized_width
        uneven = len(self.padding_slots) > 1 and len(set(self.padding_slots)) > 1
        return uneven or (width > 0 and min(self.quantized_held) < width)

    def coded_tier(self, refresh: bool) -> QuantizedTier | None:
        """The tier of codes that a step attends to without decoding it, None if there is none."""
        tier = self.quantized
        return tier if refresh and tier is not None and tier.bits is not None else None

    def attended(self, *, refresh: bool) -> tuple[Tensor, Tensor]:
        """Keys and values that a step reads, (batch, key/value heads, keys, head dim).

        Views where nothing is held in host memory.

        Those of a `coded_tier`, which would come first, are left out.

        Args:
            refresh: whether the step reads everything held, or the core and what is always
                attended.
        """
        first, coded = self.first_slot_read(refresh), self.coded_tier(refresh) is not None
        return self._read_from(first, refresh and not coded)

    def decoded(self, *, refresh: bool) -> tuple[Tensor, Tensor]:
        """`attended` with the keys and values of a `coded_tier`, which come first."""
        return self._read_from(self.first_slot_read(refresh), refresh)

    def attended_positions(self, *, refresh: bool) -> Tensor:
        """(batch, heads, keys) sequence index of what a step reads.

        A tier's keys come first; -1 stands for empty slots.
        """
        return self._positions_from(self.first_slot_read(refresh), refresh)

    def everything(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, (batch, key/value heads, `stored`, head dim)."""
        return self._read_from(0, True)

    def stored_positions(self) -> Tensor:
        """(batch, heads, `stored`) sequence index of everything held, -1 for empty slots."""
        return self._positions_from(0, True)

    def _read_from(self, first: int, quantized: bool) -> tuple[Tensor, Tensor]:
        """Keys and values from a slot on, behind those of the quantised tier if wanted."""
        count = self.filled - first
        keys, values = self.keys.narrow(2, first, count), self.values.narrow(2, first, count)
        if self.quantized is None or not quantized:
            return keys, values
        decoded_keys, decoded_values = self.quantized.read()
        return torch.cat([decoded_keys, keys], 2), torch.cat([decoded_values, values], 2)

    def _positions_from(self, first: int, quantized: bool) -> Tensor:
        positions = self.positions[:, :, first : self.filled]
        if self.quantized is None or not quantized:
            return positions
        parts = (self.quantized.positions, positions)
        heads = max(part.shape[1] for part in parts)
        return torch.cat([part.expand(-1, heads, -1) for part in parts], 2)

    def held(self) -> list[int]:
        """Keys each row holds (per key/value head)."""
        pairs = zip(self.held_in_buffer(), self.quantized_held, strict=True)
        return [buffer + quantized for buffer, quantized in pairs]

    def held_in_buffer(self) -> list[int]:
        """Keys each row holds outside the quantised tier (per key/value head)."""
        pairs = zip(self.padding_slots, self.free_slots, strict=True)
        return [self.filled - padding - free for padding, free in pairs]

    def reads(self, *, refresh: bool) -> list[int]:
        """Keys each row attends to at a step."""
        if refresh:
            return self.held()
        return [self.filled - self.secondary_width - free for free in self.free_slots]

    def image_slots(self) -> Tensor:
        """Which slots that a refresh reads may hold quantised, secondary or core keys.

        (batch, 1, keys) bool.
        """
        # Slot numbers of the buffer become numbers among what a refresh reads.
        offset = self.quantized_width - self.first_used_slot
        # (2, batch, 1, 1), so that start and stop compare with slot numbers row by row.
        spans = torch.tensor(self.core_spans, device=self.keys.device).T[..., None, None]
        start, stop = spans + offset
        slot = torch.arange(self.stored - self.first_used_slot, device=self.keys.device)
        return (slot < self.secondary_width + offset) | ((slot >= start) & (slot < stop))

    def core_positions(self) -> Tensor:
        """(batch, 1, most) positions of each row's core, -1 in front where a row has fewer."""
        if len(set(self.core_spans)) == 1:
            return self.positions[:, :1, slice(*self.core_spans[0])].clone()
        index = self._core_slots()[:, None]
        positions = self.positions[:, :1].gather(2, index.clamp_min(0))
        return positions.masked_fill(index < 0, -1)

    def core_scores_now(self, scores: Tensor) -> Tensor:
        """(batch, 1, most) scores of each row's core, 0 in front where a row has fewer.

        Args:
            scores: (batch, 1, keys) of what an ordinary step reads.
        """
        index = self._core_slots()[:, None]
        # An ordinary step reads from `secondary_width` on, so its columns are slot numbers less
        # that.
        inside = (index - self.secondary_width).clamp_min(0)
        return scores.gather(2, inside).masked_fill(index < 0, 0.0)

    def _core_slots(self) -> Tensor:
        """(batch, most) slots of each row's core, -1 in front where a row has fewer."""
        width = max(stop - start for start, stop in self.core_spans)
        slots = [
            [-1] * (width - (stop - start)) + list(range(start, stop))
            for start, stop in self.core_spans
        ]
        return torch.tensor(slots, device=self.keys.device).long().view(len(slots), width)

    def secondary_held(self, row: int) -> int:
        """Keys a row holds in the secondary segment."""
        return self.secondary_width - self.padding_slots[row]

    def read_slots(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values in some slots, copied out, and their positions.

        Args:
            mask: (batch, key/value heads, slots) bool, which of the slots in use.

        Returns:
            Keys and values (batch, key/value heads, most, head dim) and positions (batch, key/value
            heads, most), -1 in front where a head reads fewer.
        """
        # Heads read different numbers of keys; the copy is as wide as the longest and -1 marks the
        # rest.
        index = members(mask, int(mask.sum(-1).amax()))
        positions = self.positions[:, :, : self.filled].expand(-1, mask.shape[1], -1)
        positions = positions.gather(2, index.clamp_min(0)).masked_fill(index < 0, -1)
        copies = []
        for tensor in (self.keys, self.values):
            copy = tensor.new_empty(*index.shape, tensor.shape[3])
            _take(tensor[:, :, : self.filled], index, copy)
            copies.append(copy)
        return copies[0], copies[1], positions

    # -- bytes -------------------------------------------------------------------------------------

    def sizes(self) -> BufferSizes:
        """Keys held and bytes, all at once."""
        return self.sizes_later()()

    def sizes_later(self) -> Callable[[], BufferSizes]:
        """A function that works out the present `sizes` when it is called.

        The sizes of most steps are never asked for.
        """
        # Only the numbers of slots in use change as long as the tensors stay: asking every tensor
        # at every step takes longer than an attention call. Pages are added all the time.
        if self._fixed_bytes is None or self.pages is not None:
            self._fixed_bytes = self._count_bytes()
        # Slots in front that no row uses are allocated but hold nothing; they go when the buffer
        # grows.
        slots = self.filled - self.first_used_slot
        return partial(_sizes, self.held_in_buffer(), self.quantized_held, slots, self._fixed_bytes)

    def _count_bytes(self) -> _FixedBytes:
        """Ask every tensor."""
        tier, pages, rows = self.quantized, self.pages, len(self.free_slots)
        of_pages = 0 if pages is None else pages.nbytes
        by_row = [of_pages / rows] * rows
        beside, host = of_pages, 0
        if tier is not None:
            beside += tier.nbytes(host=False)
            host = tier.nbytes(host=True)
            in_tier = tier.bytes_by_row(self.quantized_held)
            by_row = [a + b for a, b in zip(by_row, in_tier, strict=True)]
        in_buffer = self.keys.nbytes + self.values.nbytes
        return _FixedBytes(
            position=in_buffer // self.keys.shape[2],
            allocated=in_buffer + beside,
            beside=beside,
            beside_by_row=by_row,
            host=host,
            bookkeeping=sum(tensor.nbytes for tensor in self.bookkeeping()),
            coded=tier is not None and tier.bits is not None,
        )

    def bytes_allocated(self) -> int:
        """Bytes of keys and values on the model's device.

        Empty slots, the tier and the bounds of pages are included.
        """
        return self.sizes().allocated

    def tensors(self) -> list[Tensor]:
        """Everything that is held: keys and values in any form, and what is kept about them."""
        beside = [] if self.quantized is None else self.quantized.tensors()
        pages = [] if self.pages is None else [self.pages.low, self.pages.high]
        return [self.keys, self.values, *beside, *pages, *self.bookkeeping()]

    def bookkeeping(self) -> list[Tensor]:
        """Everything kept about the keys: positions, scores and numbers of groups."""
        tensors = [
            self.positions,
            self.scores,
            self.secondary_scores,
            self.core_scores_at_refresh,
        ]
        if self.quantized is not None:
            tier = self.quantized
            tensors += [tier.positions, tier.groups, tier.image]
        return [tensor for tensor in tensors if tensor is not None]

    # -- one key more, one key less ----------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor, position: int, arrival: float) -> None:
        """Write one new key and value per row into a free slot.

        Where a row has none, behind the last slot.

        Args:
            key: (batch, key/value heads, 1, head dim).
            value: (batch, key/value heads, 1, head dim).
            position: sequence index of the token.
            arrival: score its key starts with.
        """
        self.write(self.reserve(), key, value, position, arrival)

    def reserve(self) -> Tensor | None:
        """Take a slot in every row for one new key, which must be written before slots are read.

        Returns:
            (batch, heads, 1) int64 slots; None: the last slot, in every row and head.
        """
        # One row without a free slot is enough: all rows get one more, and rows that had one keep
        # it.
        extend = min(self.free_slots) == 0
        if extend:
            if self.filled == self.keys.shape[2]:
                self._grow()
            self.filled += 1
        # The usual step: no row has a free slot, so every row writes to the same, last one.
        if extend and not any(self.free_slots):
            return None
        if extend:
            self._clear_last()
        slots, self.next_free_slot = self.next_free_slot, None
        if slots is None:
            empty = self.positions[:, :, self.secondary_width : self.filled] < 0
            # argmax of equal numbers gives the first
            slots = self.secondary_width + empty.to(torch.uint8).argmax(2, keepdim=True)
        # A slot was added to every row if the buffer was extended, and one taken in every row.
        self.free_slots = [free + extend - 1 for free in self.free_slots]
        return slots

    def write(
        self, slots: Tensor | None, key: Tensor, value: Tensor, position: int, arrival: float
    ) -> None:
        """Write one new key and value per row into the slots that were reserved for them.

        Args:
            slots: as of `reserve`.
            key: (batch, key/value heads, 1, head dim).
            value: (batch, key/value heads, 1, head dim).
            position: sequence index of the token.
            arrival: score its key starts with.
        """
        # The bounds of a page are taken over keys as they arrive; a page is never evicted from.
        if self.pages is not None:
            self.pages.add(key, position)
        if slots is None:
            last = self.filled - 1
            self.keys.narrow(2, last, 1).copy_(key)
            self.values.narrow(2, last, 1).copy_(value)
            self.positions.select(2, last).fill_(position)
            if self.scores is not None:
                self.scores.select(2, last).fill_(arrival)
            return
        self.positions.scatter_(2, slots, position)
        if self.scores is not None:
            self.scores.scatter_(2, slots, arrival)
        self.keys.scatter_(2, slots[..., None].expand_as(key), key)
        self.values.scatter_(2, slots[..., None].expand_as(value), value)

    def slot_attention(
        self,
        slots: Tensor | None,
        position: int,
        arrival: float,
        *,
        refresh: bool,
        accumulate: bool,
        weights_wanted: bool,
    ) -> SlotAttention | None:
        """`write`, and attention over what a step then reads, in one compiled call.

        Args:
            slots: as of `reserve`.
            position: sequence index of the token.
            arrival: score its key starts with.
            refresh: as in `attended`.
            accumulate: whether the weights of always attended and core keys are added to their
                scores.
            weights_wanted: whether weights are returned.

        Returns:
            What is to be called; None where it takes more than one call: empty slots among those
            that are read, pages, a tier that is not coded, scores for several heads in one, and
            where there is no compiled version.
        """
        table, tier = self.slot_table, self.quantized if refresh else None
        if self.pages is not None or not table.compiled or self.ragged(refresh):
            return None
        if (tier is not None and tier.bits is None) or (accumulate and not table.by_head):
            return None
        return SlotAttention(
            table,
            (self.first_slot_read(refresh), self.filled),
            None if tier is None else tier.codes(),
            NewKey(position, arrival, self.filled - 1, slots),
            scored=self.secondary_width if accumulate else None,
            weights_wanted=weights_wanted,
        )

    def _clear_last(self) -> None:
        """Make the last slot of every row empty: zero, as what is read there must be finite."""
        last = self.filled - 1
        self.keys[:, :, last] = 0
        self.values[:, :, last] = 0
        self.positions[:, :, last] = -1
        if self.scores is not None:
            self.scores[:, :, last] = 0

    def evict(self, rows: Sequence[bool], newest: Tensor | int) -> Tensor:
        """Drop the worst-scored always attended key of some rows, one per head.

        Args:
            rows: which rows of the batch.
            newest: keys at this position or later are safe; a number, or (batch, 1, 1).

        Returns:
            (batch, heads, 1) int32 positions dropped, -1 for none.
        """
        assert self.scores is not None
        slots, dropped = drop_worst(self.slot_table, self.secondary_width, self.filled, newest)
        self.next_free_slot = slots
        if not all(rows):
            self.next_free_slot = None
            wanted = torch.tensor(list(rows), device=slots.device)[:, None, None]
            # Rows that had nothing to drop get back what was taken.
            self.positions.scatter_(2, slots, torch.where(wanted, -1, dropped))
            dropped = dropped.masked_fill(~wanted, -1)
        counts = [int(row) for row in rows]
        self.free_slots = [free + n for free, n in zip(self.free_slots, counts, strict=True)]
        self.evictable = [keys - n for keys, n in zip(self.evictable, counts, strict=True)]
        return dropped

    def drop_secondary(self, row: int) -> Tensor:
        """Drop the worst secondary key of a row, as last ranked; returns its position, (1, 1)."""
        assert self.secondary_scores is not None
        first = self.padding_slots[row]
        scores = self.secondary_scores[row, first : self.secondary_width]
        worst = int(scores.argmin()) + first
        dropped = self.positions[row, :1, worst : worst + 1].clone()
        # The first key moves into the slot of the worst, so that empty slots stay in front.
        # (1, secondary), a view: writing to it below changes `secondary_scores`.
        row_scores = self.secondary_scores[None, row]
        for tensor in (self.keys[row], self.values[row], self.positions[row], row_scores):
            tensor[:, worst] = tensor[:, first]
        self.positions[row, :, first] = -1
        # Now one more slot in front is empty; the core and all behind it did not move.
        self.padding_slots[row] += 1
        return dropped

    def quantize_oldest(self, rows: Sequence[bool], count: int) -> None:
        """Move the oldest keys of some rows from the buffer to the quantised tier.

        Args:
            rows: which rows of the batch; the others get empty places in the tier.
            count: keys per row, no more than it holds in the buffer.
        """
        positions = self.positions[:, :, : self.filled]
        # The position of a token is its age; empty slots must not look oldest.
        age = positions.masked_fill(positions < 0, torch.iinfo(torch.int32).max)
        # In slot order, as `hold` expects indices; all of a block share one group.
        slots = age.topk(count, dim=-1, largest=False).indices.sort(-1).values
        wanted = torch.tensor(list(rows), device=slots.device)[:, None, None]
        index = torch.where(wanted, slots, -1)
        keys, values = self.keys[:, :, : self.filled], self.values[:, :, : self.filled]
        self._fixed_bytes = None
        # A block has limits of its own: limits of earlier blocks must not change, or their codes
        # would mean other numbers.
        block = QuantizedTier.hold(self.storage, keys, values, positions, index, [])
        if self.quantized is None:
            self.quantized = block
        else:
            self.quantized.append(block)
        # The slots stay where they are and become free; the next tokens' keys take them.
        positions.scatter_(2, slots, torch.where(wanted, -1, positions.gather(2, slots)))
        self.next_free_slot = None
        moved = [count * bool(row) for row in rows]
        self.free_slots = [free + n for free, n in zip(self.free_slots, moved, strict=True)]
        self.quantized_held = [held + n for held, n in zip(self.quantized_held, moved, strict=True)]

    def select(self, rows: Tensor) -> None:
        """Row i of the batch now is what was row rows[i]."""
        self._select_rows(rows, _TENSORS)
        if self.quantized is not None:
            self.quantized.select(rows)
        if self.pages is not None:
            self.pages.select(rows)

    def _select_rows(self, rows: Tensor, names: Sequence[str]) -> None:
        """Take rows of some tensors, and of everything that has one number per row."""
        self._fixed_bytes = self._slot_table = None
        for name in names:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.index_select(0, rows))
        order = rows.tolist()
        for name in _LISTS:
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in order])

    def _grow(self) -> None:
        """Move to buffers with room for more, leaving behind slots in front that no row uses."""
        # Everything that counts slots moves by `front`: widths, spans and padding, below.
        front = self.first_used_slot
        self._fixed_bytes = self._slot_table = None
        capacity = roomy(self.filled - front)
        for name in ("keys", "values", "positions", "scores"):
            old = getattr(self, name)
            if old is not None:
                new = old.new_empty(*old.shape[:2], capacity, *old.shape[3:])
                new[:, :, : self.filled - front] = old[:, :, front : self.filled]
                setattr(self, name, new)
        if self.secondary_scores is not None:
            self.secondary_scores = self.secondary_scores[:, front:].contiguous()
        self.secondary_width -= front
        self.filled -= front
        self.core_spans = [(start - front, stop - front) for start, stop in self.core_spans]
        self.padding_slots = [padding - front for padding in self.padding_slots]


_TENSORS = (
    "keys",
    "values",
    "positions",
    "scores",
    "secondary_scores",
    "core_scores_at_refresh",
    "next_free_slot",
)
_LISTS = (
    "core_spans",
    "evictable",
    "budget_share",
    "sparse_budget",
    "padding_slots",
    "free_slots",
    "quantized_held",
)


def roomy(filled: int) -> int:
    """Slots to allocate for `filled` keys: 1/16 more, at least 64."""
    return filled + max(64, filled // 16)


def _sizes(in_buffer: list[int], in_tier: list[int], slots: int, fixed: _FixedBytes) -> BufferSizes:
    """Sizes of a buffer.

    Args:
        in_buffer: keys each row holds in the buffer.
        in_tier: keys each row holds in the quantised tier.
        slots: of the buffer, in use.
        fixed: the buffer's.
    """
    each = fixed.position / len(in_buffer)
    by_row = zip(in_buffer, fixed.beside_by_row, strict=True)
    return BufferSizes(
        held=[a + b for a, b in zip(in_buffer, in_tier, strict=True)],
        in_use=slots * fixed.position + fixed.beside,
        allocated=fixed.allocated,
        host=fixed.host,
        by_row=[count * each + beside for count, beside in by_row],
        bookkeeping=fixed.bookkeeping,
        position=fixed.position,
        coded=fixed.coded,
    )


def _scores_at(scores: Tensor | None, index: Tensor) -> Tensor | None:
    """(batch, n) scores of the keys at an index set that all heads share."""
    if scores is None:
        return None
    return scores[:, 0].gather(1, index[:, 0].clamp_min(0)).float()


def _core_scores(choice: Choice) -> Tensor | None:
    """(batch, 1, core) importance of the core's keys, 0 where a row has fewer."""
    if choice.core_scores is None or choice.core is None:
        return None
    scores = choice.core_scores.gather(2, choice.core.clamp_min(0))
    return scores.masked_fill(choice.core < 0, 0.0)


def _padding_in_front(index_sets: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same index sets; if any row has empty entries, joined to one with all -1 in front."""
    if not any(bool((index < 0).any()) for index in index_sets):
        return index_sets
    heads = max(index.shape[1] for index in index_sets)
    joined = torch.cat([index.expand(-1, heads, -1) for index in index_sets], 2)
    # Stable, so that the entries that are there keep their order: core first, then the others.
    joined = joined.gather(2, (joined >= 0).to(torch.uint8).argsort(dim=2, stable=True))
    # Columns that are empty in every row and head are cut off.
    return [joined[..., int((joined < 0).sum(2).amin()) :]]


def _take(source: Tensor, index: Tensor, out: Tensor) -> None:
    """out[b, h, i] = source[b, h, index[b, h, i]]; any finite value where the index is negative.

    Args:
        source: (batch, heads, keys, width).
        index: (batch, 1 or heads, n).
        out: (batch, heads, n, width), written to.
    """
    index = index.clamp_min(0)
    if index.shape[1] == 1:
        # One index for all heads: index_select copies whole rows of the head dimension, many times
        # faster than gathering element by element.
        for row, entries in enumerate(index[:, 0]):
            torch.index_select(source[row], 1, entries, out=out[row])
        return
    b = torch.arange(source.shape[0], device=source.device)[:, None, None]
    h = torch.arange(source.shape[1], device=source.device)[None, :, None]
    out.copy_(source[b, h, index])
