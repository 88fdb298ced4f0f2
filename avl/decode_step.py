"""A decode step under a policy: what each layer reads, and what the weights change afterwards.

Attention of the one new row is computed here, because its weights feed the next choice. A step may
be taken once more: over everything held where the core turns out to be outdated, or over the best
keys only where a policy is sparse. Changes to what was read (a new core, older text, minor keys)
wait for the end of the pass, so that a recorder sees what was attended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from avl import segments
from avl.attention import (
    Attend,
    AttentionCall,
    Forward,
    attend_one_row,
    attend_with,
    for_query_heads,
    row_logits,
)
from avl.buffer import KeyBuffer
from avl.cache import AdaptiveLayer, Conversation
from avl.families import UnsupportedModelError
from avl.kernels.row_attention import SlotAttention, gradients_wanted
from avl.policies.base import CoredPolicy, PagedPolicy, Policy
from avl.quantized_tier import QuantizedTier
from avl.selection import SelectionLog, best
from avl.tokens import Modality

QUANTIZED_BLOCK = 32
"""Keys that are quantised at once while decoding, and share the limits of a channel (KIVI, arXiv
2402.02750).
"""


@dataclass(slots=True)
class _Ready:
    """A layer whose step is the usual one.

    Attributes:
        attention: writes the new key and attends.
        all_keys, key_positions: of the call afterwards.
        accumulates: whether attention adds weights to the scores of keys.
    """

    attention: SlotAttention
    all_keys: Callable[[], tuple[Tensor, Tensor]]
    key_positions: Callable[[], Tensor]
    accumulates: bool


class DecodeStep:
    """One pass of one new token per row.

    Attributes:
        selection_log: told what each layer attends to, takes in and drops.
        reads: keys each row attended to, by layer.
    """

    def __init__(
        self,
        policy: Policy,
        conversation: Conversation,
        forward: Forward,
        selection_log: SelectionLog,
    ) -> None:
        self.policy = policy
        self.cored = policy if isinstance(policy, CoredPolicy) else None
        self.conversation = conversation
        self.forward = forward
        self.selection_log = selection_log
        self.reads: dict[int, list[int]] = {}
        self._weights: dict[int, Tensor] = {}  # to add to the scores of keys, by layer
        # Asked once for all layers.
        self._sparse = self.cored is not None and self.cored.sparse
        self._ranks_anew = self.cored is not None and (self.cored.rotates or self.cored.sparse)
        self._accumulates = policy.accumulates
        self._prepared = False
        self._slots: dict[int, Tensor | None] = {}  # where new keys are written, by layer
        self._ready: dict[int, _Ready] = {}  # layers whose step is the usual one
        self._slots_before_core: dict[int, int] = {}  # of the keys these weights are for
        self._to_rank: dict[int, Tensor] = {}  # weights by which the core is chosen anew
        self._sparse_core: dict[int, Tensor] = {}  # positions a sparse step attended to
        self._drifted_rows: dict[int, list[bool]] = {}  # rows whose core was outdated
        # What layers mostly have in common: most evictable keys of each row by its shares of the
        # budget, and the position from which on keys are safe by these limits.
        self._limits: dict[tuple[float, ...], list[int | None]] = {}
        self._thresholds: dict[tuple[int, ...], Tensor | int] = {}

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        """Attention over what the layer hands out: once, or once more over other keys.

        Args:
            call: of the layer, with the keys its cache gave.
            inner: the model's own attention, for layers that are not adapted.

        Returns:
            (batch, 1, query heads, head dim).
        """
        layer = self.conversation.layers.get(call.layer)
        if layer is None:
            return inner(call)
        if not self._prepared:
            self._prepare()
        refresh, logits = self.conversation.is_refresh, None
        found = self._attend_at_once(call, layer)
        if found is not None and found[1] is None:
            return found[0]  # the weights are not needed
        # Whether weights were added in one with attention.
        accumulated = found is not None and self._ready[call.layer].accumulates
        buffer = layer.filled_buffer
        if found is None:
            self._append(call, layer)
            if buffer.pages is not None:
                return self._attend_pages(call, layer)
            # `ragged` is known from numbers on the host: without empty slots nothing waits for the
            # device, and no mask is built.
            hidden, tier = None, buffer.coded_tier(refresh)
            if buffer.ragged(refresh):
                hidden = buffer.attended_positions(refresh=refresh) < 0
            positions = partial(buffer.attended_positions, refresh=refresh)
            # Only a sparse step reads the same keys twice, and keeps their products for that.
            logits = row_logits(call, tier) if self._sparse else None
            found = self._read(call, positions, hidden, logits, tier)
        output, weights = found
        assert weights is not None
        # The step is taken once more for outdated rows only; the others get the same result again,
        # as the keys they have not read before are hidden from them.
        rows = None if refresh else self._drifted(buffer, weights)
        if rows is not None:
            refresh = True
            output, weights, logits = self._refresh(call, layer, rows)
        if refresh and self._ranks_keys(buffer):
            self._to_rank[layer.index] = weights.detach()
            if self._sparse and logits is not None:
                tier = buffer.coded_tier(True)
                output, weights = self._narrow(call, layer, logits, tier)
        if self._accumulates and buffer.scores is not None and not accumulated:
            self._weights[layer.index] = weights.detach()
            self._slots_before_core[layer.index] = buffer.slots_before_core(refresh)
        return output

    def _prepare(self) -> None:
        """Take a slot in each layer for the new token, and prepare the attention of the usual step.

        All layers at once, before the first attends: done one by one between the layers' own work,
        it takes several times as long.
        """
        self._prepared, refresh = True, self.conversation.is_refresh
        position, arrival = self.forward.start, self.conversation.arrival
        for index, layer in self.conversation.layers.items():
            if not layer.hands_over:
                continue
            buffer = layer.filled_buffer
            self._slots[index] = slots = buffer.reserve()
            if self._sparse:  # reads the same keys twice
                continue
            # A step that may be taken once more adds the weights of the last time only.
            drifts = not refresh and self._watches_drift(buffer)
            accumulate = self._accumulates and buffer.scores is not None and not drifts
            attention = buffer.slot_attention(
                slots,
                position,
                arrival,
                refresh=refresh,
                accumulate=accumulate,
                weights_wanted=drifts or (refresh and self._ranks_keys(buffer)),
            )
            if attention is None:
                continue
            positions = partial(buffer.attended_positions, refresh=refresh)
            self._ready[index] = _Ready(
                attention,
                partial(buffer.decoded, refresh=refresh),
                partial(_without_heads, positions),
                accumulate,
            )

    def _attend_at_once(
        self, call: AttentionCall, layer: AdaptiveLayer
    ) -> tuple[Tensor, Tensor | None] | None:
        """The usual step: the new key is written and the row attends, in one compiled call.

        Returns:
            Output and weights, as of `attend_with`, None for weights that are not needed; None, and
            nothing was done, where it takes more than that.
        """
        ready, key, value = self._ready.get(call.layer), call.key, call.value
        if ready is None or not call.plain or not layer.returned(key, value):
            return None
        dtype = layer.dtype
        if key.dtype != dtype or value.dtype != dtype or gradients_wanted(call.query, key, value):
            return None
        output, weights = ready.attention(call.query, call.scaling, key, value)
        call.all_keys, call.key_positions, call.mask = ready.all_keys, ready.key_positions, None
        return output if dtype == output.dtype else output.to(dtype), weights

    def _append(self, call: AttentionCall, layer: AdaptiveLayer) -> None:
        """Have the call's keys be what the layer reads, its own new one included.

        Raises:
            UnsupportedModelError: the model attends to other keys than its cache returned.
        """
        buffer, refresh = layer.filled_buffer, self.conversation.is_refresh
        # Keys of a tier of codes are attended to where they are stored and are not in `call.key`.
        returned = 1 if layer.hands_over else buffer.slots_read(refresh)
        changed = layer.hands_over and not layer.returned(call.key, call.value)
        if changed or call.key.shape[2] != returned:
            raise UnsupportedModelError(
                f"layer {call.layer} attends to {call.key.shape[2]} keys that are not the"
                f" {returned} its cache returned; models that change keys behind the cache cannot"
                " be adapted"
            )
        if layer.hands_over:
            new = call.key.detach(), call.value.detach()
            slots, arrival = self._slots[layer.index], self.conversation.arrival
            buffer.write(slots, *new, self.forward.start, arrival)
            # The new key was written first: a row always attends to its own token.
            call.key, call.value = buffer.attended(refresh=refresh)

    def _ranks_keys(self, buffer: KeyBuffer) -> bool:
        """Whether a refresh ranks the image keys of a buffer anew."""
        return self._ranks_anew and buffer.has_secondary

    def _watches_drift(self, buffer: KeyBuffer) -> bool:
        """Whether an ordinary step may find the core of a buffer outdated."""
        return buffer.core_scores_at_refresh is not None and buffer.has_secondary

    def _read(
        self,
        call: AttentionCall,
        positions: Callable[[], Tensor],
        hidden: Tensor | None,
        logits: Tensor | None,
        tier: QuantizedTier | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of one row.

        Args:
            call: with the keys to read, but for those of the tier.
            positions: returns (batch, heads, keys) of all keys, the tier's first.
            hidden: (batch, heads, keys) bool, keys that are not attended; None: all are.
            logits: of all keys, as of `row_logits`, where they are known.
            tier: keys that are attended to as they are stored, or None.

        Returns:
            Output and weights, as of `attend_with`.
        """
        call.all_keys = None if tier is None else partial(_joined, tier, call.key, call.value)
        call.key_positions = partial(_without_heads, positions)
        call.mask = None if hidden is None else for_query_heads(~hidden, call)[:, :, None]
        if logits is None:
            return attend_one_row(call, hidden, tier)
        return attend_with(call, logits, hidden, tier)

    def _attend_pages(self, call: AttentionCall, layer: AdaptiveLayer) -> Tensor:
        """Attention over each row's newest page and the best others that its limit allows."""
        buffer = layer.filled_buffer
        pages = buffer.pages
        assert pages is not None
        assert isinstance(self.policy, PagedPolicy)
        page = pages.page_of(buffer.positions[:, :, : buffer.filled])
        # (batch, key/value heads, pages): the largest product that any key of a page can have with
        # this query.
        bounds = pages.bounds(call.query[:, :, 0])
        newest = pages.page_of(torch.full_like(pages.first, self.forward.start))
        # The newest page holds the row's own token, which must always be read.
        bounds.scatter_(2, newest.expand(-1, bounds.shape[1], -1), torch.inf)
        counts = []
        for row, row_counts in enumerate(self.conversation.counts):
            newest_page = int(newest[row])
            newest_keys = row_counts.tokens - newest_page * pages.size
            # All pages but the newest are full, so the limit in keys becomes a number of whole
            # pages.
            others = (self.policy.read_limit(row_counts) - newest_keys) // pages.size
            counts.append(1 + min(max(others, 0), newest_page))
        index = best(bounds, counts)
        read = torch.zeros(*bounds.shape[:2], pages.count + 1, dtype=torch.bool, device=page.device)
        # Keys that are none have page -1; they look at the last column, which stays False.
        read.scatter_(2, torch.where(index < 0, pages.count, index), True)
        read[..., -1] = False
        column = torch.where(page < 0, pages.count, page).expand(-1, bounds.shape[1], -1)
        call.key, call.value, positions = buffer.read_slots(read.gather(2, column))
        self.reads[layer.index] = (positions[:, 0] >= 0).sum(-1).tolist()
        self.selection_log.note(layer.index, "core", positions)
        empty = positions < 0
        hidden = empty if bool(empty.any()) else None
        return self._read(call, lambda: positions, hidden, None, None)[0]

    def _drifted(self, buffer: KeyBuffer, weights: Tensor) -> list[bool] | None:
        """Rows whose core is outdated, by this step's weights on it; None if there are none."""
        before = buffer.core_scores_at_refresh
        if self.cored is None or before is None or not self._watches_drift(buffer):
            return None
        now = buffer.core_scores_now(self.cored.core_scores(weights.detach()))
        rows = self.cored.drifted(before, now)
        return None if rows is None or not bool(rows.any()) else rows.tolist()

    def _refresh(
        self, call: AttentionCall, layer: AdaptiveLayer, rows: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The step once more, some rows reading everything they hold.

        Args:
            call: of the layer; gets the keys that are now read.
            layer: whose core is outdated in some rows.
            rows: which rows.

        Returns:
            Output and weights, as of `attend_with`, and the logits of all keys.
        """
        buffer = layer.filled_buffer
        call.key, call.value = buffer.attended(refresh=True)
        tier = buffer.coded_tier(True)
        positions = buffer.attended_positions(refresh=True)
        hidden = positions < 0
        others = ~torch.tensor(rows, device=hidden.device)
        # Rows that did not drift read their core and always attended keys only, which come last.
        hidden[others, :, : buffer.slots_before_core(True)] = True
        self._drifted_rows[layer.index] = rows
        all_read, core_read = buffer.reads(refresh=True), buffer.reads(refresh=False)
        self.reads[layer.index] = [
            a if row else b for a, b, row in zip(all_read, core_read, rows, strict=True)
        ]
        everything_visible = all(rows) and not buffer.ragged(True)
        logits = row_logits(call, tier)
        hidden = None if everything_visible else hidden
        return *self._read(call, lambda: positions, hidden, logits, tier), logits

    def _narrow(
        self,
        call: AttentionCall,
        layer: AdaptiveLayer,
        logits: Tensor,
        tier: QuantizedTier | None,
    ) -> tuple[Tensor, Tensor]:
        """The step once more, over the image keys that rank best and all that is no image key.

        Args:
            call: of the layer, with the keys a refresh reads.
            layer: whose keys were ranked.
            logits: of all keys, from the first time.
            tier: keys that are attended to as they are stored, or None.

        Returns:
            Output and weights, as of `attend_with`.
        """
        assert self.cored is not None
        buffer = layer.filled_buffer
        ranks = self.cored.core_scores(self._to_rank[layer.index])
        positions = buffer.attended_positions(refresh=True)
        image = buffer.image_slots() & (positions[:, :1] >= 0)
        # (batch, 1, largest budget), columns of what a refresh reads.
        core = best(ranks.masked_fill(~image, -torch.inf), buffer.sparse_budget)
        hidden = buffer.image_slots() | (positions < 0)
        # One more column takes the -1 of rows that choose fewer keys, and is cut off again.
        hidden = torch.cat([hidden, hidden[..., :1]], 2)
        end = positions.shape[2]
        index = torch.where(core < 0, end, core).expand(-1, hidden.shape[1], -1)
        hidden = hidden.scatter(2, index, False)[..., :end]
        core_positions = positions[:, :1].gather(2, core.clamp_min(0))
        self._sparse_core[layer.index] = core_positions.masked_fill(core < 0, -1)
        self.reads[layer.index] = (~hidden[:, 0]).sum(1).tolist()
        return self._read(call, lambda: positions, hidden, logits, tier)

    # -- afterwards --------------------------------------------------------------------------------

    def end(self) -> None:
        """The pass is over: change what its weights change."""
        self.selection_log.arrive(self.forward.start)
        refresh = self.conversation.is_refresh
        for index, layer in self.conversation.layers.items():
            if index not in self.reads:
                self.reads[index] = layer.filled_buffer.reads(refresh=refresh)
            self._after_step(layer)

    def _after_step(self, layer: AdaptiveLayer) -> None:
        """New core, older text: what this step's weights change."""
        buffer, log = layer.filled_buffer, self.selection_log
        weights, to_rank = self._weights.get(layer.index), self._to_rank.get(layer.index)
        if to_rank is not None and self.cored is not None:
            if self.cored.rotates:
                ranks = self.cored.core_scores(to_rank)
                segments.refresh_core(buffer, ranks, self._drifted_rows.get(layer.index))
            core = self._sparse_core.get(layer.index)
            log.note(layer.index, "core", buffer.core_positions() if core is None else core)
        if weights is not None:
            assert buffer.scores is not None
            first = self._slots_before_core[layer.index]
            # Weights are of all keys read, scores are added for the always attended and core keys,
            # which are the last of them: the columns from `first` on are the slots from
            # `secondary_width` on.
            slots = slice(buffer.secondary_width, buffer.filled)
            buffer.scores[:, :, slots].add_(weights[..., first:].sum(2))
        if buffer.scores is not None:
            self._evict(layer)
        if self.cored is not None and buffer.secondary_scores is not None:
            self._drop_secondary(layer, self.cored)
        if (newest := self.policy.newest_in_full) is not None:
            self._quantize_oldest(layer, newest)

    def _evict(self, layer: AdaptiveLayer) -> None:
        """Drop one always attended key of each row that holds more than its limit."""
        buffer = layer.filled_buffer
        # The new token's key is one that may be dropped later.
        buffer.evictable = [count + 1 for count in buffer.evictable]
        shares = tuple(buffer.budget_share)
        if shares not in self._limits:
            rows = zip(self.conversation.counts, shares, strict=True)
            self._limits[shares] = [self.policy.limit(counts, share) for counts, share in rows]
        limits = self._limits[shares]
        over = [
            limit is not None and held > limit
            for held, limit in zip(buffer.evictable, limits, strict=True)
        ]
        if any(over):
            dropped = buffer.evict(over, self._newest(limits))
            self.selection_log.note(layer.index, "dropped", dropped)

    def _drop_secondary(self, layer: AdaptiveLayer, policy: CoredPolicy) -> None:
        """Drop one secondary key of each row that holds more image keys than its limit."""
        buffer = layer.filled_buffer
        dropped = torch.full_like(buffer.positions[:, :1, :1], -1)
        for row, counts in enumerate(self.conversation.counts):
            limit = policy.image_limit(counts, buffer.evictable[row])
            start, stop = buffer.core_spans[row]
            secondary = buffer.secondary_held(row)
            # One key per step is enough: a step adds one text key, so the limit falls by at most
            # one.
            if limit is not None and secondary and secondary + stop - start > limit:
                dropped[row] = buffer.drop_secondary(row)
                self.selection_log.note(layer.index, "dropped", dropped)

    def _quantize_oldest(self, layer: AdaptiveLayer, newest: int) -> None:
        """Quantise a block of the oldest keys of each row that holds one too many in full.

        Args:
            layer: the layer.
            newest: keys that stay in full precision.
        """
        buffer = layer.filled_buffer
        rows = [held >= newest + QUANTIZED_BLOCK for held in buffer.held_in_buffer()]
        if any(rows):
            buffer.quantize_oldest(rows, QUANTIZED_BLOCK)

    def _newest(self, limits: Sequence[int | None]) -> Tensor | int:
        """Position from which on keys are too new to be dropped, for all rows or (batch, 1, 1)."""
        recent = tuple(0 if limit is None else self.policy.recent(limit) for limit in limits)
        if recent not in self._thresholds:
            positions = [self._nth_newest(row, count) for row, count in enumerate(recent)]
            device = self.conversation.layers[min(self.conversation.layers)].device
            self._thresholds[recent] = (
                positions[0]
                if len(set(positions)) == 1
                else torch.tensor(positions, device=device)[:, None, None]
            )
        return self._thresholds[recent]

    def _nth_newest(self, row: int, count: int) -> int:
        """Position of the `count`-th newest token of a row that the policy may drop."""
        # The last `tail` tokens of a row are all text, so their positions can be counted back
        # without looking at the layout.
        if count <= self.conversation.counts[row].tail:
            return self.forward.start + 1 - count
        modality = self.forward.layout.modality[row]
        droppable = (
            modality == Modality.TEXT
            if self.policy.evicts_text_only
            else modality != Modality.PADDING
        )
        positions = droppable.nonzero()[:, 0]
        return int(positions[-count]) if len(positions) >= count else 0


def _joined(tier: QuantizedTier, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a tier, then these."""
    decoded_keys, decoded_values = tier.read()
    return torch.cat([decoded_keys, keys], 2), torch.cat([decoded_values, values], 2)


def _without_heads(positions: Callable[[], Tensor]) -> Tensor:
    """(batch, heads, keys) positions; (batch, keys) where all heads read the same keys."""
    each = positions()
    return each[:, 0] if each.shape[1] == 1 else each
