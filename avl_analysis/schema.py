"""Names, dimensions and labels of everything a recording holds; the one vocabulary of statistics, files and figures.

Arrays are described by `Field`s: the dimensions in words, unit, range and meaning. Dimensions in `RAGGED` differ in
length between samples; stacking pads them with the field's fill value (NaN where there is a number to be missing).

The words used everywhere:
    sample          one row of one prefill, by its name
    layer, head     decoder layer and query head, counted from 0
    step            rows that produce a token: 0 is the last prompt row, t >= 1 the t-th decode step
    query_modality  what the query token is, for prompt rows; `key_modality` what the key is: system, image, text
    position        place among a sample's tokens, padding left out, generated tokens included
    token           i-th image token of the sample's prompt, in raster order, all pictures in a row
    rows            which query rows a sum runs over: "prompt", "prompt text", "decode"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from avl.tokens import MODALITIES
from avl_analysis.errors import InputError

FORMAT = "avl-recording"
VERSION = 1
"""Version of the file layout; a file of another version is refused."""

RAGGED = frozenset({"step", "position", "token", "picture", "query", "key"})
ROWS = ("prompt", "prompt text", "decode")
GROUPS = ("tokens", "sums", "statistics", "maps", "attention")
"""Groups of a recording: what the tokens are; additive sums with their counts (`<name>_count`); values per sample that
are exact as they stand; image-token scores to draw over pictures; raw attention slices."""

FIXED: Mapping[str, Sequence[Any]] = {"query_modality": MODALITIES, "key_modality": MODALITIES, "rows": ROWS}
"""Labels of dimensions that are the same in every recording."""


class RecordingError(InputError):
    """A recording cannot be read, joined or asked for this; the message says what to do instead."""


@dataclass(frozen=True)
class Field:
    """What an array is.

    Attributes:
        dims: names of its dimensions, without the leading `sample`.
        fill: stands where a sample has no value.
        coords: labels of dimensions that only this field (and its like) has, e.g. tau of coverage.
        attrs: long_name, units, range, source, ... as stored with the array.
    """

    dims: tuple[str, ...]
    fill: Any = np.nan
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)


Part = dict[str, dict[str, tuple[Field, np.ndarray]]]
"""One sample: group -> name -> (field, array without the sample dimension)."""


def stack(parts: Sequence[Part], names: Sequence[str], coords: Mapping[str, Sequence[Any]]) -> dict[str, xr.Dataset]:
    """Datasets of several samples, padded where they differ in length; `coords` labels the dimensions all share."""
    groups: dict[str, xr.Dataset] = {}
    for group in GROUPS:
        variables: dict[str, xr.DataArray] = {}
        for name in dict.fromkeys(name for part in parts for name in part.get(group, {})):
            held = [part.get(group, {}).get(name) for part in parts]
            one = next(entry[0] for entry in held if entry is not None)
            variables[name] = _stack_field(one, [None if entry is None else entry[1] for entry in held])
        dataset = xr.Dataset(variables)
        labels = {"sample": np.array(list(names), dtype=object), **FIXED, **coords}
        dataset = dataset.assign_coords({dim: np.asarray(v) for dim, v in labels.items() if dim in dataset.dims})
        for dim in RAGGED & set(dataset.dims):
            dataset = dataset.assign_coords({dim: np.arange(dataset.sizes[dim])})
        groups[group] = dataset
    return groups


def _stack_field(one: Field, arrays: Sequence[np.ndarray | None]) -> xr.DataArray:
    present = [array for array in arrays if array is not None]
    shape = tuple(max(sizes) for sizes in zip(*(a.shape for a in present), strict=True))
    dtype = np.result_type(*present)
    if len(present) == len(arrays) == 1:
        stacked = present[0][None]
    else:
        stacked = np.full((len(arrays), *shape), one.fill, dtype=dtype)
        for index, array in enumerate(arrays):
            if array is not None:
                stacked[(index, *(slice(n) for n in array.shape))] = array
    coords = {dim: np.asarray(labels) for dim, labels in one.coords.items()}
    return xr.DataArray(stacked, dims=("sample", *one.dims), coords=coords, attrs={**one.attrs, "fill": one.fill})


def concatenate(datasets: Sequence[xr.Dataset], what: str) -> xr.Dataset:
    """Samples of several datasets behind one another; exact, everything but ragged dimensions must agree.

    Raises:
        RecordingError: if they hold different variables, layers, heads or labels.
    """
    first = datasets[0]
    for other in datasets[1:]:
        if set(other.data_vars) != set(first.data_vars):
            differing = sorted(set(map(str, other.data_vars)) ^ set(map(str, first.data_vars)))
            raise RecordingError(f"cannot merge: {', '.join(differing)} ({what}) are in some of the recordings only")
        for dim in set(first.dims) - RAGGED - {"sample"}:
            if not np.array_equal(np.asarray(first[dim]), np.asarray(other[dim])):
                raise RecordingError(
                    f"cannot merge: the recordings differ in {dim} ({_some(first[dim])} and {_some(other[dim])}); "
                    "record them with the same model, layers and options"
                )
    sizes = {dim: max(d.sizes[dim] for d in datasets) for dim in RAGGED & set(first.dims)}
    grown = [_grow(dataset, sizes) for dataset in datasets]
    return xr.concat(grown, dim="sample", join="exact", data_vars="all", combine_attrs="override")


def _grow(dataset: xr.Dataset, sizes: Mapping[str, int]) -> xr.Dataset:
    """Pad the ragged dimensions of every variable to `sizes` with the variable's own fill value."""
    wanted = {dim: np.arange(n) for dim, n in sizes.items()}
    fills = {name: variable.attrs.get("fill", np.nan) for name, variable in dataset.data_vars.items()}
    return dataset.reindex(wanted, fill_value=fills) if wanted else dataset


def _some(labels: Iterable[Any]) -> str:
    values = [str(v) for v in np.asarray(labels)]
    return ", ".join(values[:6]) + (f", ... ({len(values)})" if len(values) > 6 else "")
