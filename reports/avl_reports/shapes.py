"""Estimates as parts of figures: the curves, heat maps and axes that several figures share."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from avl_analysis.figures import Axis, Heat, Line, palette
from avl_analysis.intervals import Estimate
from avl_reports.run import Run

LAYER = Axis("layer", "index")
HEAD = Axis("head", "index")
STEP = Axis("decode step", "tokens")
SLOTS = palette.MODALITY_SLOTS
DECODE, LAST_ROW = "decode steps", "last prompt row"


def share(label: str) -> Axis:
    """An axis from 0 to 1."""
    return Axis(label, "share", (0.0, 1.0))


def log_share(label: str, lines: Iterable[Line]) -> Axis:
    """A logarithmic axis over the values of some lines.

    Intervals that reach towards zero do not stretch it.
    """
    # Means only: intervals may reach towards 0, where a logarithmic axis has no end.
    values = np.concatenate([line.y[np.isfinite(line.y) & (line.y > 0)] for line in lines])
    if not values.size:
        return share(label)
    return Axis(label, "share", (float(values.min()) / 2, float(values.max()) * 2), log=True)


def least(run: Run) -> int:
    """Samples that must reach a step, lag or age for it to be drawn.

    A tenth of them, between 2 and 10.
    """
    return max(2, min(10, run.n // 10)) if run.n > 1 else 1


def left_out(run: Run, what: str) -> str:
    """The sentence of a caption that says what is not drawn, with a space before it.

    Empty where everything is.
    """
    count = least(run)
    return f" {what} that fewer than {count} samples reach are left out." if count > 1 else ""


def curve(name: str, one: Estimate, along: str, slot: int = 0, first: float = 0.0) -> Line:
    """An estimate over one dimension as a line with its interval.

    `first` is added to the places.
    """
    x = np.asarray(one.mean[along].values, dtype=float) + first
    return Line(name, x, one.mean.values, one.low.values, one.high.values, slot=slot)


def modality_curves(
    estimate: Estimate, along: str, names: Iterable[str] = SLOTS
) -> tuple[Line, ...]:
    """One line per key modality, in the modality's colour."""
    return tuple(curve(name, estimate.at(key_modality=name), along, SLOTS[name]) for name in names)


def reached(estimate: Estimate, along: str) -> Estimate:
    """The estimate without the tail that too few samples reach."""
    other = [dim for dim in estimate.mean.dims if dim != along]
    # Places at which any of the other dimensions has a value. Gaps before the last one stay; one
    # place is kept where there is none, because a curve needs one.
    known = np.flatnonzero(np.isfinite(estimate.mean).any(other))
    stop = int(known[-1]) + 1 if known.size else 1
    return estimate.map(lambda part: part.isel({along: slice(0, stop)}))


def layer_head_map(estimate: Estimate, value: Axis, title: str) -> Heat:
    """An estimate over layer and head as a map; values are written in where there is room."""
    return matrix(estimate, "layer", "head", HEAD, LAYER, value, title)


def matrix(
    one: Estimate, rows: str, columns: str, x: Axis, y: Axis, value: Axis, title: str
) -> Heat:
    """An estimate over two dimensions as a map; values are written in where there is room."""
    values, low, high = (a.transpose(rows, columns).values for a in (one.mean, one.low, one.high))
    # (rows, columns); with more than twelve columns the numbers would not fit into the cells.
    return Heat(x, y, value, values, low, high, annotate=values.shape[1] <= 12, title=title)


def constant(name: str, x: np.ndarray, y: np.ndarray | float) -> Line:
    """What chance or a uniform map gives."""
    return Line(name, x, np.broadcast_to(np.asarray(y, dtype=float), x.shape), role="baseline")
