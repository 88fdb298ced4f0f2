"""How few image tokens a layer needs if all its heads must make do with one set of them.

A-VL holds and attends to one set of image tokens per layer, ranked by the mean weight over heads.
Statistics of single heads (`coverage`, `threshold_sparsity`) are more optimistic: every head may
choose other tokens, and every row anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from avl_analysis.statistics.base import Axes, Result, Trajectory, TrajectoryStatistic
from avl_analysis.statistics.coverage import SLACK, Coverage


@dataclass(frozen=True)
class SharedCoverage(TrajectoryStatistic):
    """`k(tau) / N`: smallest share of image tokens that holds tau of image attention.

    Of a layer, summed over heads, at one token-producing row; in (0, 1].

    NaN for a layer without image attention, and where an image token is not in the cache.
    """

    name = "shared_coverage"
    title = "share of image tokens, one set for all heads, that holds tau of the attention"
    source = "He et al., ZipVL (2410.08584); one set per layer as in Zhang et al., A-VL (AAAI 2025)"
    justifies = "S, C"
    dims: ClassVar[tuple[str, ...]] = ("layer", "step")
    axes: ClassVar[Axes] = {"tau": "taus"}

    taus: tuple[float, ...] = Coverage.taus

    def value(self, trajectory: Trajectory) -> Result:
        scores = trajectory.scores.astype(np.float64)  # (steps, layers, image tokens)
        total = scores.sum(-1, keepdims=True)
        # (steps, layers, image tokens): share held by the best 1, 2, ... tokens.
        held = np.sort(scores, axis=-1)[..., ::-1].cumsum(-1) / np.where(total > 0, total, np.nan)
        needed = [(held < tau - SLACK).sum(-1) + 1 for tau in self.taus]
        share = np.stack(needed, -1) / scores.shape[-1]
        share[np.isnan(held[..., -1])] = np.nan
        return share.transpose(1, 0, 2), None


@dataclass(frozen=True)
class SharedSparsity(TrajectoryStatistic):
    """Share of the image tokens that a layer could do without for a whole answer.

    Their weight, mean over heads, is below `threshold` times the layer's largest on an image token
    at every decode step; in [0, 1].

    The longer an answer, the fewer tokens are negligible throughout. NaN without decode steps, and
    for a layer that has no image attention at one of them.
    """

    name = "shared_sparsity"
    title = "share of image tokens that no decode step needs"
    source = "the threshold of Tu et al., VL-Cache (ICLR 2025), eq. 1-2"
    justifies = "S"

    threshold: float = 0.01

    def value(self, trajectory: Trajectory) -> Result:
        scores = trajectory.scores[1:]  # (decode steps, layers, image tokens)
        if not len(scores):
            return np.full(scores.shape[1], np.nan), None
        largest = scores.max(-1, keepdims=True)
        share = (scores < self.threshold * largest).all(0).mean(-1)
        share[~(largest > 0).all(0)[:, 0]] = np.nan
        return share, None
