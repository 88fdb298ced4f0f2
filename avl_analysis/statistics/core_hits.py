"""Core hit rate: how good a core is that was chosen some steps ago. Speaks about K."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from avl_analysis.statistics.base import Result, Trajectory, TrajectoryStatistic
from avl_analysis.statistics.top_sets import overlap, top


@dataclass(frozen=True)
class CoreHitRate(TrajectoryStatistic):
    """What a core chosen `core_age` token-producing rows earlier still holds, by decode step.

    recall: `|core & true core| / |core|`, random baseline C. mass: share of the step's image
    attention on the old core, random baseline C; at age 0 it is the best any core of this size can
    do. Core sizes are fractions of the image tokens.
    """

    name = "core_hit_rate"
    title = "caught by a core chosen this many steps ago"
    source = "the core of Zhang et al., A-VL (AAAI 2025), refreshed every K steps"
    justifies = "K"
    dims: ClassVar[tuple[str, ...]] = ("layer", "core_age")

    fractions: tuple[float, ...] = (0.1, 0.3, 0.5)
    ages: int = 32

    def labels(self) -> Mapping[str, Sequence[Any]]:
        return {"core_age": range(self.ages)}

    def extra(self) -> Mapping[str, Sequence[Any]]:
        return {"core": self.fractions, "hit": ("recall", "mass")}

    def field(self, *dims: str, **attrs: Any) -> Any:
        return super().field(*dims, random_baseline="core", **attrs)

    def value(self, trajectory: Trajectory) -> Result:
        scores = trajectory.scores  # (steps, layers, image tokens)
        shape = (scores.shape[1], self.ages, len(self.fractions), 2)
        sums, counts = np.zeros(shape), np.zeros(shape)
        total = scores.sum(-1)
        for f, fraction in enumerate(self.fractions):
            sets = top(scores, fraction)
            for age in range(min(self.ages, len(scores))):
                start = max(age, 1)  # evaluated at decode steps only
                chosen, now = sets[start - age : len(sets) - age], slice(start, None)
                recall = overlap(chosen, sets[now])
                with np.errstate(
                    invalid="ignore", divide="ignore"
                ):  # a step without image attention has no share
                    mass = (chosen * scores[now]).sum(-1) / total[now]
                for h, hit in enumerate((recall, mass)):
                    sums[:, age, f, h], counts[:, age, f, h] = (
                        np.nansum(hit, 0),
                        (~np.isnan(hit)).sum(0),
                    )
        return sums, counts
