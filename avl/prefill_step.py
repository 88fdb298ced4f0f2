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

from avl.accounting import UsageLog
from avl.attention import Attend, AttentionCall, Forward, attention_weights, for_query_heads
from avl.buffer import KeyBuffer
from avl.cache import AdaptiveLayer, Conversation
from avl.families import UnsupportedModelError
from avl.image_encoder import EncoderAttention
from avl.policies.base import CoredPolicy, Measure, Policy
from avl.policies.before_decoder import BeforeDecoderPolicy, ImageTokens
from avl.policies.prompt import Prompt
from avl.prefill_filter import PrefillFilter
from avl.ragged_buffer import RaggedBuffer
from avl.selection import SelectionLog, best
from avl.tokens import Modality, TokenLayout


@dataclass(eq=False)
class PrefillStep:
    """One pass of several new tokens.

    Attributes:
        policy: asked what to hold.
        conversation: whose layers are filled.
        usage_log: told about the keys that exist while the policy chooses.
        selection_log: told what each layer holds.
        filter: takes image tokens out of the prompt on its way, or None.
        encoder: reads the image encoder's attention, or None.
        reads: keys the newest token of each row attended to, by layer.
    """

    policy: Policy
    conversation: Conversation
    usage_log: UsageLog
    selection_log: SelectionLog
    filter: PrefillFilter | None
    encoder: EncoderAttention | None = None
    reads: dict[int, list[int]] = field(default_factory=dict)
    _measures: dict[int, tuple[Measure, Tensor, Tensor]] = field(default_factory=dict)
    _filter_ranks: Tensor | None = None

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        """Attention over the prompt as it is.

        Then the policy chooses, now or at the end of the pass.

        Args:
            call: of the layer.
            inner: the model's own attention.

        Returns:
            (batch, rows, query heads, head dim).
        """
        layer = self.conversation.layers.get(call.layer)
        if layer is None:
            output = inner(call)
            self._filter_tokens(call)
            return output
        buffer = layer.buffer
        stored = 0 if buffer is None else buffer.stored
        if call.key.shape[2] != stored + call.query.shape[2]:
            raise UnsupportedModelError(
                f"layer {call.layer} attends to {call.key.shape[2]} keys where its cache gave"
                f" {stored} + {call.query.shape[2]}; models that change keys behind the cache"
                " cannot be adapted"
            )
        _check_keys(call, layer)
        if buffer is None:
            layer.learn(call.key, call.value)
        rows = _row_positions(call.forward, call.key.device)
        # (batch, 1, new tokens): what the new keys are. Those held from earlier turns come in front
        # of them, as the cache hands them out.
        positions = rows[:, None]
        if buffer is not None:
            earlier = buffer.stored_positions().long()
            positions = torch.cat([earlier, positions.expand(-1, earlier.shape[1], -1)], 2)
            call.mask = _mask_with_earlier(call, earlier)
        if buffer is not None or call.forward.rows is not None:
            call.key_positions = positions
        output = inner(call)
        with torch.no_grad():
            self._filter_tokens(call)
            # The layer's keys stay referenced until its policy has chosen; of a policy that decides
            # layer by layer that is one layer at a time, of a deferred one the whole prompt.
            measure = self.policy.measure(self._prompt(call, layer, positions, rows))
            self._measures[layer.index] = (measure, call.key.detach(), call.value.detach())
            self.reads[layer.index] = (positions[:, 0] >= 0).sum(1).tolist()
            if not self.policy.deferred:
                self._fill_layers()
        return output

    def end(self) -> None:
        """The pass is over: choose for the layers still waiting."""
        if self._measures:
            self._fill_layers()

    def _prompt(
        self, call: AttentionCall, layer: AdaptiveLayer, positions: Tensor, rows: Tensor
    ) -> Prompt:
        """The layer as the policy sees it.

        Args:
            call: of the layer.
            layer: what it held before this pass, if anything.
            positions: (batch, heads, keys) of all keys.
            rows: (batch, rows) positions of the query rows.
        """
        modality = call.forward.layout.modality.to(positions.device)
        # Number of each token among the row's true tokens; left padding gets -1, which nothing
        # looks up.
        places = (modality != Modality.PADDING).long().cumsum(1) - 1
        return Prompt(
            call,
            len(self.conversation.layers),
            positions=positions,
            modality=_by_position(modality, positions, int(Modality.PADDING)),
            places=_by_position(places, positions, 0),
            rows=rows,
            row_modality=_by_position(modality, rows[:, None], int(Modality.PADDING))[:, 0],
            counts=self.conversation.counts,
            earlier_scores=_earlier_scores(layer.buffer, call.key.shape[2]),
            filter_ranks=None
            if self._filter_ranks is None
            else _by_position(self._filter_ranks.to(positions.device), positions, 0),
        )

    @torch.no_grad()
    def choose_input(self, forward: Forward, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens of a prompt go on before the first layer, and with which hidden states.

        Args:
            forward: the pass.
            hidden: (batch, tokens, width) that enters the first layer.

        Returns:
            (batch, tokens) bool, and hidden states like those given.
        """
        policy = self.policy
        assert isinstance(policy, BeforeDecoderPolicy)
        layout = forward.layout.to(hidden.device)
        image = layout.mask(Modality.IMAGE)
        # All true tokens that are no image token go on; chosen image tokens are added row by row.
        keep, hidden = layout.valid & ~image, hidden.clone()
        ranks = torch.zeros(image.shape, device=hidden.device)
        counts = image.sum(1).tolist()
        saliency: list[Tensor | None] = [None] * len(counts)
        if self.encoder is not None and sum(counts):
            saliency = list(self.encoder.received(sum(counts)).cpu().split(counts))
        for row, row_counts in enumerate(self.conversation.counts):
            places = image[row].nonzero()[:, 0]
            count = policy.filter_count(row_counts)
            if not count:
                continue
            tokens = ImageTokens(
                features=hidden[row, places].float().cpu(),
                image=_pictures_and_frames(layout, row, places),
                row=layout.row[row, places].cpu().long(),
                column=layout.column[row, places].cpu().long(),
                saliency=saliency[row],
            )
            index = policy.select(tokens, count)
            features = policy.replaced(tokens, index, count).to(hidden)
            chosen = places[index.to(places.device)]
            hidden[row, chosen] = features
            keep[row, chosen] = True
            # The token chosen first gets the highest rank; ranks of image tokens start at 1.
            ranks[row, chosen] = torch.arange(len(index), 0, -1, device=hidden.device).float()
        self._filter_ranks = ranks
        return keep, hidden

    def _filter_tokens(self, call: AttentionCall) -> None:
        """Decide which image tokens leave the prompt, if this is the layer after which they do."""
        if self.filter is None or call.layer != self.filter.layer or call.forward.kind != "prefill":
            return
        layout = call.forward.layout.to(call.key.device)
        last = call.query.shape[2] - 1
        # (batch, keys), by the weights of the last prompt row.
        scores = self.policy.rank(attention_weights(call, slice(last, last + 1))[:, :, 0])
        image = layout.mask(Modality.IMAGE)
        counts = [self.policy.filter_count(row) for row in self.conversation.counts]
        index = best(scores.masked_fill(~image, -torch.inf)[:, None], counts)[:, 0]
        # One more column takes the -1 of rows that keep fewer tokens, and is cut off again.
        batch, length = scores.shape
        keep = torch.zeros(batch, length + 1, dtype=torch.bool, device=scores.device)
        keep.scatter_(1, torch.where(index < 0, length, index), True)
        self.filter.drop(keep[:, :-1] | (layout.valid & ~image))

    def _fill_layers(self) -> None:
        """Let the policy choose, and hold what it chose."""
        measures, self._measures = self._measures, {}
        choices = self.policy.choices(
            [measure for measure, _, _ in measures.values()], self.conversation.counts
        )
        for index, choice in zip(list(measures), choices, strict=True):
            measure, keys, values = measures[index]
            layer = self.conversation.layers[index]
            heads = keys.shape[1] if self.policy.per_head else 1
            kind = RaggedBuffer if choice.ragged_heads else KeyBuffer
            layer.buffer = kind.from_choice(keys, values, measure.positions, choice, heads)
            # Keys and values of this layer and of those still to come exist beside what is held
            # already: the peak of memory is counted before they are let go.
            waiting = [tensor for _, *pair in measures.values() for tensor in pair]
            self.usage_log.hold(self.conversation.layers.values(), waiting)
            del measures[index], keys, values
            self._note_held(layer.index, layer.buffer)

    def _note_held(self, index: int, buffer: KeyBuffer) -> None:
        """Write down which positions a layer holds, and which of them every step attends to."""
        secondary = buffer.positions[:, :1, : buffer.secondary_width].clone()
        attended = buffer.positions[:, :, buffer.secondary_width : buffer.filled].clone()
        self.selection_log.note(index, "held", secondary)
        if buffer.quantized is not None:
            policy = self.policy
            # If every step attends to the tier, its keys count as core from the start.
            skipped = isinstance(policy, CoredPolicy) and (policy.rotates or policy.sparse)
            kind = "kept" if skipped else "added"
            self.selection_log.note(index, kind, buffer.quantized.positions.clone())
        self.selection_log.note(index, "added", attended)


def _earlier_scores(buffer: KeyBuffer | None, keys: int) -> Tensor | None:
    """(batch, heads, keys) scores so far of always attended keys of earlier turns, 0 for others."""
    if buffer is None or buffer.scores is None:
        return None
    scores = torch.zeros(*buffer.scores.shape[:2], keys, device=buffer.scores.device)
    first = buffer.quantized_width + buffer.secondary_width
    attended = buffer.scores[:, :, buffer.secondary_width : buffer.filled]
    # In the order in which the cache hands keys out: tier, secondary, then the always attended.
    scores[:, :, first : buffer.stored] = attended
    return scores.masked_fill_(torch.isinf(scores), 0.0)  # of keys that were protected


def _check_keys(call: AttentionCall, layer: AdaptiveLayer) -> None:
    """Refuse attention that is more than scaled products of the keys the cache holds."""
    name = type(call.module).__name__
    widths = (call.key.shape[1], call.key.shape[3], call.value.shape[3])
    if widths != layer.widths:
        raise UnsupportedModelError(
            f"{name} caches {layer.widths[0]} heads of width {layer.widths[1]} and attends to"
            f" {widths[0]} heads of width {widths[1]}: its cache holds compressed keys (multi-head"
            " latent attention), beyond policies"
        )
    names = ("position_bias", "sinks", "indices", "block_indices")
    if unsupported := [n for n in names if call.options.get(n) is not None]:
        raise UnsupportedModelError(
            f"{name} attends with {', '.join(unsupported)}, made for all keys of the sequence in"
            " order; policies drop and reorder keys, and support plain, grouped-query and"
            " soft-capped attention and sinks that are parameters"
        )


def _row_positions(forward: Forward, device: torch.device) -> Tensor:
    """(batch, rows) sequence index of each query row of a prompt, -1 at padding and fillers."""
    valid = forward.layout.valid.to(device)
    if forward.rows is not None:
        rows = forward.rows.to(device)
        return torch.where((rows >= 0) & valid.gather(1, rows.clamp_min(0)), rows, -1)
    index = torch.arange(forward.start, forward.start + forward.tokens, device=device)
    return torch.where(valid[:, forward.start :], index, -1)


def _by_position(values: Tensor, positions: Tensor, nothing: int) -> Tensor:
    """Look values of a row up by position.

    Args:
        values: (batch, length), one for every position.
        positions: (batch, heads, n), -1 for none.
        nothing: what stands for -1.

    Returns:
        (batch, heads, n).
    """
    by_head = values[:, None].expand(-1, positions.shape[1], -1)
    return by_head.gather(2, positions.clamp_min(0)).masked_fill(positions < 0, nothing)


def _mask_with_earlier(call: AttentionCall, earlier: Tensor) -> Tensor:
    """The mask of a later turn: all keys held, then what transformers says about the new ones.

    Args:
        call: with the mask of transformers, which covers the new tokens only.
        earlier: (batch, heads, keys) positions of the keys held, -1 for empty slots.

    Returns:
        (batch, 1 or query heads, new tokens, keys).
    """
    new = call.query.shape[2]
    mask = call.mask
    if mask is None:
        mask = torch.ones(new, new, dtype=torch.bool, device=earlier.device).tril()[None, None]
    if mask.dim() != 4 or mask.shape[-1] != new:
        raise UnsupportedModelError(
            f"a later turn needs a mask over its {new} new tokens, got shape {tuple(mask.shape)};"
            " load the model with attn_implementation='sdpa' or 'eager'"
        )
    # (batch, 1 or query heads, 1, keys): every new token sees all keys held, whatever its place.
    valid = for_query_heads(earlier >= 0, call)[:, :, None]
    if mask.dtype != torch.bool:
        nothing = torch.full((), torch.finfo(mask.dtype).min, dtype=mask.dtype, device=mask.device)
        valid = torch.where(valid, torch.zeros_like(nothing), nothing)
    heads = max(valid.shape[1], mask.shape[1])
    return torch.cat([part.expand(earlier.shape[0], heads, new, -1) for part in (valid, mask)], -1)


def _pictures_and_frames(layout: TokenLayout, row: int, places: Tensor) -> Tensor:
    """(image tokens,): number of the picture, or frame of a video, that each is of, in order."""
    both = torch.stack([layout.image[row, places], layout.frame[row, places]], 1).cpu().tolist()
    # Numbered in the order of first appearance; `dict.fromkeys` drops what repeats.
    number = {pair: index for index, pair in enumerate(dict.fromkeys(map(tuple, both)))}
    return torch.tensor([number[tuple(pair)] for pair in both]).long()
