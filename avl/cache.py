"""One layer of a KV cache whose keys come and go: a `transformers` cache layer with our own bookkeeping.

Softmax attention does not care about the order of its keys, and their positions are baked in by the rotary embedding.
So a layer keeps its keys in the order that makes reading cheap, `[far | core | rest ... growing]`, in one buffer that
is allocated ahead: an ordinary decode step reads a suffix of it, a view, without mask, gather or copy; a whole step
reads everything; a new core is swapped into place. A key that is dropped leaves a hole, and the next token's key fills
it.

The rows of a batch may hold different numbers of keys. Then some slots are empty (position -1) and attention needs a
mask, made from the positions themselves; `ragged` says, without looking at a tensor, when there is nothing to mask.

The layer does not know policies, and decides nothing. What surprises: `get_seq_length` reports tokens *seen*, because
that is what positions are computed from; the number held is `held()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from avl.attention import Forward
from avl.policies.base import Choice, Counts
from avl.seam import SeamError


@dataclass(eq=False)
class Conversation:
    """What the layers of one cache have in common.

    Attributes:
        forward: the pass that is running; None outside passes and once the policy has left the model.
        counts: true tokens of each row of the batch, the running pass included.
        arrival: score with which a new key starts.
        rows: which original row each row of the batch continues, where rows have been rearranged; `moved` says that
            they have been since the last pass.
        layers: layers of the cache that are ours, by index.
    """

    forward: Forward | None = None
    counts: list[Counts] = field(default_factory=list)
    arrival: float = 0.0
    rows: Tensor | None = None
    moved: Tensor | None = None
    layers: dict[int, AdaptiveLayer] = field(default_factory=dict)

    def take_rows(self, rows: Tensor) -> None:
        """Row i of the batch now continues what was row rows[i]."""
        self.rows = rows if self.rows is None else self.rows[rows]
        self.moved = rows if self.moved is None else self.moved[rows]
        if len(set(self.counts)) > 1 or len(rows) != len(self.counts):
            self.counts = [self.counts[i] for i in rows.tolist()]


class AdaptiveLayer(CacheLayerMixin):
    """Keys and values of one layer.

    Attributes:
        keys, values: buffers of shape (batch, key/value heads, capacity, head dim).
        positions: (batch, heads, capacity) int32 sequence index of each slot, -1 if empty; heads is 1 while all
            key/value heads hold the same keys.
        scores: (batch, heads, capacity) float32 worth of each key when one must go, or None.
        worth: (batch, far) what the keys in `far` were worth when last ranked, kept only if they may be dropped.
        far: width of the first segment; `filled` the slots in use.
        cores: slots (start, stop) of the core of each row.
        widths: heads, key width and value width of what the model caches.
        whole: whether the next step reads everything or only what follows `far`.
        evictable: number of keys in `rest` that may be dropped, per row; `share` what the policy wants to know.
        seen: tokens that passed this layer, padding included.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, conversation: Conversation, index: int) -> None:
        super().__init__()
        self.conversation = conversation
        self.index = index
        conversation.layers[index] = self
        self.keys: Any = None
        self.values: Any = None
        self.positions: Any = None
        self.scores: Any = None
        self.worth: Any = None
        self.far = self.filled = self.seen = 0
        self.cores: list[tuple[int, int]] = []
        self.whole = True
        self.widths = (0, 0, 0)
        self.evictable: list[int] = []
        self.share: list[float] = []
        self._missing: list[int] = []  # empty slots per row in front of far
        self._holes: list[int] = []  # empty slots per row behind far

    # -- what transformers asks -------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new keys and values; returns what this pass attends to, held keys first."""
        forward = self.conversation.forward
        if forward is None:
            raise SeamError(
                "this KV cache was filled under a policy that is no longer on the model; continue it inside the same "
                "`with avl.adaptive(...)` block, or start with an empty cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.widths = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        self.seen = forward.start + forward.tokens
        if forward.kind == "decode":
            self._append(key_states.detach(), value_states.detach(), forward.start)
            return self.attended()
        if self.filled:
            key_states = torch.cat([self.keys[:, :, : self.filled], key_states], 2)
            value_states = torch.cat([self.values[:, :, : self.filled], value_states], 2)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks of transformers cover the new tokens only; what is held is masked by us, layer by layer."""
        return query_length, self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.__init__(self.conversation, self.index)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise SeamError(
                "a cache that drops keys cannot be cropped: what was dropped for a token cannot be brought back. "
                "Assisted and speculative decoding need the full cache: generate without assistant or without policy"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._take_rows(torch.arange(self.keys.shape[0], device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._take_rows(torch.arange(self.keys.shape[0], device=self.device)[indices.to(self.device)])

    def _take_rows(self, rows: Tensor) -> None:
        if self.positions is None:
            return
        rows = rows.to(self.keys.device)
        if self.index == min(self.conversation.layers):
            self.conversation.take_rows(rows)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.positions = self.positions.index_select(0, rows)
        self.scores = None if self.scores is None else self.scores.index_select(0, rows)
        self.worth = None if self.worth is None else self.worth.index_select(0, rows)
        order = rows.tolist()
        for name in ("cores", "evictable", "share", "_missing", "_holes"):
            setattr(self, name, [getattr(self, name)[i] for i in order])

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def front(self) -> int:
        """First slot that holds anything."""
        return min(self._missing)

    @property
    def first(self) -> int:
        """First slot that the current step reads."""
        return self.front if self.whole else self.far

    @property
    def ragged(self) -> bool:
        """Whether any slot the current step reads is empty in some row."""
        return any(self._holes) or (self.whole and len(set(self._missing)) > 1)

    def attended(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the current step, (batch, key/value heads, keys, head dim); views."""
        return self.keys[:, :, self.first : self.filled], self.values[:, :, self.first : self.filled]

    def attended_positions(self) -> Tensor:
        """(batch, heads, keys) sequence index of what `attended` returns, -1 for empty slots."""
        return self.positions[:, :, self.first : self.filled]

    def held(self) -> list[int]:
        """Keys each row holds (per key/value head)."""
        return [self.filled - a - b for a, b in zip(self._missing, self._holes, strict=True)]

    def reads(self) -> list[int]:
        """Keys each row attends to at the current step."""
        return self.held() if self.whole else [self.filled - self.far - holes for holes in self._holes]

    def core_positions(self) -> Tensor:
        """(batch, 1, most) positions of each row's core, -1 in front where a row has fewer."""
        width = max(stop - start for start, stop in self.cores)
        slots = [[-1] * (width - stop + start) + list(range(start, stop)) for start, stop in self.cores]
        index = torch.tensor(slots, device=self.device).long()
        return self.positions[:, 0].gather(1, index.clamp_min(0)).masked_fill(index < 0, -1)[:, None]

    # -- writing ----------------------------------------------------------------------------------------------------

    def fill(self, keys: Tensor, values: Tensor, positions: Tensor, choice: Choice, heads: int) -> None:
        """Hold the chosen ones of `keys`, (batch, key/value heads, n, head dim), and nothing else.

        Args:
            positions: (batch, 1 or heads, n) of `keys`.
            heads: 1 if all key/value heads will always hold the same keys, else their number.
        """
        far = choice.far if choice.far is not None else choice.rest[0][..., :0]
        near = _compact([part for part in (choice.core, *choice.rest) if part is not None])
        self.far = far.shape[2]
        self.filled = self.far + sum(part.shape[2] for part in near)
        batch, capacity = keys.shape[0], self._roomy(self.filled)
        self.keys = keys.new_empty(*keys.shape[:2], capacity, keys.shape[3])
        self.values = values.new_empty(*values.shape[:2], capacity, values.shape[3])
        self.positions = torch.full((batch, heads, capacity), -1, dtype=torch.int32, device=keys.device)
        self.scores = None if choice.scores is None else torch.zeros(batch, heads, capacity, device=keys.device)
        start = 0
        for part in (far, *near):
            to = slice(start, start + part.shape[2])
            start = to.stop
            _take(keys, part, self.keys[:, :, to])
            _take(values, part, self.values[:, :, to])
            shared = max(part.shape[1], positions.shape[1]) == 1
            at = part.clamp_min(0).expand(-1, 1 if shared else heads, -1)
            self.positions[:, :, to] = positions.expand(-1, at.shape[1], -1).gather(2, at).masked_fill(part < 0, -1)
            if choice.scores is not None:
                self.scores[:, :, to] = choice.scores.expand(-1, heads, -1).gather(2, at.expand(-1, heads, -1))
        empty = self.positions[:, 0, : self.filled] < 0
        self._missing = empty[:, : self.far].sum(1).tolist()
        self._holes = empty[:, self.far :].sum(1).tolist()
        self.worth = None
        if choice.worth is not None:
            self.worth = choice.worth[:, 0].gather(1, far[:, 0].clamp_min(0)).float()
        sizes = [0] * batch if choice.core is None else (choice.core[:, 0] >= 0).sum(1).tolist()
        self.cores = [(self.far + a, self.far + a + n) for a, n in zip(self._holes, sizes, strict=True)]
        self.evictable = list(choice.evictable) or self.held()
        self.share = list(choice.share) or [1.0] * batch

    def _append(self, key: Tensor, value: Tensor, position: int) -> None:
        """Write one new key and value per row into a hole, or behind the last slot where a row has none."""
        column = min(self._holes) == 0
        if column:
            if self.filled == self.keys.shape[2]:
                self._grow()
            self.filled += 1
        last = self.filled - 1
        if column and not any(self._holes):
            self.keys[:, :, last] = key[:, :, 0]
            self.values[:, :, last] = value[:, :, 0]
            self.positions[:, :, last] = position
            if self.scores is not None:
                self.scores[:, :, last] = self.conversation.arrival
            return
        if column:
            for tensor in (self.keys, self.values):
                tensor[:, :, last] = 0  # stays empty in some rows, and must be finite there
            self.positions[:, :, last] = -1
            if self.scores is not None:
                self.scores[:, :, last] = 0
        slot = self.far + (self.positions[:, :, self.far : self.filled] < 0).to(torch.uint8).argmax(2, keepdim=True)
        self.positions.scatter_(2, slot, position)
        if self.scores is not None:
            self.scores.scatter_(2, slot, self.conversation.arrival)
        batch, heads = self.keys.shape[:2]
        b = torch.arange(batch, device=self.device)[:, None]
        h = torch.arange(heads, device=self.device)[None, :]
        at = slot[..., 0].expand(batch, heads)
        self.keys[b, h, at] = key[:, :, 0]
        self.values[b, h, at] = value[:, :, 0]
        self._holes = [holes + column - 1 for holes in self._holes]

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
        largest = torch.finfo(scores.dtype).max  # protected keys go only when nothing else is left, empty slots never
        worst = scores.clamp_max(largest).masked_fill_((positions >= newest) | (positions < 0), torch.inf)
        worst = worst.argmin(2, keepdim=True)
        dropped = positions.gather(2, worst)
        if all(rows):
            positions.scatter_(2, worst, -1)
        else:
            chosen = torch.tensor(list(rows), device=worst.device)[:, None, None]
            positions.scatter_(2, worst, torch.where(chosen, -1, dropped))
            dropped = dropped.masked_fill(~chosen, -1)
        self._holes = [holes + bool(row) for holes, row in zip(self._holes, rows, strict=True)]
        self.evictable = [count - bool(row) for count, row in zip(self.evictable, rows, strict=True)]
        return dropped

    def recore(self, scores: Tensor) -> None:
        """Exchange keys between `far` and core so that the best image keys are core.

        Args:
            scores: (batch, keys), one for every slot the step has read, all of them.
        """
        for row, (start, stop) in enumerate(self.cores):
            missing, seen = self._missing[row], scores[row]
            far = seen[missing - self.front : self.far - self.front]
            order = torch.cat([far, seen[start - self.front : stop - self.front]]).topk(stop - start).indices
            best = torch.zeros(len(far) + stop - start, dtype=torch.bool, device=scores.device)
            best[order] = True
            enter = best[: len(far)].nonzero()[:, 0] + missing
            leave = (~best[len(far) :]).nonzero()[:, 0] + start
            for tensor in (self.keys[row], self.values[row], self.positions[row]):
                old = tensor.index_select(1, enter)
                tensor.index_copy_(1, enter, tensor.index_select(1, leave))
                tensor.index_copy_(1, leave, old)
            if self.worth is not None:
                self.worth[row, missing : self.far] = far
                self.worth[row, enter] = seen[leave - self.front]

    def drop_far(self, row: int) -> Tensor:
        """Drop the worst key of a row's `far`, as last ranked; returns its position, (1, 1)."""
        missing = self._missing[row]
        worst = int(self.worth[row, missing : self.far].argmin()) + missing
        dropped = self.positions[row, :1, worst : worst + 1].clone()
        for tensor in (self.keys[row], self.values[row], self.positions[row], self.worth[None, row]):
            tensor[:, worst] = tensor[:, missing]
        self.positions[row, :, missing] = -1
        self._missing[row] += 1
        return dropped

    def far_held(self, row: int) -> int:
        """Keys a row holds in `far`."""
        return self.far - self._missing[row]

    def _grow(self) -> None:
        """Move to buffers with room for more, leaving empty slots in front behind."""
        front = self.front
        capacity = self._roomy(self.filled - front)
        for name in ("keys", "values", "positions", "scores"):
            old = getattr(self, name)
            if old is not None:
                new = old.new_empty(*old.shape[:2], capacity, *old.shape[3:])
                new[:, :, : self.filled - front] = old[:, :, front : self.filled]
                setattr(self, name, new)
        self.worth = None if self.worth is None else self.worth[:, front:].contiguous()
        self.far, self.filled = self.far - front, self.filled - front
        self.cores = [(start - front, stop - front) for start, stop in self.cores]
        self._missing = [missing - front for missing in self._missing]

    @staticmethod
    def _roomy(filled: int) -> int:
        """Slots to allocate for `filled` keys: 1/16 more, at least 64."""
        return filled + max(64, filled // 16)


def _compact(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same index sets, joined with all -1 in front if any row has some."""
    if not any(bool((part < 0).any()) for part in parts):
        return parts
    heads = max(part.shape[1] for part in parts)
    index = torch.cat([part.expand(-1, heads, -1) for part in parts], 2)
    index = index.gather(2, (index >= 0).to(torch.uint8).argsort(dim=2, stable=True))
    return [index[..., int((index < 0).sum(2).amin()) :]]


def _take(source: Tensor, index: Tensor, out: Tensor) -> None:
    """out[b, h, i] = source[b, h, index[b, h, i]], index (batch, 1 or heads, n); any finite value where index < 0."""
    index = index.clamp_min(0)
    if index.shape[1] == 1:
        for row, at in enumerate(index[:, 0]):
            torch.index_select(source[row], 1, at, out=out[row])
        return
    b = torch.arange(source.shape[0], device=source.device)[:, None, None]
    h = torch.arange(source.shape[1], device=source.device)[None, :, None]
    out.copy_(source[b, h, index])
