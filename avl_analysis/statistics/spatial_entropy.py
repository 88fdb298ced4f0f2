"""Spatial entropy: whether a head looks at one place of the image or at many.

Speaks about which heads are visual.

Tokens are put into the finest grid of their image by their row and column, whatever their order:
tiles do not come in raster order, and class tokens, newline tokens and a coarser view of the whole
image have no place in that grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import ndimage

from avl_analysis.statistics.base import Result, Trajectory, TrajectoryStatistic

_NEIGHBOURS = np.ones((3, 3), int)


@dataclass(frozen=True)
class SpatialEntropy(TrajectoryStatistic):
    """Entropy, in nats, of attention above the image's mean over connected patches.

    Patches have 8 neighbours; from the last prompt row; 0 = one place.

    Mean over the sample's images, and frames of videos, whose grid is known; NaN without one.
    """

    name = "spatial_entropy"
    title = "entropy over attended places"
    unit = "nat"
    source = (
        "Kang et al., Your large vision-language model only needs a few attention heads"
        " (2503.06287)"
    )
    justifies = "head taxonomy"
    dims: ClassVar[tuple[str, ...]] = ("layer", "head")

    def value(self, trajectory: Trajectory) -> Result:
        heads = trajectory.last.shape[:2]
        values = []
        known = trajectory.row >= 0
        grids = set(zip(trajectory.image[known], trajectory.frame[known], strict=True))
        for image, frame in sorted(grids):
            of_grid = (trajectory.image == image) & (trajectory.frame == frame)
            placed = np.flatnonzero(of_grid & known)
            row, column = trajectory.row[placed], trajectory.column[placed]
            # (layers, heads, rows, columns); places without a token have no attention.
            grid = np.zeros((*heads, int(row.max()) + 1, int(column.max()) + 1))
            grid[..., row, column] = trajectory.last[..., placed]
            entropies = [entropy_of_places(grid[head]) for head in np.ndindex(heads)]
            values.append(np.reshape(entropies, heads))
        return (np.mean(values, 0) if values else np.full(heads, np.nan)), None


def entropy_of_places(weights: np.ndarray) -> float:
    """Of one map, (rows, columns); NaN if it is not a number or has nothing above its mean."""
    above = np.clip(weights - weights.mean(), 0, None)
    if not above.sum() > 0:
        return float("nan")
    labels, count = ndimage.label(above > 0, structure=_NEIGHBOURS)
    mass = ndimage.sum_labels(above, labels, np.arange(1, count + 1))
    share = mass / mass.sum()
    return float(-(share * np.log(share)).sum())
