"""Position bias: whether image tokens late in the raster get more attention than early ones.

Speaks about debiasing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from avl.tokens import Modality
from avl_analysis.recordings.schema import ROWS
from avl_analysis.statistics.base import Axes, KeyScores, KeyStatistic, Result


@dataclass(frozen=True)
class PositionBias(KeyStatistic):
    """Fit `mu exp(sigma i / N)` to the mean weight of the i-th of N image tokens, i = 0 ... N - 1.

    The order is that of the prompt: the raster of an image, all images and views of a sample one
    after another.

    Weights are means over heads and over the text rows of the prompt. The fit is least squares on
    the logarithm, so that one much attended patch does not bend the curve. r2 is the share of the
    variance of the log weight that is explained; sigma > 0: later tokens get more.
    """

    name = "position_bias"
    title = "exponential trend of attention over the raster"
    source = "Attention Debiasing (2508.17807)"
    justifies = "debiasing"
    dims: ClassVar[tuple[str, ...]] = ("layer",)
    axes: ClassVar[Axes] = {"bias_parameter": ("mu", "sigma", "r2")}

    def value(self, scores: KeyScores) -> Result:
        image = np.flatnonzero(scores.modality == Modality.IMAGE)
        row = ROWS.index("prompt text")
        total = scores.received[:, :, row, image].sum(1, dtype=np.float64)  # (layers, image tokens)
        seen = scores.queries[:, :, row, image].sum(1, dtype=np.float64)
        return np.stack([raster_fit(t, n) for t, n in zip(total, seen, strict=True)]), None


def raster_fit(total: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """mu, sigma and R^2 through total / seen.

    NaN with fewer than 3 tokens that received anything.
    """
    use = (seen > 0) & (total > 0)
    if use.sum() < 3:
        return np.full(3, np.nan)
    x, log = (np.arange(len(total)) / len(total))[use], np.log(total[use] / seen[use])
    # log(weight) = log(mu) + sigma x with x = i / N.
    slope, offset = np.polyfit(x, log, 1)
    spread = ((log - log.mean()) ** 2).sum()
    rest = ((log - slope * x - offset) ** 2).sum()
    return np.array([np.exp(offset), slope, 1 - rest / spread if spread > 0 else np.nan])
