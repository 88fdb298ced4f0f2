"""Pictures of a recording from one line of Python.

    plot(recording, "modality_mass", by="layer")
    plot_heads(recording, "modality_mass/image").save("heads.svg")

Each function computes means with intervals, describes a figure and returns it as a `Plot`, which
shows itself in a notebook and saves itself as SVG, PDF, PNG, HTML or CSV. Questions, findings and
verdicts are the business of the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from avl_analysis.errors import InputError
from avl_analysis.figures import Axis, Bar, Bars, Caption, Figure, Heat, Line, Lines, Rule, palette
from avl_analysis.figures.looks import head_map
from avl_analysis.figures.plot import Plot
from avl_analysis.heads import taxonomy
from avl_analysis.intervals import mean_intervals
from avl_analysis.recordings.recording import Recording

_SLOTS = {"system": palette.SYSTEM, "image": palette.IMAGE, "text": palette.TEXT}
_AXES = {
    "layer": Axis("layer", "index"),
    "head": Axis("head", "index"),
    "step": Axis("decode step", "tokens"),
    "age": Axis("age of the text token", "tokens"),
}
_INTERVAL = "bands: 95 % intervals over samples"
_MOST_SERIES = 8
"""Labels of a further dimension up to which each becomes a line of its own."""


def plot(
    recording: Recording, name: str, by: str | Sequence[str] | None = None, **labels: Any
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
    array = _statistic(recording, name)
    labels, rows = _labels(array, labels, by)
    array = array.sel(labels)
    kept = _dimensions(array, by)
    averaged = ("sample", "layer", "head", "step")
    others = [dim for dim in map(str, array.dims) if dim not in (*averaged, *kept)]
    title, unit = (
        str(array.attrs.get("long_name", name)),
        str(array.attrs.get("units") or "dimensionless"),
    )
    value = Axis(title, unit)
    mean = recording.estimate(name, [*kept, *others], **labels)
    if len(kept) == 2:
        panels: tuple[Any, ...] = tuple(
            _map(part, kept, value, label) for label, part in _parts(mean, others)
        )
    else:
        panels = (_lines(mean, kept[0], others, value),)
    figure = Figure(
        _stem(name),
        title,
        panels,
        _caption(recording, f"Mean of {title}{rows}."),
    )
    return Plot(figure)


def plot_heads(
    recording: Recording, measure: str = "modality_mass/image", step: int | None = None
) -> Plot:
    """One number per head as a map of layers and heads.

    Args:
        recording: what `record` or `load_recording` gave.
        measure: a statistic with layers and heads; where it has a further dimension, a slash and
            the label, e.g. "modality_mass/image", "recent_text_mass/16".
        step: a single answer token (0 is the first); None for the mean over decode steps.

    Raises:
        InputError: the recording holds no such measure; the message lists those it holds.
    """
    chosen = taxonomy.measure(recording, measure)
    values = taxonomy.matrix(recording, chosen, step)
    layers = [int(layer) for layer in recording[chosen.name]["layer"].values]
    panel = head_map(values, layers, Axis(chosen.title, chosen.unit))
    of = "decode steps" if step is None else f"answer token {step}"
    figure = Figure(
        _stem(measure),
        f"{chosen.title}, by layer and head",
        (panel,),
        _caption(
            recording, f"Mean of {chosen.title} over samples and {of}.", interval="no interval"
        ),
    )
    return Plot(figure)


def plot_knockout(result: xr.Dataset, variable: str = "log_prob_change") -> Plot:
    """What an answer loses when a flow of attention is cut, by layer, one line per flow.

    Args:
        result: what `heads.knockout.knockout` or `load_knockout` gave.
        variable: "log_prob_change" (nats per answer token), "probability" or "same_answer" (share
            of answers that greedy decoding would still give).

    Raises:
        InputError: another variable.
    """
    titles = {
        "log_prob_change": Axis("change of the answer's log-probability", "nats per token"),
        "probability": Axis("probability of the answer", "share"),
        "same_answer": Axis("answers that stay the same", "share", (0.0, 1.05)),
    }
    if variable not in titles:
        raise InputError(f"unknown variable {variable!r}: choose one of {', '.join(titles)}")
    layers = result["layer"].values.astype(float)
    lines = []
    for place, flow in enumerate(result["flow"].values):
        means = mean_intervals(result[variable].sel(flow=flow).transpose("sample", ...))
        lines.append(Line(str(flow), layers, means.mean, means.low, means.high, slot=place + 1))
    window = int(result.attrs.get("window", 1))
    count = int(np.isfinite(result["plain_probability"]).sum())
    first = "layer" if window == 1 else f"first of {window} layers"
    caption = Caption(
        f"{titles[variable].label} when attention from the first group of tokens to the second is"
        f" cut in {window} layer(s); the model is led along its own answer.",
        max(count, 1),
        str(result.attrs.get("model", "unknown")),
        _INTERVAL,
    )
    panel = Lines(Axis(first, "index"), titles[variable], tuple(lines), (Rule(0.0, "", "y"),))
    return Plot(Figure(f"knockout_{variable}", "Attention knock-out", (panel,), caption))


def knockout_table(result: xr.Dataset) -> pd.DataFrame:
    """Mean change of the answer's log-probability, a row per flow and a column per layer."""
    return result["log_prob_change"].mean("sample").to_pandas()


def _statistic(recording: Recording, name: str) -> xr.DataArray:
    if not len(recording):
        raise InputError("nothing was recorded: call the model inside the with block first")
    if name not in recording.names:
        raise InputError(f"this recording holds no {name!r}; it holds {', '.join(recording.names)}")
    return recording[name]


def _labels(
    array: xr.DataArray, labels: dict[str, Any], by: str | Sequence[str] | None
) -> tuple[dict[str, Any], str]:
    """The labels to select, decode steps included, and words that say which rows these are."""
    for dim, label in labels.items():
        if dim not in array.dims:
            known = ", ".join(str(d) for d in array.dims if d != "sample")
            raise InputError(f"{array.name} has no dimension {dim!r}; it has {known}")
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
    return _SLOTS.get(label, place + 1)


def _word(dim: str, label: Any) -> str:
    return label if isinstance(label, str) else f"{dim.replace('_', ' ')} {label:g}"


def _stem(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name.lower()).strip("_")


def _caption(recording: Recording, what: str, interval: str = _INTERVAL) -> Caption:
    one = len(recording) == 1
    return Caption(
        what,
        len(recording),
        str(recording.attrs.get("model", "unknown")),
        "one sample has no interval" if one else interval,
    )
