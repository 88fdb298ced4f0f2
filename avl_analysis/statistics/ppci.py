"""PPCI: how much the sets of the most attended image tokens overlap, across steps and layers.

`PPCI = |T1 & T2| / |T|`, T the best `int(p N)` of N image tokens by head-mean score. Two random
sets overlap by p on average (the baseline); Jaccard = PPCI / (2 - PPCI). Undefined where a token
was not attended at all (under a policy). Justifies K, the steps between refreshes of the core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from avl_analysis.statistics.base import Axes, Result, Trajectory, TrajectoryStatistic
from avl_analysis.statistics.top_sets import overlap, top


@dataclass(frozen=True)
class _PPCI(TrajectoryStatistic):
    source = "Zhang et al., A-VL (AAAI 2025), sec. 3"
    axes: ClassVar[Axes] = {"p": "ps"}
    random_baseline: ClassVar[str] = "p"

    ps: tuple[float, ...] = (0.1, 0.3, 0.5)

    def value(self, trajectory: Trajectory) -> Result:
        results = [self._of(top(trajectory.scores, p)) for p in self.ps]
        sums, counts = (np.stack(parts, -1) for parts in zip(*results, strict=True))
        return sums, counts

    def _of(self, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum and count of the overlaps of sets, (steps, layers, image tokens)."""
        raise NotImplementedError


@dataclass(frozen=True)
class PPCIContinuity(_PPCI):
    """Between decode steps t and t + lag, lag 1 ... 32, over all such pairs of a sample."""

    name = "ppci_continuity"
    title = "overlap of the top image tokens of two decode steps"
    justifies = "K"
    dims: ClassVar[tuple[str, ...]] = ("layer", "lag")
    axes: ClassVar[Axes] = {"lag": "lag_steps", "p": "ps"}

    lags: int = 32

    @property
    def lag_steps(self) -> range:
        """Distances between two decode steps that are measured."""
        return range(1, self.lags + 1)

    def _of(self, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        decode = sets[1:]
        sums, counts = np.zeros((sets.shape[1], self.lags)), np.zeros((sets.shape[1], self.lags))
        for lag in range(1, min(self.lags, len(decode) - 1) + 1):
            shared = overlap(decode[:-lag], decode[lag:])  # (pairs, layers)
            sums[:, lag - 1], counts[:, lag - 1] = np.nansum(shared, 0), (~np.isnan(shared)).sum(0)
        return sums, counts


@dataclass(frozen=True)
class PPCIHeterogeneity(_PPCI):
    """Between two layers at the same token-producing row, over all such rows of a sample."""

    name = "ppci_heterogeneity"
    title = "overlap of the top image tokens of two layers"
    justifies = "per-layer selection"
    dims: ClassVar[tuple[str, ...]] = ("layer", "other_layer")

    def _of(self, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Members are 0 and 1, so the product of two rows counts what both hold.
        shared = sets @ sets.transpose(0, 2, 1) / sets.sum(-1)[..., None]  # (steps, layers, layers)
        return np.nansum(shared, 0), (~np.isnan(shared)).sum(0)


@dataclass(frozen=True)
class PPCIPrefill(_PPCI):
    """Between the last prompt row and every decode step."""

    name = "ppci_prefill"
    title = "overlap of the top image tokens of prefill and a decode step"
    justifies = "S, K"
    dims: ClassVar[tuple[str, ...]] = ("layer", "step")

    def value(self, trajectory: Trajectory) -> Result:
        shared = []
        for p in self.ps:
            sets = top(trajectory.scores, p)
            shared.append(overlap(sets[:1], sets).T)
        values = np.stack(shared, -1)
        # Step 0 is the prompt row itself.
        values[:, 0] = np.nan
        return values, None
