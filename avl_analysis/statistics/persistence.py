"""Image persistence: whether the picture keeps its attention while the text grows.

Tested here, not assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from avl_analysis.statistics.base import Axes, Result, Trajectory, TrajectoryStatistic


@dataclass(frozen=True)
class ImagePersistence(TrajectoryStatistic):
    """Least-squares slope of the image mass against the decode step.

    Of the head mean, and of the mean weight of an image token.

    Per decode step; 0 = the picture keeps its attention, negative = it fades. relative: slope of
    the mass divided by its mean, so -0.01 is one per cent less with every token. Read from the
    first 512 steps of an answer, the last prompt row included. NaN with fewer than three decode
    steps.
    """

    name = "image_persistence"
    title = "change of image attention per decode step"
    unit = "per step"
    source = "Zhang et al., A-VL (AAAI 2025); Qwen-LookAgain (2505.23558)"
    justifies = "treating modalities apart"
    axes: ClassVar[Axes] = {"slope_of": ("mass", "token", "relative")}

    def value(self, trajectory: Trajectory) -> Result:
        mass = np.nansum(trajectory.scores[1:].astype(np.float64), -1)  # (decode steps, layers)
        if len(mass) < 3:
            return np.full((mass.shape[1], 3), np.nan), None
        # Centred steps: the slope is then their product with the mass over their square.
        step = np.arange(len(mass)) - (len(mass) - 1) / 2
        slope = step @ mass / (step @ step)
        mean = mass.mean(0)
        tokens = trajectory.scores.shape[-1]
        relative = np.divide(slope, mean, out=np.full_like(slope, np.nan), where=mean > 0)
        return np.stack([slope, slope / tokens, relative], -1), None
