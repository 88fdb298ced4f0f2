"""A-VL as slowly and obviously as possible: the stock cache keeps everything, and what is dropped
is masked.

An independent statement of the rules for tests: loops over rows, layers and heads, Python sets of
positions, weights of all rows from `attention_weights`. No prefill filter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from avl.attention import Attend, AttentionCall, Forward, attention_weights
from avl.hooks import Intervention, attached
from avl.tokens import Modality


class MaskedAVL(Intervention):
    def __init__(self, secondary: float, core: float, every: int, text: float) -> None:
        self.secondary, self.core, self.every, self.text = secondary, core, every, text
        self.images: dict[
            tuple[int, int, int], set[int]
        ] = {}  # (layer, row, head) -> held image positions
        self.cores: dict[tuple[int, int, int], set[int]] = {}
        self.texts: dict[
            tuple[int, int, int], dict[int, float]
        ] = {}  # (layer, row, head) -> position -> score

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        forward = call.forward
        if forward.kind == "decode":
            seen = self._mask(call)
            eager = call.mask is not None and call.mask.is_floating_point()
            call.mask = (
                torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
                if eager
                else seen
            )
        output = inner(call)
        weights = attention_weights(call)
        for row in range(weights.shape[0]):
            if forward.kind == "prefill":
                self._prompt(call, weights[row], row)
            else:
                self._step(call, weights[row], row)
        return output

    def _where(self, forward: Forward, row: int, modality: Modality) -> list[int]:
        return (forward.layout.modality[row] == modality).nonzero()[:, 0].tolist()

    def _prompt(self, call: AttentionCall, weights: Tensor, row: int) -> None:
        """weights: (query heads, rows, keys)."""
        image = self._where(call.forward, row, Modality.IMAGE)
        text = self._where(call.forward, row, Modality.TEXT)
        for head in range(call.key.shape[1]):
            group = weights[head * call.groups : (head + 1) * call.groups]
            score = {p: float(weights[:, -1, p].mean()) for p in image}
            ranked = sorted(image, key=lambda p: -score[p])
            self.images[call.layer, row, head] = set(ranked[: int(self.secondary * len(image))])
            self.cores[call.layer, row, head] = set(ranked[: int(self.core * len(image))])
            self.texts[call.layer, row, head] = {p: float(group[:, text, p].sum()) for p in text}
            self._age(call.layer, row, head, len(text))

    def _step(self, call: AttentionCall, weights: Tensor, row: int) -> None:
        for head in range(call.key.shape[1]):
            image = self.images[call.layer, row, head]
            if self.every and call.forward.step % self.every == 0:
                score = {p: float(weights[:, 0, p].mean()) for p in image}
                count = len(self.cores[call.layer, row, head])
                self.cores[call.layer, row, head] = set(
                    sorted(image, key=lambda p: -score[p])[:count]
                )
        texts = len(self._where(call.forward, row, Modality.TEXT))
        for head in range(call.key.shape[1]):
            held = self.texts[call.layer, row, head]
            held[call.forward.start] = 0.0
            for p in held:
                held[p] += float(weights[head * call.groups : (head + 1) * call.groups, 0, p].sum())
            self._age(call.layer, row, head, texts)

    def _age(self, layer: int, row: int, head: int, texts: int) -> None:
        held = self.texts[layer, row, head]
        budget = max(round(self.text * texts), 20)
        heavy = int(0.7 * budget)
        if len(held) > budget:
            newest = sorted(held)[-(budget - heavy) :]
            best = sorted((p for p in held if p not in newest), key=lambda p: -held[p])[:heavy]
            self.texts[layer, row, head] = {p: held[p] for p in (*newest, *best)}

    def _mask(self, call: AttentionCall) -> Tensor:
        forward = call.forward
        mask = torch.zeros(
            call.query.shape[0], call.query.shape[1], 1, call.key.shape[2], dtype=torch.bool
        )
        refresh = self.every == 0 or forward.step % self.every == 0
        for row in range(mask.shape[0]):
            for head in range(mask.shape[1]):
                held = self.images if refresh else self.cores
                images = held[call.layer, row, head // call.groups]
                texts = self.texts[call.layer, row, head // call.groups]
                seen = [*self._where(forward, row, Modality.SYSTEM), *images, *texts, forward.start]
                mask[row, head, 0, seen] = True
        return mask


@contextmanager
def masked_avl(model: Any, **rules: Any) -> Iterator[MaskedAVL]:
    tap = MaskedAVL(**rules)
    with attached(model, tap):
        yield tap
