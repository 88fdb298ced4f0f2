"""One layer of a KV cache whose keys come and go: a `transformers` cache layer with our own bookkeeping.

Softmax attention does not care about the order of its keys, and their positions are baked in by the rotary embedding.
So a layer keeps its keys in the order that makes reading cheap, `[far | core | rest ... growing]`, in one buffer that
is allocated ahead: an ordinary decode step reads a suffix of it, a view, without mask, gather or copy; a whole step
reads everything; a new core is swapped into place. A key that is dropped leaves a hole, and the next token's key fills
it. Image keys may also lie in a cold tier (cold.py), outside the buffer; a whole step reads them in front of it.

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
from avl.cold import ColdTier
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
        cores: slots (start, stop) of the core of each row; `core_heads` is 1 if all key/value heads share it.
        cold: image keys outside the buffer, or None; `held_cold` their number per row.
        few: image keys a sparse whole step attends to, per row.
        reference: (batch, heads, largest core) what core keys were worth when they were chosen, or None.
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
        self.core_heads = 1
        self.cold: ColdTier | None = None
        self.few: list[int] = []
        self.reference: Any = None
        self.whole = True
        self.widths = (0, 0, 0)
        self.evictable: list[int] = []
        self.share: list[float] = []
        self._missing: list[int] = []  # empty slots per row in front of far
        self._holes: list[int] = []  # empty slots per row behind far
        self.held_cold: list[int] = []

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
            held_keys, held_values = self._from(0, True)
            return torch.cat([held_keys, key_states], 2), torch.cat([held_values, value_states], 2)
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
        for name in ("worth", "reference"):
            old = getattr(self, name)
            setattr(self, name, None if old is None else old.index_select(0, rows))
        order = rows.tolist()
        if self.cold is not None:
            self.cold.select(rows)
        for name in ("cores", "evictable", "share", "few", "_missing", "_holes", "held_cold"):
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
        uneven = len(set(self._missing)) > 1 or any(n < self.cold_width for n in self.held_cold)
        return any(self._holes) or (self.whole and uneven)

    def attended(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the current step, (batch, key/value heads, keys, head dim); views without a cold tier."""
        return self._from(self.first, self.whole)

    def attended_positions(self) -> Tensor:
        """(batch, heads, keys) sequence index of what `attended` returns, -1 for empty slots."""
        return self._positions_from(self.first, self.whole)

    def stored_positions(self) -> Tensor:
        """(batch, heads, keys) sequence index of everything held, -1 for empty slots."""
        return self._positions_from(0, True)

    def _from(self, first: int, cold: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of the buffer from slot `first` on, behind those of the cold tier if wanted."""
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
        return [self.filled - a - b for a, b in zip(self._missing, self._holes, strict=True)]

    def reads(self) -> list[int]:
        """Keys each row attends to at the current step."""
        return self.held() if self.whole else [self.filled - self.far - holes for holes in self._holes]

    def image_slots(self) -> Tensor:
        """(batch, 1, keys) bool: which slots that a whole step reads may hold cold, far or core keys."""
        offset = self.cold_width - self.front
        start, stop = torch.tensor(self.cores, device=self.device).T[..., None, None] + offset
        slot = torch.arange(self.stored - self.front, device=self.device)
        return (slot < self.far + offset) | ((slot >= start) & (slot < stop))

    def core_positions(self) -> Tensor:
        """(batch, heads, most) positions of each row's core, -1 in front where a row has fewer."""
        if len(set(self.cores)) == 1:
            return self.positions[:, : self.core_heads, slice(*self.cores[0])].clone()
        index = self._core_slots()[:, None].expand(-1, self.core_heads, -1)
        return self.positions[:, : self.core_heads].gather(2, index.clamp_min(0)).masked_fill(index < 0, -1)

    def core_now_and_then(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """What core keys were worth when they were chosen, and what they are worth now; 0 where a row has fewer.

        Args:
            scores: (batch, 1 or heads, keys) of what an ordinary step reads.
        """
        index = self._core_slots()[:, None].expand(-1, scores.shape[1], -1)
        now = scores.gather(2, (index - self.far).clamp_min(0)).masked_fill(index < 0, 0.0)
        return self.reference, now

    def _core_slots(self) -> Tensor:
        """(batch, most) slots of each row's core, -1 in front where a row has fewer."""
        width = max(stop - start for start, stop in self.cores)
        slots = [[-1] * (width - stop + start) + list(range(start, stop)) for start, stop in self.cores]
        return torch.tensor(slots, device=self.device).long().view(len(slots), width)

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
        self.core_heads = 1 if choice.core is None else choice.core.shape[1]
        self.cold, self.held_cold = None, [0] * batch
        if choice.cold is not None and choice.cold.shape[2]:
            image = [part for part in (choice.far, choice.core) if part is not None]
            self.cold = ColdTier.hold(choice.kind, keys, values, positions, choice.cold, image)
            self.held_cold = self.cold.held()
        self.few = list(choice.few) or [0] * batch
        self.reference = None
        if choice.reference is not None and choice.core is not None:
            at = choice.core
            self.reference = choice.reference.gather(2, at.clamp_min(0)).masked_fill(at < 0, 0.0)
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

    def recore(self, scores: Tensor, rows: Sequence[bool] | None = None) -> None:
        """Exchange image keys so that the best are core, the next `far` and the others cold.

        Args:
            scores: (batch, 1 or heads, keys), one for every slot a whole step reads, all of them.
            rows: which rows of the batch; None: all.
        """
        for row in range(len(self.cores)):
            if rows is None or rows[row]:
                for head in range(scores.shape[1]):
                    which = slice(None) if scores.shape[1] == 1 else slice(head, head + 1)
                    self._recore(row, which, scores[row, head])

    def _recore(self, row: int, head: slice, seen: Tensor) -> None:
        missing, (start, stop) = self._missing[row], self.cores[row]
        near = seen[self.cold_width :]
        far, core = near[missing - self.front : self.far - self.front], near[start - self.front : stop - self.front]
        if self.cold is not None:
            far, core = self._warm(row, head, seen[self.cold_width - self.held_cold[row] : self.cold_width], far, core)
        best = _best(torch.cat([far, core]), len(core))
        enter = best[: len(far)].nonzero()[:, 0] + missing
        leave = (~best[len(far) :]).nonzero()[:, 0] + start
        _exchange((self.keys[row, head], self.values[row, head], self.positions[row, head]), enter, leave)
        if self.worth is not None:
            self.worth[row, missing : self.far] = far
            self.worth[row, enter] = core[leave - start]
        if self.reference is not None:
            core = core.index_copy(0, leave - start, far[enter - missing])
            heads = self.reference[row] if head.start is None else self.reference[row, head]
            heads[..., self.reference.shape[2] - len(core) :] = core

    def _warm(self, row: int, head: slice, cold: Tensor, far: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange keys with the cold tier so that the best are in the buffer; returns the scores of far and core."""
        assert self.cold is not None
        held = torch.cat([far, core])
        best = _best(torch.cat([cold, held]), len(held))
        enter, leave = best[: len(cold)].nonzero()[:, 0], (~best[len(cold) :]).nonzero()[:, 0]
        if not len(enter):
            return far, core
        slots = torch.cat(
            [torch.arange(self._missing[row], self.far), torch.arange(*self.cores[row])],
        ).to(leave.device)[leave]
        places = enter + self.cold_width - self.held_cold[row]
        keys, values = self.cold.take(row, head, places)
        positions = self.cold.positions[row, head].index_select(1, places)
        buffers = (self.keys[row, head], self.values[row, head], self.positions[row, head])
        self.cold.put(row, head, places, *(tensor.index_select(1, slots) for tensor in buffers))
        for tensor, new in zip(buffers, (keys, values, positions), strict=True):
            tensor.index_copy_(1, slots, new.expand(tensor.shape[0], *new.shape[1:]))
        held = held.index_copy(0, leave, cold[enter])
        return held[: len(far)], held[len(far) :]

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


def _best(scores: Tensor, count: int) -> Tensor:
    """(n,) bool: the `count` largest of some scores."""
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, scores.topk(count).indices, True)


def _exchange(tensors: Sequence[Tensor], one: Tensor, other: Tensor) -> None:
    """Swap slots one[i] and other[i] of every head of contiguous (heads, slots, ...) tensors, in place.

    As rows of one long list: on CPU indices into a middle dimension are followed number by number, these row by row.
    """
    heads, slots = tensors[0].shape[:2]
    first = torch.arange(0, heads * slots, slots, device=one.device)[:, None]
    there, here = first + torch.cat([one, other]), first + torch.cat([other, one])
    for tensor in tensors:
        rows, count = tensor.view(-1, *tensor.shape[2:]), tensor.shape[0]
        rows.index_copy_(0, there[:count].flatten(), rows.index_select(0, here[:count].flatten()))


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
