"""A decode step under a policy: what each layer reads, and what the weights change afterwards.

Attention of the one new row is computed here, because its weights feed the next choice. A step may
be taken once more: over everything held where the core turns out to be outdated, or over the best
keys only where a policy is sparse. Changes to what was read (a new core, older text, minor keys)
wait for the end of the pass, so that a recorder sees what was attended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avl import segments
from avl.attention import Attend, AttentionCall, Forward, attend_one_row, for_query_heads
from avl.cache import AdaptiveLayer, Conversation
from avl.families import UnsupportedModelError
from avl.policies.base import Policy
from avl.selection import Selection, best
from avl.tokens import Modality


class DecodeStep:
    """One pass of one new token per row.

    Attributes:
        diary: told what each layer attends to, takes in and drops.
        reads: keys each row attended to, by layer.
    """

    def __init__(
        self, policy: Policy, conversation: Conversation, forward: Forward, diary: Selection
    ) -> None:
        self.policy = policy
        self.conversation = conversation
        self.forward = forward
        self.diary = diary
        self.reads: dict[int, list[int]] = {}
        self._weights: dict[int, Tensor] = {}  # to add to the scores of keys, by layer
        self._ranks: dict[int, Tensor] = {}  # of image keys, where the core is chosen anew
        self._few: dict[int, Tensor] = {}  # positions a sparse step attended to
        self._turning: dict[int, list[bool]] = {}  # rows whose core was outdated
        self._thresholds: dict[tuple[int, ...], Tensor | int] = {}
        layout = forward.layout
        self._arrived = torch.full(
            (layout.batch, 1, 1), forward.start, device=layout.modality.device
        )

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        """Attention over what the layer hands out: once, or once more over other keys."""
        layer = self.conversation.layers.get(call.layer)
        if layer is None:
            return inner(call)
        positions = layer.attended_positions()
        if call.key.shape[2] != positions.shape[2]:
            raise UnsupportedModelError(
                f"layer {call.layer} attends to {call.key.shape[2]} keys where its cache gave"
                f" {positions.shape[2]}; models that change keys behind the cache cannot be adapted"
            )
        output, weights = self._read(call, layer, positions < 0 if layer.ragged else None)
        self.reads[layer.index] = layer.reads()
        if not layer.whole and (rows := self._drifted(layer, weights)) is not None:
            output, weights = self._refresh(call, layer, rows)
        if (
            layer.whole
            and (layer.far or layer.cold is not None)
            and (self.policy.rotates or self.policy.sparse)
        ):
            self._ranks[layer.index] = self.policy.core_scores(weights.detach())
            if self.policy.sparse:
                output, weights = self._narrow(call, layer)
        if self.policy.accumulates:
            self._weights[layer.index] = weights.detach()
        return output

    def _read(
        self, call: AttentionCall, layer: AdaptiveLayer, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention of one row over what the layer hands out, except where `hidden`, (batch, heads,
        keys).
        """
        positions = layer.attended_positions()
        call.key_positions = positions[:, 0] if positions.shape[1] == 1 else positions
        call.mask = None if hidden is None else for_query_heads(~hidden, call)[:, :, None]
        return attend_one_row(call, hidden)

    def _drifted(self, layer: AdaptiveLayer, weights: Tensor) -> list[bool] | None:
        """Rows whose core is outdated, by this step's weights on it; None if there are none."""
        if layer.reference is None or not (layer.far or layer.cold is not None):
            return None
        rows = self.policy.drifted(
            *layer.core_now_and_then(self.policy.core_scores(weights.detach()))
        )
        return None if rows is None or not bool(rows.any()) else rows.tolist()

    def _refresh(
        self, call: AttentionCall, layer: AdaptiveLayer, rows: list[bool]
    ) -> tuple[Tensor, Tensor]:
        """The step once more, some rows reading everything they hold."""
        reads = layer.reads()
        layer.whole = True
        call.key, call.value = layer.attended()
        hidden = layer.attended_positions() < 0
        others = ~torch.tensor(rows, device=hidden.device)
        hidden[others, :, : layer.before_rest] = True
        self._turning[layer.index] = rows
        self.reads[layer.index] = [
            a if r else b for a, b, r in zip(layer.reads(), reads, rows, strict=True)
        ]
        return self._read(call, layer, hidden if layer.ragged or not all(rows) else None)

    def _narrow(self, call: AttentionCall, layer: AdaptiveLayer) -> tuple[Tensor, Tensor]:
        """The step once more, over the image keys that rank best and all that is no image key."""
        positions, ranks = layer.attended_positions(), self._ranks[layer.index]
        image = layer.image_slots() & (positions[:, : ranks.shape[1]] >= 0)
        chosen = best(ranks.masked_fill(~image, -torch.inf), layer.few)
        heads = max(positions.shape[1], chosen.shape[1])
        hidden = (layer.image_slots() | (positions < 0)).expand(-1, heads, -1)
        hidden = torch.cat(
            [hidden, hidden[..., :1]], 2
        )  # one more slot, for those that choose nothing
        end = positions.shape[2]
        hidden.scatter_(2, torch.where(chosen < 0, end, chosen).expand(-1, heads, -1), False)
        hidden = hidden[..., :end]
        found = positions.expand(-1, heads, -1).gather(2, chosen.clamp_min(0).expand(-1, heads, -1))
        self._few[layer.index] = found[:, : chosen.shape[1]].masked_fill(chosen < 0, -1)
        self.reads[layer.index] = (~hidden[:, 0]).sum(1).tolist()
        return self._read(call, layer, hidden)

    # -- afterwards --------------------------------------------------------------------------------

    def end(self) -> None:
        """The pass is over: change what its weights change."""
        for layer in self.conversation.layers.values():
            self._after_step(layer)

    def _after_step(self, layer: AdaptiveLayer) -> None:
        """New core, older text: what this step's weights change."""
        weights, ranks = self._weights.pop(layer.index, None), self._ranks.pop(layer.index, None)
        before = layer.before_rest
        if ranks is not None:
            if self.policy.rotates:
                segments.recore(layer, ranks, self._turning.get(layer.index))
            core = self._few.get(layer.index)
            self.diary.note(layer.index, "core", layer.core_positions() if core is None else core)
        if weights is not None:
            layer.scores[:, :, layer.far : layer.filled].add_(weights[..., before:].sum(2))
        self.diary.note(layer.index, "added", self._arrived)
        self._drop_text(layer)
        self._drop_far(layer)

    def _drop_text(self, layer: AdaptiveLayer) -> None:
        if layer.scores is None:
            return
        layer.evictable = [count + 1 for count in layer.evictable]
        limits = [
            self.policy.limit(c, s)
            for c, s in zip(self.conversation.counts, layer.share, strict=True)
        ]
        over = [
            limit is not None and n > limit
            for n, limit in zip(layer.evictable, limits, strict=True)
        ]
        if any(over):
            dropped = layer.evict(over, self._newest(limits))
            self.diary.note(layer.index, "dropped", dropped)

    def _drop_far(self, layer: AdaptiveLayer) -> None:
        if layer.worth is None:
            return
        dropped = torch.full_like(layer.positions[:, :1, :1], -1)
        for row, counts in enumerate(self.conversation.counts):
            limit = self.policy.image_limit(counts, layer.evictable[row])
            start, stop = layer.cores[row]
            if (
                limit is not None
                and layer.far_held(row)
                and layer.far_held(row) + stop - start > limit
            ):
                dropped[row] = layer.drop_far(row)
                self.diary.note(layer.index, "dropped", dropped)

    def _newest(self, limits: Sequence[int | None]) -> Tensor | int:
        """Position from which on keys are too new to be dropped, for all rows or (batch, 1, 1)."""
        recent = tuple(0 if limit is None else self.policy.recent(limit) for limit in limits)
        if recent not in self._thresholds:
            positions = [self._nth_newest(row, count) for row, count in enumerate(recent)]
            device = self.conversation.layers[min(self.conversation.layers)].device
            one = len(set(positions)) == 1
            self._thresholds[recent] = (
                positions[0] if one else torch.tensor(positions, device=device)[:, None, None]
            )
        return self._thresholds[recent]

    def _nth_newest(self, row: int, count: int) -> int:
        """Position of the `count`-th newest token of a row that the policy may drop."""
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
