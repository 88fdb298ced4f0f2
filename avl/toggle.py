"""Switching a policy on and off on a loaded model.

`with adaptive(model, policy) as session:` puts an actor on the seam. When a prompt enters the decoder with an empty
cache, the cache's layers are exchanged for ours; `generate()` keeps its own cache object and notices nothing. After
each layer's attention over the prompt the policy chooses what that layer holds. In decode steps the layer hands out
what is to be read, and attention is computed here, because its weights feed the next choice.

Keys, values, mask and positions of a call always come from one layer's own slots, never from transformers' mask, which
is one for all layers. Changes to what was read wait for the end of the pass, so that a recorder sees what was attended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from avl.accounting import Ledger, Usage
from avl.attention import Attend, AttentionCall, Forward, attend_one_row, attention_weights
from avl.cache import AdaptiveLayer, Conversation
from avl.families import UnsupportedModelError
from avl.policies.base import Counts, Measure, Policy, Prompt
from avl.prefill import PrefillFilter
from avl.seam import Seam, SeamError, Tap, attach
from avl.selection import Selection, best
from avl.tokens import Modality


class AdaptiveSession(Tap):
    """A policy on a model. Use `adaptive`, or `attach` and `detach` where a `with` block does not fit."""

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a policy such as avl.AdaptivePolicy(); got {policy!r}")
        self.model = model
        self.policy = policy
        self._seam: Seam | None = None
        self._filter: PrefillFilter | None = None
        self._hook: Any = None
        self._conversations: WeakKeyDictionary[Cache, Conversation] = WeakKeyDictionary()
        self._now: Conversation | None = None
        self._after: dict[int, Tensor] = {}
        self._measures: dict[int, tuple[Measure, Tensor, Tensor]] = {}
        self._reads: dict[int, list[int]] = {}
        self._ranks: dict[int, Tensor] = {}
        self._few: dict[int, Tensor] = {}
        self._turning: dict[int, list[bool]] = {}
        self._thresholds: dict[tuple[int, ...], Tensor | int] = {}
        self._arrived: Tensor | None = None
        self._ledger: Ledger | None = None
        self._selection: Selection | None = None

    # -- on and off -------------------------------------------------------------------------------------------------

    def attach(self) -> AdaptiveSession:
        """Put the policy on the model.

        Raises:
            UnsupportedModelError: the model cannot be adapted; the message says why.
            SeamError: another policy is on this model.
        """
        if self._seam is not None:
            raise SeamError("this session is on its model already; detach it first, or make a second session")
        seam = attach(self.model, self, "actor")
        try:
            decoder = seam.family.decoder
            self._hook = decoder.register_forward_pre_hook(self._supply_cache, with_kwargs=True, prepend=True)
            if self.policy.filter_layer is not None:
                self._filter = PrefillFilter(seam.family, self.policy.filter_layer)
                self._filter.connect()
        except BaseException:
            self._disconnect(seam)
            raise
        self._seam = seam
        return self

    def detach(self) -> None:
        """Take the policy off again; the model is exactly what it was. Harmless if it is not on."""
        if self._seam is not None:
            seam, self._seam = self._seam, None
            self._disconnect(seam)

    def _disconnect(self, seam: Seam) -> None:
        seam.detach(self)
        if self._hook is not None:
            self._hook.remove()
        if self._filter is not None:
            self._filter.disconnect()
        for conversation in self._conversations.values():
            conversation.forward = None
        self._hook = self._filter = self._now = None
        self._forget_pass()

    def _forget_pass(self) -> None:
        self._after, self._measures, self._reads, self._thresholds = {}, {}, {}, {}
        self._ranks, self._few, self._turning = {}, {}, {}

    # -- what happened ----------------------------------------------------------------------------------------------

    def usage(self) -> Usage:
        """Bytes and keys of the latest conversation, pass by pass.

        Raises:
            ValueError: nothing has run under the policy yet.
        """
        if self._ledger is None or not self._ledger.steps:
            raise ValueError("nothing has run under this policy yet; generate something inside the block first")
        return self._ledger.usage()

    @property
    def selection(self) -> Selection:
        """Which positions each layer held and attended in the latest conversation; see `Selection`.

        Raises:
            ValueError: nothing has run under the policy yet.
        """
        if self._selection is None:
            raise ValueError("nothing has run under this policy yet; generate something inside the block first")
        return self._selection

    # -- the tap ----------------------------------------------------------------------------------------------------

    def begin(self, forward: Forward) -> None:
        self._forget_pass()
        if forward.cache is None:
            raise SeamError("a policy acts on the KV cache, and use_cache=False leaves none; call with use_cache=True")
        if forward.kind == "prefill":
            conversation = self._exchange(forward.cache)
        else:
            conversation = self._conversations[forward.cache]
            if conversation.rows is not None:
                forward.layout = forward.layout.select(conversation.rows)
        self._now = conversation
        conversation.forward = forward
        conversation.arrival = self.policy.arrival(forward.start)
        self._count(conversation, forward)
        self._arrived = torch.full((forward.layout.batch, 1, 1), forward.start, device=forward.layout.modality.device)
        for layer in conversation.layers.values():
            layer.whole = forward.kind != "decode" or self.policy.whole(forward.step)
        if self._filter is not None:
            self._filter.begin(forward if forward.kind == "prefill" else None)
        self._keep_diary(conversation, forward)

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        assert self._now is not None
        layer = self._now.layers.get(call.layer)
        if layer is None:
            output = inner(call)
            self._filter_tokens(call)
            return output
        if call.forward.kind == "decode":
            return self._decode(call, layer)
        return self._prompt(call, layer, inner)

    def end(self, forward: Forward) -> None:
        conversation = self._now
        assert conversation is not None
        assert self._ledger is not None
        layers = list(conversation.layers.values())
        if self._measures:
            self._settle(conversation)
        if forward.kind == "decode":
            for layer in layers:
                self._after_step(layer, conversation)
        self._ledger.write(forward.step, layers, [self._reads[layer.index] for layer in layers])
        conversation.forward = None
        if self._filter is not None:
            self._filter.begin(None)
        self._now = None
        self._forget_pass()

    # -- beginning --------------------------------------------------------------------------------------------------

    def _supply_cache(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The cache a decoder would make for itself, made where its layers can still be exchanged."""
        use = kwargs.get("use_cache")
        use = getattr(module.config, "use_cache", True) if use is None else use
        if use and kwargs.get("past_key_values") is None and len(args) <= 1:
            return args, {**kwargs, "past_key_values": DynamicCache(config=module.config)}
        return None

    def _exchange(self, cache: Any) -> Conversation:
        """Put our layers in place of the cache's full-attention ones."""
        if not isinstance(cache, DynamicCache):
            raise SeamError(
                f"a policy needs the default (dynamic) KV cache, not {type(cache).__name__}; call generate without "
                "cache_implementation and without past_key_values"
            )
        if cache.offloading:
            raise SeamError("a policy does not move keys between devices; call generate without an offloaded cache")
        assert self._seam is not None
        conversation = Conversation()
        if not cache.layers:
            cache.layers.extend(DynamicLayer() for _ in range(self._seam.family.layers))
        if _shares_keys(self._seam.family.decoder.config):
            raise UnsupportedModelError(
                f"layers of {self._seam.family.name} share the KV cache of other layers; policies act on layers "
                "that own their keys"
            )
        for index, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer or isinstance(layer, AdaptiveLayer):
                cache.layers[index] = AdaptiveLayer(conversation, index)
        own = {type(c).__name__ for c in cache.layers if isinstance(c, DynamicLayer) and not c.is_sliding}
        if own and conversation.layers:
            raise UnsupportedModelError(
                f"{self._seam.family.name} mixes full attention with layers that choose their keys themselves "
                f"({', '.join(sorted(own))}) under one mask; policies act on full attention, sliding windows beside it"
            )
        if not conversation.layers:
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise UnsupportedModelError(
                f"{self._seam.family.name} has no full-attention layer with a cache of its own (found "
                f"{', '.join(kinds)}); policies act on full attention only"
            )
        self._conversations[cache] = conversation
        return conversation

    def _count(self, conversation: Conversation, forward: Forward) -> None:
        """True tokens of each row, and no padding behind them."""
        if forward.kind == "decode":
            conversation.counts = [Counts(c.system, c.image, c.text + 1, c.tail + 1) for c in conversation.counts]
            return
        modality = forward.layout.modality
        if bool((modality[:, -1] == Modality.PADDING).any()):
            raise SeamError("a prompt of the batch is padded on the right; policies need padding_side='left'")
        text = (modality == Modality.TEXT).long()
        tail = text.flip(1).cumprod(1).sum(1, keepdim=True)
        rows = torch.cat([forward.layout.counts(), tail], 1).tolist()
        conversation.counts = [Counts(*row) for row in rows]

    def _keep_diary(self, conversation: Conversation, forward: Forward) -> None:
        if forward.kind == "prefill":
            layers = tuple(conversation.layers)
            self._ledger, self._selection = Ledger(layers), Selection(forward.layout, layers)
        assert self._selection is not None
        if conversation.moved is not None:
            for layer in self._selection.layers:
                self._selection.note(layer, "rows", conversation.moved)
            conversation.moved = None
        self._selection.begin(forward.step, forward.layout)

    # -- prompts ----------------------------------------------------------------------------------------------------

    def _prompt(self, call: AttentionCall, layer: AdaptiveLayer, inner: Attend) -> Tensor:
        forward = call.forward
        if call.key.shape[2] != layer.stored + call.query.shape[2]:
            raise UnsupportedModelError(
                f"layer {call.layer} attends to {call.key.shape[2]} keys where its cache gave {layer.stored} + "
                f"{call.query.shape[2]}; models that change keys behind the cache cannot be adapted"
            )
        _check_keys(call, layer)
        rows = _row_positions(forward, call.key.device)
        positions = rows[:, None]
        if layer.filled:
            held = layer.stored_positions().long()
            positions = torch.cat([held, positions.expand(-1, held.shape[1], -1)], 2)
            call.mask = _with_held(call, held)
        if layer.filled or forward.rows is not None:
            call.key_positions = positions
        output = inner(call)
        with torch.no_grad():
            self._filter_tokens(call)
            measure = self.policy.measure(self._shown(call, layer, positions, rows))
            self._measures[layer.index] = (measure, call.key.detach(), call.value.detach())
            self._reads[layer.index] = (positions[:, 0] >= 0).sum(1).tolist()
            if not self.policy.deferred:
                assert self._now is not None
                self._settle(self._now)
        return output

    def _shown(self, call: AttentionCall, layer: AdaptiveLayer, positions: Tensor, rows: Tensor) -> Prompt:
        """The layer as the policy sees it."""
        assert self._now is not None
        modality = call.forward.layout.modality.to(positions.device)
        places = (modality != Modality.PADDING).long().cumsum(1) - 1
        held = None
        if layer.scores is not None:
            held = torch.zeros(*layer.scores.shape[:2], call.key.shape[2], device=layer.scores.device)
            rest = slice(layer.cold_width + layer.far, layer.stored)
            held[:, :, rest] = layer.scores[:, :, layer.far : layer.filled]
            held.masked_fill_(torch.isinf(held), 0.0)
        return Prompt(
            call,
            len(self._now.layers),
            positions,
            _at(modality, positions, int(Modality.PADDING)),
            _at(places, positions, 0),
            rows,
            _at(modality, rows[:, None], int(Modality.PADDING))[:, 0],
            self._now.counts,
            held,
        )

    def _filter_tokens(self, call: AttentionCall) -> None:
        """Decide which image tokens leave the prompt, if this is the layer after which they do."""
        if self._filter is None or call.layer != self._filter.layer or call.forward.kind != "prefill":
            return
        assert self._now is not None
        layout = call.forward.layout.to(call.key.device)
        rows = call.query.shape[2]
        scores = self.policy.rank(attention_weights(call, slice(rows - 1, rows))[:, :, 0])
        image = layout.mask(Modality.IMAGE)
        chosen = best(
            scores.masked_fill(~image, -torch.inf)[:, None], [self.policy.filter_count(c) for c in self._now.counts]
        )
        keep = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        keep.scatter_(1, torch.where(chosen < 0, scores.shape[1], chosen)[:, 0], True)
        self._filter.drop(keep[:, :-1] | (layout.valid & ~image))

    def _settle(self, conversation: Conversation) -> None:
        """Let the policy choose, and hold what it chose."""
        assert self._ledger is not None
        measures, self._measures = self._measures, {}
        choices = self.policy.choices([measure for measure, _, _ in measures.values()], conversation.counts)
        for index, choice in zip(list(measures), choices, strict=True):
            measure, keys, values = measures[index]
            layer = conversation.layers[index]
            layer.fill(keys, values, measure.positions, choice, keys.shape[1] if self.policy.per_head else 1)
            self._ledger.hold(conversation.layers.values(), [t for _, *kv in measures.values() for t in kv])
            del measures[index], keys, values
            self._note_held(layer)

    def _note_held(self, layer: AdaptiveLayer) -> None:
        assert self._selection is not None
        far = layer.positions[:, : layer.core_heads, : layer.far].clone()
        near = layer.positions[:, :, layer.far : layer.filled].clone()
        self._selection.note(layer.index, "held", far)
        if layer.cold is not None:
            kind = "kept" if self.policy.rotates or self.policy.sparse else "added"
            self._selection.note(layer.index, kind, layer.cold.positions.clone())
        self._selection.note(layer.index, "added", near)

    # -- decode steps -----------------------------------------------------------------------------------------------

    def _decode(self, call: AttentionCall, layer: AdaptiveLayer) -> Tensor:
        positions = layer.attended_positions()
        if call.key.shape[2] != positions.shape[2]:
            raise UnsupportedModelError(
                f"layer {call.layer} attends to {call.key.shape[2]} keys where its cache gave {positions.shape[2]}; "
                "models that change keys behind the cache cannot be adapted"
            )
        output, weights = self._read(call, layer, positions < 0 if layer.ragged else None)
        self._reads[layer.index] = layer.reads()
        if not layer.whole and (rows := self._drifted(layer, weights)) is not None:
            output, weights = self._refresh(call, layer, rows)
        if layer.whole and (layer.far or layer.cold is not None) and (self.policy.rotates or self.policy.sparse):
            self._ranks[layer.index] = self.policy.core_scores(weights.detach())
            if self.policy.sparse:
                output, weights = self._narrow(call, layer)
        if self.policy.accumulates:
            self._after[layer.index] = weights.detach()
        return output

    def _read(self, call: AttentionCall, layer: AdaptiveLayer, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention of one row over what the layer hands out, except where `hidden`, (batch, heads, keys)."""
        positions = layer.attended_positions()
        call.key_positions = positions[:, 0] if positions.shape[1] == 1 else positions
        call.mask = None if hidden is None else _for_query_heads(~hidden, call)[:, :, None]
        return attend_one_row(call, hidden)

    def _drifted(self, layer: AdaptiveLayer, weights: Tensor) -> list[bool] | None:
        """Rows whose core is outdated, by this step's weights on it; None if there are none."""
        if layer.reference is None or not (layer.far or layer.cold is not None):
            return None
        rows = self.policy.drifted(*layer.core_now_and_then(self.policy.core_scores(weights.detach())))
        return None if rows is None or not bool(rows.any()) else rows.tolist()

    def _refresh(self, call: AttentionCall, layer: AdaptiveLayer, rows: list[bool]) -> tuple[Tensor, Tensor]:
        """The step once more, some rows reading everything they hold."""
        reads = layer.reads()
        layer.whole = True
        call.key, call.value = layer.attended()
        hidden = layer.attended_positions() < 0
        others = ~torch.tensor(rows, device=hidden.device)
        hidden[others, :, : layer.before_rest] = True
        self._turning[layer.index] = rows
        self._reads[layer.index] = [a if r else b for a, b, r in zip(layer.reads(), reads, rows, strict=True)]
        return self._read(call, layer, hidden if layer.ragged or not all(rows) else None)

    def _narrow(self, call: AttentionCall, layer: AdaptiveLayer) -> tuple[Tensor, Tensor]:
        """The step once more, over the image keys that rank best and all that is no image key."""
        positions, ranks = layer.attended_positions(), self._ranks[layer.index]
        image = layer.image_slots() & (positions[:, : ranks.shape[1]] >= 0)
        chosen = best(ranks.masked_fill(~image, -torch.inf), layer.few)
        heads = max(positions.shape[1], chosen.shape[1])
        hidden = (layer.image_slots() | (positions < 0)).expand(-1, heads, -1)
        hidden = torch.cat([hidden, hidden[..., :1]], 2)  # one more slot, for those that choose nothing
        end = positions.shape[2]
        hidden.scatter_(2, torch.where(chosen < 0, end, chosen).expand(-1, heads, -1), False)
        hidden = hidden[..., :end]
        found = positions.expand(-1, heads, -1).gather(2, chosen.clamp_min(0).expand(-1, heads, -1))
        self._few[layer.index] = found[:, : chosen.shape[1]].masked_fill(chosen < 0, -1)
        self._reads[layer.index] = (~hidden[:, 0]).sum(1).tolist()
        return self._read(call, layer, hidden)

    def _after_step(self, layer: AdaptiveLayer, conversation: Conversation) -> None:
        """New core, older text: what this step's weights change."""
        assert self._selection is not None
        assert conversation.forward is not None
        weights, ranks = self._after.pop(layer.index, None), self._ranks.pop(layer.index, None)
        before = layer.before_rest
        if ranks is not None:
            if self.policy.rotates:
                layer.recore(ranks, self._turning.get(layer.index))
            core = self._few.get(layer.index)
            self._selection.note(layer.index, "core", layer.core_positions() if core is None else core)
        if weights is not None:
            layer.scores[:, :, layer.far : layer.filled] += weights[..., before:].sum(2)
        self._selection.note(layer.index, "added", self._arrived)
        self._drop_text(layer, conversation)
        self._drop_far(layer, conversation)

    def _drop_text(self, layer: AdaptiveLayer, conversation: Conversation) -> None:
        if layer.scores is None:
            return
        assert self._selection is not None
        layer.evictable = [count + 1 for count in layer.evictable]
        limits = [self.policy.limit(c, s) for c, s in zip(conversation.counts, layer.share, strict=True)]
        over = [limit is not None and n > limit for n, limit in zip(layer.evictable, limits, strict=True)]
        if any(over):
            dropped = layer.evict(over, self._newest(conversation, limits))
            self._selection.note(layer.index, "dropped", dropped)

    def _drop_far(self, layer: AdaptiveLayer, conversation: Conversation) -> None:
        if layer.worth is None:
            return
        assert self._selection is not None
        dropped = torch.full_like(layer.positions[:, :1, :1], -1)
        for row, counts in enumerate(conversation.counts):
            limit = self.policy.image_limit(counts, layer.evictable[row])
            start, stop = layer.cores[row]
            if limit is not None and layer.far_held(row) and layer.far_held(row) + stop - start > limit:
                dropped[row] = layer.drop_far(row)
                self._selection.note(layer.index, "dropped", dropped)

    def _newest(self, conversation: Conversation, limits: Sequence[int | None]) -> Tensor | int:
        """Position from which on keys are too new to be dropped, for all rows or (batch, 1, 1)."""
        recent = tuple(0 if limit is None else self.policy.recent(limit) for limit in limits)
        if recent not in self._thresholds:
            positions = [self._nth_newest(conversation, row, count) for row, count in enumerate(recent)]
            device = conversation.layers[min(conversation.layers)].device
            one = len(set(positions)) == 1
            self._thresholds[recent] = positions[0] if one else torch.tensor(positions, device=device)[:, None, None]
        return self._thresholds[recent]

    def _nth_newest(self, conversation: Conversation, row: int, count: int) -> int:
        """Position of the `count`-th newest token of a row that the policy may drop."""
        forward = conversation.forward
        assert forward is not None
        if count <= conversation.counts[row].tail:
            return forward.start + 1 - count
        modality = forward.layout.modality[row]
        droppable = modality == Modality.TEXT if self.policy.evicts_text_only else modality != Modality.PADDING
        positions = droppable.nonzero()[:, 0]
        return int(positions[-count]) if len(positions) >= count else 0


@contextmanager
def adaptive(model: nn.Module, policy: Policy) -> Iterator[AdaptiveSession]:
    """Run a loaded model under a policy for the length of a `with` block.

    Args:
        model: a vision-language model of transformers, with SDPA or eager attention.
        policy: for example `AdaptivePolicy()`, or one of the baselines.

    Yields:
        The session, with `usage()` and `selection`; both stay readable after the block.

    Raises:
        UnsupportedModelError: the model cannot be adapted; the message says why.
        SeamError: another policy is on this model, or (inside the block) the cache is used in a way that cannot be
            followed: filled before the block, static, quantised, offloaded, cropped.
    """
    session = AdaptiveSession(model, policy)
    session.attach()
    try:
        yield session
    finally:
        session.detach()


# -- small parts ------------------------------------------------------------------------------------------------------


def _shares_keys(config: Any) -> bool:
    """Whether layers attend to the keys of other layers; older versions of transformers only say how many."""
    modes = getattr(config, "kv_sharing_modes", None) or ()
    return "reuse" in modes or bool(getattr(config, "num_kv_shared_layers", 0))


def _check_keys(call: AttentionCall, layer: AdaptiveLayer) -> None:
    """Refuse attention that is more than scaled products of the keys the cache holds."""
    name = type(call.module).__name__
    given = (call.key.shape[1], call.key.shape[3], call.value.shape[3])
    if given != layer.widths:
        raise UnsupportedModelError(
            f"{name} caches {layer.widths[0]} heads of width {layer.widths[1]} and attends to {given[0]} heads of "
            f"width {given[1]}: its cache holds compressed keys (multi-head latent attention), beyond policies"
        )
    names = ("position_bias", "sinks", "indices", "block_indices")
    if others := [n for n in names if call.options.get(n) is not None]:
        raise UnsupportedModelError(
            f"{name} attends with {', '.join(others)}, made for all keys of the sequence in order; policies drop and "
            "reorder keys, and support plain, grouped-query and soft-capped attention and sinks that are parameters"
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
    """What (batch, length) `facts` say at (batch, heads, n) positions; `nothing` where a position is -1."""
    found = facts[:, None].expand(-1, positions.shape[1], -1).gather(2, positions.clamp_min(0))
    return found.masked_fill(positions < 0, nothing)


def _for_query_heads(mask: Tensor, call: AttentionCall) -> Tensor:
    """(batch, 1 or key/value heads, keys) -> (batch, 1 or query heads, keys)."""
    return mask if mask.shape[1] == 1 else mask.repeat_interleave(call.groups, 1)


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
            f"a later turn needs a mask over its {new} new tokens, got shape {tuple(mask.shape)}; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    valid = _for_query_heads(held >= 0, call)[:, :, None]
    if mask.dtype != torch.bool:
        nothing = torch.full((), torch.finfo(mask.dtype).min, dtype=mask.dtype, device=mask.device)
        valid = torch.where(valid, torch.zeros_like(nothing), nothing)
    heads = max(valid.shape[1], mask.shape[1])
    return torch.cat([part.expand(held.shape[0], heads, new, -1) for part in (valid, mask)], -1)
