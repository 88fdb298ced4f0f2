"""Consecutive cosine: how little the picture's attention changes from one step to the next.

Speaks about K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from avl_analysis.statistics.base import Result, Trajectory, TrajectoryStatistic


@dataclass(frozen=True)
class ConsecutiveCosine(TrajectoryStatistic):
    """Cosine of the image score vectors of step t - 1 and step t, at t = 1, 2, ...; in [0, 1]."""

    name = "consecutive_cosine"
    title = "cosine of the image scores of consecutive steps"
    source = "Tao et al., DyCoke (CVPR 2025)"
    justifies = "K"
    dims: ClassVar[tuple[str, ...]] = ("layer", "step")

    def value(self, trajectory: Trajectory) -> Result:
        scores = trajectory.scores.astype(np.float64)  # (steps, layers, image tokens)
        length = np.linalg.norm(scores, axis=-1)
        cosine = np.full(scores.shape[:2], np.nan)
        # A step without any image attention has no direction.
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine[1:] = (scores[1:] * scores[:-1]).sum(-1) / (length[1:] * length[:-1])
        return cosine.T, None
