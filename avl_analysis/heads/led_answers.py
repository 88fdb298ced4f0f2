"""A model led along answers it once gave, while something is done to it.

What an answer loses by an intervention is read from the probabilities of its own tokens: free
generation would leave the answer at the first change, and everything after would be about another
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avl_analysis.corpus.questions import Sample
from avl_analysis.evaluation.generation import generate
from avl_analysis.models.loading import VLM


@dataclass(frozen=True, eq=False)
class LedAnswer:
    """One answer while the model is led along it.

    Attributes:
        log_probs: (tokens,) log-probability of each token, in nats.
        agrees: (tokens,) whether it is what greedy decoding would choose there.
    """

    log_probs: NDArray[np.float64]
    agrees: NDArray[np.bool_]

    @property
    def probability(self) -> float:
        """Of the whole answer."""
        return float(np.exp(self.log_probs.sum()))

    @property
    def same(self) -> bool:
        """Whether greedy decoding would give every token of the answer."""
        return bool(self.agrees.all())

    def change(self, plain: LedAnswer) -> float:
        """Change of the log-probability against another run, nats per token."""
        return float((self.log_probs - plain.log_probs).mean())


def lead(
    vlm: VLM,
    samples: Sequence[Sample],
    answers: Sequence[Sequence[int]],
    scope: AbstractContextManager[object] | None = None,
) -> list[LedAnswer]:
    """Lead the model along the answers of a batch, through `generate`.

    Args:
        vlm: a loaded model.
        samples: questions of one batch.
        answers: token ids of each answer, at least one.
        scope: what is done to the model meanwhile; None leaves it as it is.
    """
    log_probs = [np.zeros(len(tokens)) for tokens in answers]
    agrees = [np.zeros(len(tokens), bool) for tokens in answers]

    def keep(step: int, logits: Tensor) -> None:
        # (batch, vocabulary). In float32: half precision would round differences between two runs
        # away.
        scores = torch.log_softmax(logits.float(), -1)
        best = scores.argmax(-1).tolist()
        for row, tokens in enumerate(answers):
            # Passes go on until the longest answer of the batch ends; what follows the end of a
            # shorter one is not counted.
            if step < len(tokens):
                log_probs[row][step] = float(scores[row, tokens[step]])
                agrees[row][step] = best[row] == tokens[step]

    with nullcontext() if scope is None else scope:
        generate(
            vlm,
            samples,
            None,
            max_new_tokens=max(map(len, answers)),
            forced=answers,
            on_logits=keep,
        )
    return [LedAnswer(*pair) for pair in zip(log_probs, agrees, strict=True)]
