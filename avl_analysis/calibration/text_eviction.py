"""What A-VL's text rule would keep.

Text attention caught by heavy hitters and recent keys, for any share of keys.

`TextTrace` observes one answer under the full cache and remembers, per key/value head, the weights
on text keys; `caught` then plays the rule through for many shares at once, without running the
model again. Weights are those of the full cache throughout: what later weights would be after
dropping a key is not followed, which comparing policies does.

Note: at least 20 text keys are always held, so short questions with short answers say
nothing about the share; for them the result is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from avl.attention import AttentionCall, Forward, attention_weights
from avl.hooks import HookError, Observer
from avl.policies.adaptive import HEAVY_SHARE, TEXT_FLOOR
from avl.tokens import Modality

_BLOCK = 64  # prompt rows whose weights are in memory at once


class TextTrace(Observer):
    """An observer for one unpadded sample under the full cache.

    Attributes:
        prompt: layer -> (key/value heads, text keys) weights summed over the prompt's text rows and
            the head's group.
        steps: layer -> one (key/value heads, text keys so far) array per decode step, summed over
            the group.
    """

    def __init__(
        self,
        prompt: dict[int, np.ndarray] | None = None,
        steps: dict[int, list[np.ndarray]] | None = None,
    ) -> None:
        self.prompt = prompt or {}
        self.steps = steps or {}
        self._text = torch.zeros(0, dtype=torch.bool)

    def begin(self, forward: Forward) -> None:
        if forward.layout.batch != 1:
            raise HookError(
                "the text trace follows one sample at a time; got a batch of"
                f" {forward.layout.batch}"
            )
        if forward.kind == "prefill":
            self.prompt, self.steps = {}, {}
        self._text = forward.layout.mask(Modality.TEXT)[0]

    @torch.no_grad()
    def observe(self, call: AttentionCall, output: Tensor) -> None:
        text = self._text.to(call.key.device)
        if call.forward.kind == "decode":
            weights = _grouped(attention_weights(call)[:, :, -1:], call)
            self.steps.setdefault(call.layer, []).append(
                weights[:, text[: weights.shape[1]]].cpu().numpy()
            )
            return
        total = torch.zeros(call.key.shape[1], call.key.shape[2], device=call.key.device)
        for start in range(0, call.query.shape[2], _BLOCK):
            rows = slice(start, min(start + _BLOCK, call.query.shape[2]))
            if bool(text[rows].any()):
                total += _grouped(attention_weights(call, rows) * text[rows, None], call)
        self.prompt[call.layer] = total[:, text].cpu().numpy()


def _grouped(weights: Tensor, call: AttentionCall) -> Tensor:
    """Weights summed over rows and over the query heads of a group.

    (1, query heads, rows, keys) to (key/value heads, keys).
    """
    return weights.sum(2)[0].view(call.key.shape[1], call.groups, -1).sum(1)


def caught(trace: TextTrace, shares: Sequence[float]) -> np.ndarray:
    """Share of the text attention of all decode steps and layers together that falls on held keys.

    Returns: (shares,) in [0, 1]; NaN where no share drops anything (texts of 20 keys or fewer) and
        without decode steps.
    """
    kept, seen, dropped = np.zeros(len(shares)), 0.0, False
    for layer, prompt in trace.prompt.items():
        steps = trace.steps.get(layer, [])
        seen += sum(float(weights.sum()) for weights in steps)
        for index, share in enumerate(shares):
            part, acted = _play(prompt, steps, share)
            kept[index] += part
            dropped |= acted
    return kept / seen if dropped and seen > 0 else np.full(len(shares), np.nan)


def _play(prompt: np.ndarray, steps: Sequence[np.ndarray], share: float) -> tuple[float, bool]:
    """One layer's weights on held keys, all steps together.

    And whether a key was dropped in time to matter.
    """
    heads, count = prompt.shape
    total = count + len(steps)
    scores, held = np.zeros((heads, total)), np.zeros((heads, total), dtype=bool)
    scores[:, :count], held[:, :count] = prompt, True
    dropped = _drop(scores, held, count, share)
    kept = 0.0
    for step, weights in enumerate(steps, start=1):
        seen = count + step
        held[:, seen - 1] = True
        kept += float((weights * held[:, :seen]).sum())
        scores[:, :seen] += weights
        dropped |= step < len(steps) and _drop(scores, held, seen, share)
    return kept, dropped


def _drop(scores: np.ndarray, held: np.ndarray, seen: int, share: float) -> bool:
    """Reduce every head's held keys to the budget.

    The newest ones, and the best-scored of the others.
    """
    budget = max(round(share * seen), TEXT_FLOOR)
    if int(held[0].sum()) <= budget:
        return False
    recent = budget - int(HEAVY_SHARE * budget)
    for head in range(len(held)):
        keys = np.flatnonzero(held[head])
        older = keys[: len(keys) - recent]
        best = older[np.argsort(-scores[head, older], kind="stable")[: budget - recent]]
        held[head, older] = False
        held[head, best] = True
    return True
