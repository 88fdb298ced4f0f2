"""Where the keys of one layer lie: one buffer, allocated ahead, and the bookkeeping that says what
is in which slot.

Softmax attention does not care about the order of its keys, and their positions are baked in by the
rotary embedding. So a layer keeps its keys in the order that makes reading cheap, `[far | core |
rest ... growing]`: an ordinary decode step reads a suffix of the buffer, a view, without mask,
gather or copy; a whole step reads everything; a new core is swapped into place (segments.py). A key
that is dropped leaves a hole, and the next token's key fills it. Image keys may also lie in a
quantised tier (quantized_tier.py), outside the buffer; a whole step reads them in front of it.

The rows of a batch may hold different numbers of keys. Then some slots are empty (position -1) and
attention needs a mask, made from the positions themselves; `ragged` says, without looking at a
tensor, when there is nothing to mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from avl.quantized_tier import ColdTier


class KeyBuffer:
    """Keys and values of one layer. It knows neither policies nor transformers, and decides
    nothing.

    Attributes:
        keys, values: buffers of shape (batch, key/value heads, capacity, head dim).
        positions: (batch, heads, capacity) int32 sequence index of each slot, -1 if empty; heads is
            1 while all key/value heads hold the same keys.
        scores: (batch, heads, capacity) float32 worth of each key when one must go, or None.
        worth: (batch, far) what the keys in `far` were worth when last ranked, kept only if they
            may be dropped.
        far: width of the first segment; `filled` the slots in use.
        missing, holes: empty slots per row in `far` (in front), and behind it (anywhere).
        free: (batch, heads, 1) an empty slot behind `far` of every row, where known; else None.
        cores: slots (start, stop) of the core of each row; `core_heads` is 1 if all key/value heads
            share it.
        cold: image keys outside the buffer, or None; `held_cold` their number per row.
        few: image keys a sparse whole step attends to, per row.
        reference: (batch, heads, largest core) what core keys were worth when they were chosen, or
            None.
        whole: whether the next step reads everything or only what follows `far`.
        evictable: number of keys in `rest` that may be dropped, per row; `share` what the policy
            wants to know.
    """

    def __init__(self) -> None:
        self.keys: Any = None
        self.values: Any = None
        self.positions: Any = None
        self.scores: Any = None
        self.worth: Any = None
        self.far = self.filled = 0
        self.missing: list[int] = []
        self.holes: list[int] = []
        self.free: Tensor | None = None
        self.cores: list[tuple[int, int]] = []
        self.core_heads = 1
        self.cold: ColdTier | None = None
        self.held_cold: list[int] = []
        self.few: list[int] = []
        self.reference: Any = None
        self.whole = True
        self.evictable: list[int] = []
        self.share: list[float] = []

    # -- reading -----------------------------------------------------------------------------------

    @property
    def front(self) -> int:
        """First slot that holds anything."""
        return min(self.missing)

    @property
    def first(self) -> int:
        """First slot that the current step reads."""
        return self.front if self.whole else self.far

    @property
    def cold_width(self) -> int:
        """Slots of the cold tier."""
        return 0 if self.cold is None else self.cold.width

    @property
    def stored(self) -> int:
        """Slots in all: of the cold tier and of the buffer."""
        return self.cold_width + self.filled

    @property
    def before_rest(self) -> int:
        """Slots the current step reads in front of the core."""
        return self.cold_width + self.far - self.first if self.whole else 0

    @property
    def ragged(self) -> bool:
        """Whether any slot the current step reads is empty in some row."""
        uneven = len(set(self.missing)) > 1 or any(n < self.cold_width for n in self.held_cold)
        return any(self.holes) or (self.whole and uneven)

    def attended(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the current step, (batch, key/value heads, keys, head dim); views
        without a cold tier.
        """
        return self.read_from(self.first, self.whole)

    def attended_positions(self) -> Tensor:
        """(batch, heads, keys) sequence index of what `attended` returns, -1 for empty slots."""
        return self._positions_from(self.first, self.whole)

    def stored_positions(self) -> Tensor:
        """(batch, heads, keys) sequence index of everything held, -1 for empty slots."""
        return self._positions_from(0, True)

    def read_from(self, first: int, cold: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of the buffer from slot `first` on, behind those of the cold tier if
        wanted.
        """
        near = self.keys[:, :, first : self.filled], self.values[:, :, first : self.filled]
        if self.cold is None or not cold:
            return near
        keys, values = self.cold.read()
        return torch.cat([keys, near[0]], 2), torch.cat([values, near[1]], 2)

    def _positions_from(self, first: int, cold: bool) -> Tensor:
        near = self.positions[:, :, first : self.filled]
        if self.cold is None or not cold:
            return near
        heads = max(near.shape[1], self.cold.positions.shape[1])
        return torch.cat([part.expand(-1, heads, -1) for part in (self.cold.positions, near)], 2)

    def held(self) -> list[int]:
        """Keys each row holds (per key/value head)."""
        return [near + cold for near, cold in zip(self.held_near(), self.held_cold, strict=True)]

    def held_near(self) -> list[int]:
        """Keys each row holds in the buffer (per key/value head)."""
        return [self.filled - a - b for a, b in zip(self.missing, self.holes, strict=True)]

    def reads(self) -> list[int]:
        """Keys each row attends to at the current step."""
        return (
            self.held() if self.whole else [self.filled - self.far - holes for holes in self.holes]
        )

    def image_slots(self) -> Tensor:
        """(batch, 1, keys) bool: which slots that a whole step reads may hold cold, far or core
        keys.
        """
        offset = self.cold_width - self.front
        start, stop = torch.tensor(self.cores, device=self.keys.device).T[..., None, None] + offset
        slot = torch.arange(self.stored - self.front, device=self.keys.device)
        return (slot < self.far + offset) | ((slot >= start) & (slot < stop))

    def core_positions(self) -> Tensor:
        """(batch, heads, most) positions of each row's core, -1 in front where a row has fewer."""
        if len(set(self.cores)) == 1:
            return self.positions[:, : self.core_heads, slice(*self.cores[0])].clone()
        index = self._core_slots()[:, None].expand(-1, self.core_heads, -1)
        return (
            self.positions[:, : self.core_heads]
            .gather(2, index.clamp_min(0))
            .masked_fill(index < 0, -1)
        )

    def core_now_and_then(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """What core keys were worth when they were chosen, and what they are worth now; 0 where a
        row has fewer.

        Args:
            scores: (batch, 1 or heads, keys) of what an ordinary step reads.
        """
        index = self._core_slots()[:, None].expand(-1, scores.shape[1], -1)
        now = scores.gather(2, (index - self.far).clamp_min(0)).masked_fill(index < 0, 0.0)
        return self.reference, now

    def _core_slots(self) -> Tensor:
        """(batch, most) slots of each row's core, -1 in front where a row has fewer."""
        width = max(stop - start for start, stop in self.cores)
        slots = [
            [-1] * (width - stop + start) + list(range(start, stop)) for start, stop in self.cores
        ]
        return torch.tensor(slots, device=self.keys.device).long().view(len(slots), width)

    def far_held(self, row: int) -> int:
        """Keys a row holds in `far`."""
        return self.far - self.missing[row]

    # -- one key more, one key less ----------------------------------------------------------------

    def append(self, key: Tensor, value: Tensor, position: int, arrival: float) -> None:
        """Write one new key and value per row into a hole, or behind the last slot where a row has
        none.

        Args:
            key, value: (batch, key/value heads, 1, head dim).
            position: sequence index of the token; `arrival` the score its key starts with.
        """
        column = min(self.holes) == 0
        if column:
            if self.filled == self.keys.shape[2]:
                self._grow()
            self.filled += 1
        last = self.filled - 1
        if column and not any(self.holes):
            self.keys.narrow(2, last, 1).copy_(key)
            self.values.narrow(2, last, 1).copy_(value)
            self.positions.select(2, last).fill_(position)
            if self.scores is not None:
                self.scores.select(2, last).fill_(arrival)
            return
        if column:
            for tensor in (self.keys, self.values):
                tensor[:, :, last] = 0  # stays empty in some rows, and must be finite there
            self.positions[:, :, last] = -1
            if self.scores is not None:
                self.scores[:, :, last] = 0
        slot, self.free = self.free, None
        if slot is None:
            slot = self.far + (self.positions[:, :, self.far : self.filled] < 0).to(
                torch.uint8
            ).argmax(2, keepdim=True)
        self.positions.scatter_(2, slot, position)
        if self.scores is not None:
            self.scores.scatter_(2, slot, arrival)
        self.keys.scatter_(2, slot[..., None].expand_as(key), key)
        self.values.scatter_(2, slot[..., None].expand_as(value), value)
        self.holes = [holes + column - 1 for holes in self.holes]

    def evict(self, rows: Sequence[bool], newest: Tensor | int) -> Tensor:
        """Drop the worst-scored key of some rows, one per head.

        Args:
            rows: which rows of the batch.
            newest: keys at this position or later are safe; a number, or (batch, 1, 1).

        Returns:
            (batch, heads, 1) int32 positions dropped, -1 for none.
        """
        positions = self.positions[:, :, self.far : self.filled]
        scores = self.scores[:, :, self.far : self.filled]
        largest = torch.finfo(
            scores.dtype
        ).max  # protected keys go only when nothing else is left, empty slots never
        worst = scores.clamp_max(largest).masked_fill_(
            (positions >= newest) | (positions < 0), torch.inf
        )
        worst = worst.argmin(2, keepdim=True)
        dropped = positions.gather(2, worst)
        if all(rows):
            positions.scatter_(2, worst, -1)
            self.free = worst + self.far
        else:
            self.free = None
            chosen = torch.tensor(list(rows), device=worst.device)[:, None, None]
            positions.scatter_(2, worst, torch.where(chosen, -1, dropped))
            dropped = dropped.masked_fill(~chosen, -1)
        self.holes = [holes + bool(row) for holes, row in zip(self.holes, rows, strict=True)]
        self.evictable = [
            count - bool(row) for count, row in zip(self.evictable, rows, strict=True)
        ]
        return dropped

    def drop_far(self, row: int) -> Tensor:
        """Drop the worst key of a row's `far`, as last ranked; returns its position, (1, 1)."""
        missing = self.missing[row]
        worst = int(self.worth[row, missing : self.far].argmin()) + missing
        dropped = self.positions[row, :1, worst : worst + 1].clone()
        for tensor in (
            self.keys[row],
            self.values[row],
            self.positions[row],
            self.worth[None, row],
        ):
            tensor[:, worst] = tensor[:, missing]
        self.positions[row, :, missing] = -1
        self.missing[row] += 1
        return dropped

    def select(self, rows: Tensor) -> None:
        """Row i of the batch now is what was row rows[i]."""
        for name in ("keys", "values", "positions", "scores", "worth", "reference", "free"):
            old = getattr(self, name)
            setattr(self, name, None if old is None else old.index_select(0, rows))
        if self.cold is not None:
            self.cold.select(rows)
        order = rows.tolist()
        for name in ("cores", "evictable", "share", "few", "missing", "holes", "held_cold"):
            setattr(self, name, [getattr(self, name)[i] for i in order])

    def _grow(self) -> None:
        """Move to buffers with room for more, leaving empty slots in front behind."""
        front = self.front
        capacity = roomy(self.filled - front)
        for name in ("keys", "values", "positions", "scores"):
            old = getattr(self, name)
            if old is not None:
                new = old.new_empty(*old.shape[:2], capacity, *old.shape[3:])
                new[:, :, : self.filled - front] = old[:, :, front : self.filled]
                setattr(self, name, new)
        self.worth = None if self.worth is None else self.worth[:, front:].contiguous()
        self.far, self.filled = self.far - front, self.filled - front
        self.cores = [(start - front, stop - front) for start, stop in self.cores]
        self.missing = [missing - front for missing in self.missing]


def roomy(filled: int) -> int:
    """Slots to allocate for `filled` keys: 1/16 more, at least 64."""
    return filled + max(64, filled // 16)
