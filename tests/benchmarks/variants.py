"""The other ways to do A-VL's decode step, as they are commonly written, to measure against.

Both keep what A-VL keeps in a stock-like cache that concatenates every step, as the authors'
program does. `MaskedStep` then attends to everything held with non-core keys masked (theirs),
`SlicedStep` copies the attended keys out first. Text is evicted per head by gathering the text
tail. Rows of a batch must have equal lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from avl import AdaptivePolicy
from avl.attention import Attend, AttentionCall, Forward, attend_one_row
from avl.hooks import Intervention
from avl.policies.prompt import Counts, Prompt
from avl.tokens import Modality


class HeldLayer(DynamicLayer):
    """A stock layer that reports tokens seen while it holds fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0
        self.scores: Tensor | None = None  # (batch, heads, text keys)
        self.core: Tensor | None = (
            None  # (batch, keys in the core) indices into the held image keys
        )
        self.image: slice = slice(0, 0)

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.get_seq_length()


class StockLikeStep(Intervention):
    """A-VL's selection over stock-like layers; subclasses say how the core is attended."""

    def __init__(self, policy: AdaptivePolicy) -> None:
        self.policy = policy

    def begin(self, forward: Forward) -> None:
        if forward.kind == "prefill":
            forward.cache.layers[:] = [HeldLayer() for _ in forward.cache.layers]

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        layer = call.forward.cache.layers[call.layer]
        if call.forward.kind == "prefill":
            output = inner(call)
            self._trim(call, layer)
            return output
        if self.policy.is_refresh(call.forward.step):
            output, weights = attend_one_row(call)
            scores = weights.flatten(1, 2).mean(1)[:, layer.image]
            layer.core = scores.topk(layer.core.shape[1]).indices
        else:
            output, weights = self.ordinary(call, layer)
        if layer.scores is not None:
            self._age(call, layer, weights[..., -layer.scores.shape[2] - 1 :].sum(2))
        return output

    def ordinary(self, call: AttentionCall, layer: HeldLayer) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _trim(self, call: AttentionCall, layer: HeldLayer) -> None:
        """Drop minor image keys and old text, as A-VL's `choose` says."""
        layout = call.forward.layout
        batch, length = layout.modality.shape
        positions = torch.arange(length).expand(batch, 1, length)
        counts = [Counts(*row, tail=row[2]) for row in layout.counts().tolist()]
        rows = positions[:, 0]
        codes = layout.modality[:, None]
        prompt = Prompt(
            call,
            1,
            positions=positions,
            modality=codes,
            places=positions,
            rows=rows,
            row_modality=layout.modality,
            counts=counts,
            earlier_scores=None,
        )
        choice = self.policy.choose(self.policy.measure(prompt), counts)
        system, text = choice.always_attended
        text = text.sort(-1).values  # by age, for `_age`
        image = torch.cat([choice.core, choice.secondary], 2)
        layer.core = torch.arange(choice.core.shape[2]).expand(batch, -1)
        layer.image = slice(system.shape[2], system.shape[2] + image.shape[2])
        index = torch.cat(
            [part.expand(-1, call.key.shape[1], -1) for part in (system, image, text)], 2
        )
        layer.keys = layer.keys.gather(2, index[..., None].expand(-1, -1, -1, layer.keys.shape[3]))
        layer.values = layer.values.gather(
            2, index[..., None].expand(-1, -1, -1, layer.values.shape[3])
        )
        layer.dropped = length - index.shape[2]
        if choice.scores is not None:
            layer.scores = choice.scores.gather(2, text.expand(-1, call.key.shape[1], -1))

    def _age(self, call: AttentionCall, layer: HeldLayer, weights: Tensor) -> None:
        scores = torch.cat([layer.scores, torch.zeros_like(weights[..., :1])], 2) + weights
        seen = int((call.forward.layout.modality[0] == Modality.TEXT).sum())
        limit = self.policy.limit(Counts(0, 0, seen, seen), 1.0)
        if scores.shape[2] > limit:
            older = scores.shape[2] - self.policy.recent(limit)
            worst = scores[..., :older].argmin(2, keepdim=True)
            kept = torch.arange(scores.shape[2] - 1).expand(*scores.shape[:2], -1)
            kept = kept + (kept >= worst)
            scores = scores.gather(2, kept)
            layer.keys, layer.values = (
                torch.cat(
                    [
                        tensor[:, :, : -kept.shape[2] - 1],
                        tensor[:, :, -kept.shape[2] - 1 :].gather(
                            2, kept[..., None].expand(-1, -1, -1, tensor.shape[3])
                        ),
                    ],
                    2,
                )
                for tensor in (layer.keys, layer.values)
            )
            layer.dropped += 1
        layer.scores = scores


class MaskedStep(StockLikeStep):
    """Attend to everything held, non-core image keys masked: nothing is skipped."""

    def ordinary(self, call: AttentionCall, layer: HeldLayer) -> tuple[Tensor, Tensor]:
        batch, _, keys, _ = call.key.shape
        hidden = torch.zeros(batch, 1, keys, dtype=torch.bool, device=call.key.device)
        hidden[:, :, layer.image] = True
        hidden[:, 0].scatter_(1, layer.core + layer.image.start, False)
        return attend_one_row(call, hidden)


class SlicedStep(StockLikeStep):
    """Copy the attended keys and values out, then attend to the copy."""

    def ordinary(self, call: AttentionCall, layer: HeldLayer) -> tuple[Tensor, Tensor]:
        batch, _, keys, _ = call.key.shape
        system = torch.arange(layer.image.start).expand(batch, -1)
        text = torch.arange(layer.image.stop, keys).expand(batch, -1)
        index = torch.cat([system, layer.core + layer.image.start, text], 1)
        for name in ("key", "value"):
            tensor = getattr(call, name)
            setattr(
                call,
                name,
                torch.stack(
                    [rows.index_select(1, at) for rows, at in zip(tensor, index, strict=True)]
                ),
            )
        return attend_one_row(call)


def kv_bytes(cache: Any) -> int:
    """Bytes of keys and values in a stock-like cache."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
