"""Recordings as tables of text, one row per layer: what `avl stats` prints.

Each number is first averaged within a sample (over heads and, where there are any, decode steps),
then over samples; with at least five samples the 95 % bootstrap interval over samples stands behind
it, the one that the report draws for the same number. Half-lives are summarised by their median,
because they are infinite where nothing decays; how many are is said. A table is only a first look:
it leaves heads and steps to the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from avl_analysis.errors import InputError
from avl_analysis.intervals import Estimate, mean_interval, median_interval
from avl_analysis.recordings.recording import Recording

MEDIANS = ("half_life",)
"""Columns that are summarised by their median: quantities that may be infinite."""
MAX_VALUES = 12
"""Statistics with more values per layer than this are printed only when named."""


@dataclass(frozen=True)
class LayerTable:
    """One statistic, ready to print.

    Attributes:
        title: what it is, unit and range of rows.
        columns: label of each column.
        layers: label of each row.
        cells: text of each row and column; "-" where there is no value.
    """

    title: str
    columns: tuple[str, ...]
    layers: tuple[int, ...]
    cells: tuple[tuple[str, ...], ...]


def layer_tables(recording: Recording, names: Sequence[str] | None = None) -> list[LayerTable]:
    """Tables of the named statistics.

    None takes every one that has layers and few values per layer.

    Raises:
        InputError: a name the recording does not hold, or that has no layers.
    """
    tables = []
    for name in recording.names if names is None else names:
        if name not in recording.names:
            raise InputError(
                f"this recording holds no {name!r}; it holds {', '.join(recording.names)}"
            )
        array = recording[name]
        if names is None and bool(array.isnull().all()):
            continue  # what no sample has a value for, such as time without a video
        if "layer" in array.dims and (names is not None or _values_per_layer(array) <= MAX_VALUES):
            tables += _tables(name, array)
        elif names is not None:
            raise InputError(
                f"{name!r} has no layers (its dimensions: {', '.join(map(str, array.dims))})"
            )
    return tables


def _own(array: xr.DataArray) -> list[str]:
    """Dimensions that are neither averaged over nor rows.

    The last becomes columns, the others tables of their own.
    """
    return [str(dim) for dim in array.dims if dim not in ("sample", "layer", "head", "step")]


def _values_per_layer(array: xr.DataArray) -> int:
    return int(np.prod([array.sizes[dim] for dim in _own(array)]))


def _tables(name: str, array: xr.DataArray) -> list[LayerTable]:
    unit = f" in {array.attrs['units']}" if array.attrs.get("units") else ""
    title = f"{name}: {array.attrs.get('long_name', name)}{unit}"
    if "step" in array.dims:
        decoding = array.sizes["step"] > 1
        array = array.isel(step=slice(1, None)) if decoding else array
        title += ", decode steps" if decoding else ", last prompt row"
    return _split(title, array.mean([dim for dim in ("head", "step") if dim in array.dims]))


def _split(title: str, values: xr.DataArray) -> list[LayerTable]:
    own = _own(values)
    if len(own) > 1:
        labels = values[own[0]].values
        return [
            table
            for at in labels
            for table in _split(f"{title}, {own[0]} {at}", values.sel({own[0]: at}))
        ]
    flat = values.transpose("layer", "sample", *own).values
    # (layers, samples, columns)
    flat = flat.reshape(*flat.shape[:2], -1)
    columns = tuple(str(label) for label in values[own[0]].values) if own else ("value",)
    cells = tuple(
        tuple(_cell(column, label) for column, label in zip(layer.T, columns, strict=True))
        for layer in flat
    )
    return [
        LayerTable(title, columns, tuple(int(layer) for layer in values["layer"].values), cells)
    ]


def _cell(samples: np.ndarray, column: str) -> str:
    """Mean (or median) of the values there are, with its interval where there is one."""
    if column not in MEDIANS:
        return _shown(mean_interval(samples))
    infinite, known = int(np.isinf(samples).sum()), int((~np.isnan(samples)).sum())
    count = f", {infinite} of {known} infinite" if infinite else ""
    return f"{_shown(median_interval(samples))} (median{count})" if known else "-"


def _shown(found: Estimate[float]) -> str:
    if not found.n:
        return "-"
    spread = f" [{found.low:.3g}, {found.high:.3g}]" if found.low < found.high else ""
    return f"{found.mean:.3g}{spread}"
