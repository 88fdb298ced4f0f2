"""A statistic of a recording, drawn along one or two of its dimensions.

Behind `avl_analysis.plot`, and behind what a recording shows of itself in a notebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from avl_analysis.errors import InputError
from avl_analysis.figures import Axis, Bar, Bars, Caption, Figure, Heat, Line, Lines, palette
from avl_analysis.figures.plot import Plot
from avl_analysis.intervals import METHOD
from avl_analysis.recordings.readable import Readable

_AXES = {
    "layer": Axis("layer", "index"),
    "head": Axis("head", "index"),
    "step": Axis("decode step", "tokens"),
    "age": Axis("age of the text token", "tokens"),
    "frame": Axis("frame of the video", "index"),
    "frame_lag": Axis("distance in time", "frames"),
}

_MOST_SERIES = 8
"""Labels of a further dimension up to which each becomes a line of its own."""


def plot(
    recording: Readable, name: str, by: str | Sequence[str] | None = None, **labels: Any
) -> Plot:
    """A statistic along one dimension as lines, or along two as a map.

    Each sample counts once: it is averaged over every dimension that is not drawn. Where a
    statistic has decode steps and `by` is not "step", the mean runs over decode steps only, without
    step 0, the last prompt row.

    Args:
        recording: what `record` or `load_recording` gave.
        name: one of `recording.names`.
        by: one dimension (lines, or bars where its labels are words) or two (a map: rows, columns).
            Default: "layer" if there is one, else the first dimension.
        labels: select these labels before averaging, e.g. `key_modality="image"`, `step=0`.

    Raises:
        InputError: an unknown statistic, dimension or label, or nothing was recorded.

    Example:
        `plot(recording, "modality_mass", by=("layer", "step"), key_modality="image")`
    """
    array = statistic_of(recording, name)
    labels, rows = chosen_labels(array, labels, by)
    array = array.sel(labels)
    kept = _dimensions(array, by)
    # What is neither averaged over nor drawn gets a line or a map for each of its labels.
    averaged = ("sample", "layer", "head", "step")
    others = [dim for dim in map(str, array.dims) if dim not in (*averaged, *kept)]
    title, unit = (
        str(array.attrs.get("long_name", name)),
        str(array.attrs.get("units") or "dimensionless"),
    )
    value = Axis(title, unit)
    # The estimate selects the labels itself; `array` only told which dimensions are left.
    mean = recording.estimate(name, [*kept, *others], **labels)
    if len(kept) == 2:
        panels: tuple[Any, ...] = tuple(
            _map(part, kept, value, label) for label, part in _parts(mean, others)
        )
    else:
        panels = (_lines(mean, kept[0], others, value),)
    figure = Figure(
        stem(name),
        title,
        panels,
        caption_of(recording, f"Mean of {title}{rows}."),
    )
    return Plot(figure)


def statistic_of(recording: Readable, name: str) -> xr.DataArray:
    """One statistic of a recording.

    Raises:
        InputError: nothing was recorded, or not this statistic.
    """
    if not len(recording):
        raise InputError("nothing was recorded: call the model inside the with block first")
    if name not in recording.names:
        raise InputError(f"this recording holds no {name!r}; it holds {', '.join(recording.names)}")
    return recording[name]


def chosen_labels(
    array: xr.DataArray, labels: dict[str, Any], by: str | Sequence[str] | None
) -> tuple[dict[str, Any], str]:
    """The labels to select, decode steps included, and words that say which rows these are.

    Args:
        array: a statistic.
        labels: what the caller selects.
        by: what is drawn by.

    Raises:
        InputError: a dimension or a label that the statistic does not have.
    """
    for dim, label in labels.items():
        if dim not in array.dims:
            known = ", ".join(str(d) for d in array.dims if d != "sample")
            raise InputError(f"{array.name} has no dimension {dim!r}; it has {known}")
        # A slice may reach beyond the labels there are.
        if not isinstance(label, slice) and label not in array[dim].values:
            known = ", ".join(map(str, array[dim].values[:12]))
            raise InputError(f"{dim} has no label {label!r}; it has {known}")
    wanted = (by,) if isinstance(by, str) else tuple(by or ())
    if "step" not in array.dims or "step" in wanted or "step" in labels:
        return labels, ""
    if array.sizes["step"] > 1:
        return {**labels, "step": slice(1, None)}, ", decode steps"
    return labels, ", last prompt row"


def _dimensions(array: xr.DataArray, by: str | Sequence[str] | None) -> list[str]:
    known = [str(dim) for dim in array.dims if dim != "sample"]
    if by is None:
        if not known:
            raise InputError(f"{array.name} is one number per sample; there is nothing to draw by")
        return ["layer"] if "layer" in known else known[:1]
    kept = [by] if isinstance(by, str) else list(by)
    unknown = [dim for dim in kept if dim not in known]
    if unknown or len(kept) not in (1, 2) or len(set(kept)) != len(kept):
        raise InputError(f"by={by!r}: choose one or two of {', '.join(known) or 'no dimension'}")
    return kept


def _parts(mean: xr.Dataset, dims: Sequence[str]) -> list[tuple[str, xr.Dataset]]:
    """The estimate for every label of `dims`, with the label in words."""
    if not dims:
        return [("", mean)]
    # Stacked only to list all combinations of labels; values are taken from the estimate itself.
    stacked = mean.stack(series=list(dims))
    count = stacked.sizes["series"]
    if count > _MOST_SERIES:
        raise InputError(
            f"there are {count} combinations of {', '.join(dims)}; choose labels, e.g."
            f" {dims[0]}={mean[dims[0]].values.tolist()[0]!r}"
        )
    return [
        (
            ", ".join(_word(dim, label) for dim, label in zip(dims, key, strict=True)),
            mean.sel(dict(zip(dims, key, strict=True))),
        )
        for key in stacked["series"].values
    ]


def _lines(mean: xr.Dataset, along: str, others: Sequence[str], value: Axis) -> Lines | Bars:
    parts = _parts(mean, others)
    places = mean[along].values
    # Words have no order that a line could follow.
    if not np.issubdtype(places.dtype, np.number):
        bars = tuple(
            Bar(label or value.label, *_bounds(part), slot=_slot(label, i))
            for i, (label, part) in enumerate(parts)
        )
        axis = Axis(along.replace("_", " "), "class")
        return Bars(axis, value, tuple(map(str, places)), bars)
    lines = tuple(
        Line(label or value.label, places.astype(float), *_bounds(part), slot=_slot(label, i))
        for i, (label, part) in enumerate(parts)
    )
    return Lines(_axis(along), value, lines)


def _map(part: xr.Dataset, kept: Sequence[str], value: Axis, title: str) -> Heat:
    rows, columns = kept
    part = part.transpose(rows, columns)
    values, low, high = (part[key].values for key in ("mean", "low", "high"))
    return Heat(_axis(columns, part), _axis(rows, part), value, values, low, high, title=title)


def _axis(dim: str, part: xr.Dataset | None = None) -> Axis:
    """The axis of a dimension; `part` gives the labels of a map's rows or columns."""
    known = _AXES.get(dim, Axis(dim.replace("_", " "), "label"))
    if part is None:
        return known
    labels = part[dim].values
    stride = max(1, -(-len(labels) // 12))  # at most a dozen ticks are readable
    ticks = tuple((float(i), str(labels[i])) for i in range(0, len(labels), stride))
    return Axis(known.label, known.unit, ticks=ticks)


def _bounds(part: xr.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return part["mean"].values, part["low"].values, part["high"].values


def _slot(label: str, place: int) -> int:
    return palette.MODALITY_SLOTS.get(label, place + 1)


def _word(dim: str, label: Any) -> str:
    return label if isinstance(label, str) else f"{dim.replace('_', ' ')} {label:g}"


def stem(name: str) -> str:
    """A name for files: small letters, digits and underscores."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name.lower()).strip("_")


def caption_of(recording: Readable, what: str, interval: str = METHOD) -> Caption:
    """What is shown, with the number of samples, the model and the method of the intervals.

    Args:
        recording: what is shown.
        what: a sentence that says what the numbers are.
        interval: how the intervals were made.
    """
    one = len(recording) == 1
    return Caption(
        what,
        len(recording),
        str(recording.attrs.get("model", "unknown")),
        "one sample has no interval" if one else interval,
    )
