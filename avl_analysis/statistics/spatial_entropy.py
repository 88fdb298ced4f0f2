"""Spatial entropy: whether a head looks at one place of the picture or at many. Speaks about which
heads are visual.
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
    """Entropy, in nats, of how the attention above the picture's mean spreads over connected
    patches (8 neighbours), from the last prompt row; 0 = one place. Mean over the sample's pictures
    with a known grid, NaN without one.
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
        last = trajectory.last  # (layers, heads, image tokens)
        grids = [
            grid
            for picture in np.unique(trajectory.image)
            if (grid := self._grid(trajectory, picture)) is not None
        ]
        values = np.full((len(grids), *last.shape[:2]), np.nan)
        for g, (places, shape) in enumerate(grids):
            for head in np.ndindex(last.shape[:2]):
                picture = np.zeros(shape)
                picture[places[:, 0], places[:, 1]] = last[head][places[:, 2]]
                values[g][head] = entropy_of_places(picture)
        return (values.mean(0) if grids else np.full(last.shape[:2], np.nan)), None

    def _grid(
        self, trajectory: Trajectory, picture: int
    ) -> tuple[np.ndarray, tuple[int, int]] | None:
        """Row, column and index of the tokens of one picture, and the size of its grid."""
        at = np.flatnonzero((trajectory.image == picture) & (trajectory.row >= 0))
        if not len(at):
            return None
        places = np.stack([trajectory.row[at], trajectory.column[at], at], 1).astype(int)
        return places, (int(places[:, 0].max()) + 1, int(places[:, 1].max()) + 1)


def entropy_of_places(picture: np.ndarray) -> float:
    """Of one map, (rows, columns); NaN if it is not a number or has nothing above its mean."""
    above = np.clip(picture - picture.mean(), 0, None)
    if not above.sum() > 0:
        return float("nan")
    labels, count = ndimage.label(above > 0, structure=_NEIGHBOURS)
    mass = ndimage.sum_labels(above, labels, np.arange(1, count + 1))
    share = mass / mass.sum()
    return float(-(share * np.log(share)).sum())
