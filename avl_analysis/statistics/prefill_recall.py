"""Prefill recall: what the tokens kept after prefill still catch while decoding. Speaks about S."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from avl_analysis.statistics.base import Axes, Result, Trajectory, TrajectoryStatistic
from avl_analysis.statistics.top_sets import overlap, top


@dataclass(frozen=True)
class PrefillRecall(TrajectoryStatistic):
    """Share of a decode step's best `core` image tokens among the last prompt row's `secondary`.

    Over all decode steps: `|core & secondary| / |core|`; random baseline: secondary.
    """

    name = "prefill_recall"
    title = "share of the decode-time core that prefill keeps"
    source = "Tu et al., VL-Cache (ICLR 2025), hit rate"
    justifies = "S"
    dims: ClassVar[tuple[str, ...]] = ("layer",)
    axes: ClassVar[Axes] = {"secondary": "secondaries", "decode_core": "cores"}
    random_baseline: ClassVar[str] = "secondary"

    secondaries: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(1, 21))
    cores: tuple[float, ...] = (0.1, 0.3)

    def value(self, trajectory: Trajectory) -> Result:
        shape = (trajectory.scores.shape[1], len(self.secondaries), len(self.cores))
        sums, counts = np.zeros(shape), np.zeros(shape)
        # (decode steps, layers, image tokens) each
        cores = [top(trajectory.scores[1:], core) for core in self.cores]
        for s, secondary in enumerate(self.secondaries):
            kept = top(trajectory.scores[:1], secondary)
            for c, core in enumerate(cores):
                recall = overlap(core, np.broadcast_to(kept, core.shape))  # (decode steps, layers)
                sums[:, s, c], counts[:, s, c] = np.nansum(recall, 0), (~np.isnan(recall)).sum(0)
        return sums, counts


@dataclass(frozen=True)
class PrefillMass(TrajectoryStatistic):
    """Share of the decode steps' image attention on the prompt's best `secondary` tokens.

    All decode steps together; the best image tokens of the last prompt row. In [0, 1]; random
    baseline: secondary. NaN without decode steps.
    """

    name = "prefill_mass"
    title = "share of the decode-time image attention that prefill keeps"
    source = "Tu et al., VL-Cache (ICLR 2025), hit rate"
    justifies = "S"
    axes: ClassVar[Axes] = {"secondary": "secondaries"}
    random_baseline: ClassVar[str] = "secondary"

    secondaries: tuple[float, ...] = PrefillRecall.secondaries

    def value(self, trajectory: Trajectory) -> Result:
        received = trajectory.scores[1:].sum(0, dtype=np.float64)  # (layers, image tokens)
        total = received.sum(-1)
        share = np.full((len(received), len(self.secondaries)), np.nan)
        for s, secondary in enumerate(self.secondaries):
            kept = (top(trajectory.scores[0], secondary) * received).sum(-1)
            share[:, s] = np.divide(kept, total, out=np.full_like(total, np.nan), where=total > 0)
        return share, None
