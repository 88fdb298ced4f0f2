"""Sink rate: heads that park their attention on one token.

Justifies keeping system tokens; debiasing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from avl.tokens import Modality
from avl_analysis.statistics.base import Axes, KeyScores, KeyStatistic, Result


@dataclass(frozen=True)
class SinkRate(KeyStatistic):
    """1 for a head with `sum_q A[q,k] / (n - k) > threshold` over n prompt rows, else 0.

    Its mean is the share of heads.

    For k the first token, and for whichever image token received most (NaN without one).
    """

    name = "sink_rate"
    title = "share of heads with an attention sink"
    source = "Gu et al., When attention sink emerges (ICLR 2025), sec. 3"
    justifies = "keeping system tokens; debiasing"
    axes: ClassVar[Axes] = {"sink": ("first", "image")}

    threshold: float = 0.3

    def value(self, scores: KeyScores) -> Result:
        with np.errstate(invalid="ignore", divide="ignore"):
            # (layers, heads, positions); 0 / 0 = not seen
            mean = scores.received[:, :, 0] / scores.queries[:, :, 0]
        image = np.flatnonzero(scores.modality == Modality.IMAGE)
        both = [mean[..., 0], _largest(mean[..., image])]
        return np.stack([np.where(np.isnan(m), np.nan, m > self.threshold) for m in both], -1), None


def _largest(values: np.ndarray) -> np.ndarray:
    """Largest along the last axis, NaN left out; NaN if nothing is left."""
    largest = np.where(np.isnan(values), -np.inf, values).max(-1, initial=-np.inf)
    return np.where(np.isneginf(largest), np.nan, largest)
