"""What is kept of a model's quality at what share of the bytes, for several policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avl_analysis.figures.spec import Axis, Points, Scatter


@dataclass(frozen=True)
class Place:
    """One policy: its share of the full cache's bytes, a quality with its interval, and its style.

    `slot` is the number of the style in the palette; None takes the next one.
    """

    name: str
    share: float
    value: float
    low: float
    high: float
    slot: int | None = None


def tradeoff(places: Sequence[Place], quality: Axis, title: str = "") -> Scatter:
    """Quality against bytes, one point with its interval per policy.

    Places without a value are left out.
    """
    known = [place for place in places if np.isfinite(place.value)]
    points = tuple(
        _point(place, number if place.slot is None else place.slot)
        for number, place in enumerate(known, start=1)
    )
    share = Axis("bytes of keys and values held", "share of the full cache", (0.0, 1.08))
    return Scatter(share, quality, points, title=title)


def _point(place: Place, slot: int) -> Points:
    known = bool(np.isfinite([place.low, place.high]).all())
    # A spec takes both ends of an interval or none.
    low, high = (np.array([place.low]), np.array([place.high])) if known else (None, None)
    return Points(
        place.name, np.array([place.share]), np.array([place.value]), low, high, slot=slot
    )
