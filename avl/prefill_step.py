"""A prompt, or a later turn's new tokens, on its way through the decoder under a policy.

Attention itself is the model's own. After each layer's attention the policy is shown the layer and
measures what it needs; its choice, at once or (where it compares layers) at the end of the pass,
becomes what the layer holds. A later turn's tokens attend to what each layer holds, under a mask of
our own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from avl import segments
from avl.accounting import UsageLog
from avl.attention import Attend, AttentionCall, Forward, attention_weights, for_query_heads
from avl.cache import AdaptiveLayer, Conversation
from avl.families import UnsupportedModelError
from avl.policies.base import Measure, Policy, Prompt
from avl.prefill_filter import PrefillFilter
from avl.selection import Selection, best
from avl.tokens import Modality


@dataclass(eq=False)
class PromptPass:
    """One pass of several new tokens.

    Attributes:
        ledger: told about the keys that exist while the policy chooses.
        diary: told what each layer holds.
        filter: takes image tokens out of the prompt on its way, or None.
        reads: keys the newest token of each row attended to, by layer.
    """

    policy: Policy
    conversation: Conversation
    ledger: UsageLog
    diary: Selection
    filter: PrefillFilter | None
    reads: dict[int, list[int]] = field(default_factory=dict)
    _measures: dict[int, tuple[Measure, Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        """Attention over the prompt as it is; then the policy chooses, now or at the end of the
        pass.
        """
        layer = self.conversation.layers.get(call.layer)
        if layer is None:
            output = inner(call)
            self._filter_tokens(call)
            return output
        if call.key.shape[2] != layer.stored + call.query.shape[2]:
            raise UnsupportedModelError(
                f"layer {call.layer} attends to {call.key.shape[2]} keys where its cache gave"
                f" {layer.stored} + {call.query.shape[2]}; models that change keys behind the cache"
                " cannot be adapted"
            )
        _check_keys(call, layer)
        rows = _row_positions(call.forward, call.key.device)
        positions = rows[:, None]
        if layer.filled:
            held = layer.stored_positions().long()
            positions = torch.cat([held, positions.expand(-1, held.shape[1], -1)], 2)
            call.mask = _with_held(call, held)
        if layer.filled or call.forward.rows is not None:
            call.key_positions = positions
        output = inner(call)
        with torch.no_grad():
            self._filter_tokens(call)
            measure = self.policy.measure(self._shown(call, layer, positions, rows))
            self._measures[layer.index] = (measure, call.key.detach(), call.value.detach())
            self.reads[layer.index] = (positions[:, 0] >= 0).sum(1).tolist()
            if not self.policy.deferred:
                self._settle()
        return output

    def end(self) -> None:
        """The pass is over: choose for the layers still waiting."""
        if self._measures:
            self._settle()

    def _shown(
        self, call: AttentionCall, layer: AdaptiveLayer, positions: Tensor, rows: Tensor
    ) -> Prompt:
        """The layer as the policy sees it."""
        modality = call.forward.layout.modality.to(positions.device)
        places = (modality != Modality.PADDING).long().cumsum(1) - 1
        held = None
        if layer.scores is not None:
            held = torch.zeros(
                *layer.scores.shape[:2], call.key.shape[2], device=layer.scores.device
            )
            rest = slice(layer.cold_width + layer.far, layer.stored)
            held[:, :, rest] = layer.scores[:, :, layer.far : layer.filled]
            held.masked_fill_(torch.isinf(held), 0.0)
        return Prompt(
            call,
            len(self.conversation.layers),
            positions,
            _at(modality, positions, int(Modality.PADDING)),
            _at(places, positions, 0),
            rows,
            _at(modality, rows[:, None], int(Modality.PADDING))[:, 0],
            self.conversation.counts,
            held,
        )

    def _filter_tokens(self, call: AttentionCall) -> None:
        """Decide which image tokens leave the prompt, if this is the layer after which they do."""
        if self.filter is None or call.layer != self.filter.layer or call.forward.kind != "prefill":
            return
        layout = call.forward.layout.to(call.key.device)
        rows = call.query.shape[2]
        scores = self.policy.rank(attention_weights(call, slice(rows - 1, rows))[:, :, 0])
        image = layout.mask(Modality.IMAGE)
        chosen = best(
            scores.masked_fill(~image, -torch.inf)[:, None],
            [self.policy.filter_count(c) for c in self.conversation.counts],
        )
        keep = torch.zeros(
            scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device
        )
        keep.scatter_(1, torch.where(chosen < 0, scores.shape[1], chosen)[:, 0], True)
        self.filter.drop(keep[:, :-1] | (layout.valid & ~image))

    def _settle(self) -> None:
        """Let the policy choose, and hold what it chose."""
        measures, self._measures = self._measures, {}
        choices = self.policy.choices(
            [measure for measure, _, _ in measures.values()], self.conversation.counts
        )
        for index, choice in zip(list(measures), choices, strict=True):
            measure, keys, values = measures[index]
            layer = self.conversation.layers[index]
            segments.fill(
                layer,
                keys,
                values,
                measure.positions,
                choice,
                keys.shape[1] if self.policy.per_head else 1,
            )
            self.ledger.hold(
                self.conversation.layers.values(), [t for _, *kv in measures.values() for t in kv]
            )
            del measures[index], keys, values
            self._note_held(layer)

    def _note_held(self, layer: AdaptiveLayer) -> None:
        far = layer.positions[:, : layer.core_heads, : layer.far].clone()
        near = layer.positions[:, :, layer.far : layer.filled].clone()
        self.diary.note(layer.index, "held", far)
        if layer.cold is not None:
            kind = "kept" if self.policy.rotates or self.policy.sparse else "added"
            self.diary.note(layer.index, kind, layer.cold.positions.clone())
        self.diary.note(layer.index, "added", near)


def _check_keys(call: AttentionCall, layer: AdaptiveLayer) -> None:
    """Refuse attention that is more than scaled products of the keys the cache holds."""
    name = type(call.module).__name__
    given = (call.key.shape[1], call.key.shape[3], call.value.shape[3])
    if given != layer.widths:
        raise UnsupportedModelError(
            f"{name} caches {layer.widths[0]} heads of width {layer.widths[1]} and attends to"
            f" {given[0]} heads of width {given[1]}: its cache holds compressed keys (multi-head"
            " latent attention), beyond policies"
        )
    names = ("position_bias", "sinks", "indices", "block_indices")
    if others := [n for n in names if call.options.get(n) is not None]:
        raise UnsupportedModelError(
            f"{name} attends with {', '.join(others)}, made for all keys of the sequence in order;"
            " policies drop and reorder keys, and support plain, grouped-query and soft-capped"
            " attention and sinks that are parameters"
        )


def _row_positions(forward: Forward, device: torch.device) -> Tensor:
    """(batch, rows) sequence index of each query row of a prompt, -1 at padding and fillers."""
    valid = forward.layout.valid.to(device)
    if forward.rows is not None:
        rows = forward.rows.to(device)
        return torch.where((rows >= 0) & valid.gather(1, rows.clamp_min(0)), rows, -1)
    at = torch.arange(forward.start, forward.start + forward.tokens, device=device)
    return torch.where(valid[:, forward.start :], at, -1)


def _at(facts: Tensor, positions: Tensor, nothing: int) -> Tensor:
    """What (batch, length) `facts` say at (batch, heads, n) positions; `nothing` where a position
    is -1.
    """
    found = facts[:, None].expand(-1, positions.shape[1], -1).gather(2, positions.clamp_min(0))
    return found.masked_fill(positions < 0, nothing)


def _with_held(call: AttentionCall, held: Tensor) -> Tensor:
    """The mask of a later turn: all held keys, then what transformers says about the new ones.

    Args:
        held: (batch, heads, keys) positions of held keys, -1 for empty slots.
    """
    new = call.query.shape[2]
    mask = call.mask
    if mask is None:
        mask = torch.ones(new, new, dtype=torch.bool, device=held.device).tril()[None, None]
    if mask.dim() != 4 or mask.shape[-1] != new:
        raise UnsupportedModelError(
            f"a later turn needs a mask over its {new} new tokens, got shape {tuple(mask.shape)};"
            " load the model with attn_implementation='sdpa' or 'eager'"
        )
    valid = for_query_heads(held >= 0, call)[:, :, None]
    if mask.dtype != torch.bool:
        nothing = torch.full((), torch.finfo(mask.dtype).min, dtype=mask.dtype, device=mask.device)
        valid = torch.where(valid, torch.zeros_like(nothing), nothing)
    heads = max(valid.shape[1], mask.shape[1])
    return torch.cat([part.expand(held.shape[0], heads, new, -1) for part in (valid, mask)], -1)
