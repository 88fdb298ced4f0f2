"""What A-VL's text rule would keep.

Text attention caught by heavy hitters and recent keys, for any share of keys.

`TextTrace` is a view on a recording of answers under the full cache: per key/value head, the
weights on text keys. `caught` then plays the rule through for many shares at once, without running
the model again. Weights are those of the full cache throughout: what later weights would be after
dropping a key is not followed, which comparing policies does.

Note: at least 20 text keys are always held, so short questions with short answers say
nothing about the share; for them the result is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from avl.policies.adaptive import HEAVY_SHARE, TEXT_FLOOR
from avl.tokens import Modality
from avl_analysis.recordings.recording import Recording


@dataclass(frozen=True, eq=False)
class TextTrace:
    """Weights on the text keys of one sample.

    Attributes:
        prompt: layer -> (key/value heads, text keys of the prompt) weights summed over the prompt's
            text rows and the query heads of a group.
        steps: layer -> one (key/value heads, text keys so far) array per decode step, summed over
            the group.
    """

    prompt: Mapping[int, np.ndarray] = field(default_factory=dict)
    steps: Mapping[int, Sequence[np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, recording: Recording, sample: str, attention: xr.Dataset) -> TextTrace:
        """The trace of one sample.

        Args:
            recording: made with the statistic `accumulated_score`, under the full cache.
            sample: its name.
            attention: the raw weights of the same recording, of all heads, kept with
                `keep="attention", queries="steps"` (`Recording.drop_attention`).
        """
        tokens = recording.tokens.sel(sample=sample)
        is_text = tokens["modality"].values == Modality.TEXT
        length = int(tokens["prompt_length"])
        received = recording.total("accumulated_score").sel(sample=sample, rows="prompt text")
        kv_heads = int(recording.attrs["kv_heads"])
        of_prompt = _grouped(received.transpose("layer", "head", "position").values, kv_heads)
        own = attention.sel(sample=sample)
        weights = own["attention"].transpose("query", "layer", "head", "position").values
        # The first kept row is the last one of the prompt, which the sums over the prompt hold;
        # rows of longer samples are padded with -1.
        rows = [(row, int(at)) for row, at in enumerate(own["query_position"].values)]
        decoded = [
            _grouped(weights[row][..., : at + 1], kv_heads)[..., is_text[: at + 1]]
            for row, at in rows
            if at >= length
        ]
        layers = [int(layer) for layer in received["layer"].values]
        return cls(
            {
                layer: of_prompt[i][:, :length][:, is_text[:length]]
                for i, layer in enumerate(layers)
            },
            {layer: [step[i] for step in decoded] for i, layer in enumerate(layers)},
        )


def _grouped(weights: np.ndarray, kv_heads: int) -> np.ndarray:
    """(layers, query heads, keys), summed over query heads that share a key/value head."""
    layers, heads, keys = weights.shape
    return weights.reshape(layers, kv_heads, heads // kv_heads, keys).sum(2)


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
    # (key/value heads, text keys): the keys of the prompt, then one more per decode step.
    scores, held = np.zeros((heads, total)), np.zeros((heads, total), dtype=bool)
    scores[:, :count], held[:, :count] = prompt, True
    dropped = _drop(scores, held, count, share)
    kept = 0.0
    for step, weights in enumerate(steps, start=1):
        seen = count + step
        # The step's own token is held when it attends.
        held[:, seen - 1] = True
        kept += float((weights * held[:, :seen]).sum())
        scores[:, :seen] += weights
        # A key dropped after the last step would have been read by no later one: not counted.
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
        # Ascending, so the newest are the last ones.
        keys = np.flatnonzero(held[head])
        older = keys[: len(keys) - recent]
        best = older[np.argsort(-scores[head, older], kind="stable")[: budget - recent]]
        held[head, older] = False
        held[head, best] = True
    return True
