"""Layer agreement: whether the ranking of one early layer speaks for the later ones.

Speaks about P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from avl_analysis.statistics.base import Axes, Result, Trajectory, TrajectoryStatistic
from avl_analysis.statistics.top_sets import overlap, top


@dataclass(frozen=True)
class LayerAgreement(TrajectoryStatistic):
    """PPCI between the prefill filter's layer and every layer behind it.

    Both at the last prompt row; baseline p.

    `prefill_layer` counts as the policy's does: 2 is the second layer, number 1. NaN for it and the
    layers before, and everywhere if it was not recorded.
    """

    name = "layer_agreement"
    title = "overlap of the top image tokens with the prefill filter's layer"
    source = "Chen et al., FastV (ECCV 2024)"
    justifies = "P"
    axes: ClassVar[Axes] = {"p": "ps"}
    random_baseline: ClassVar[str] = "p"

    prefill_layer: int = 2
    ps: tuple[float, ...] = (0.1, 0.3, 0.5)

    def value(self, trajectory: Trajectory) -> Result:
        reference, first = self.prefill_layer - 1, trajectory.scores[0]
        agreement = np.full((len(trajectory.layers), len(self.ps)), np.nan)
        if reference in trajectory.layers:
            # Policies count layers from 1; `prefill_layer` 2 is the layer of number 1.
            later = np.array(trajectory.layers) > reference
            for i, p in enumerate(self.ps):
                sets = top(first, p)
                agreement[later, i] = overlap(sets[trajectory.layers.index(reference)], sets)[later]
        return agreement, None
