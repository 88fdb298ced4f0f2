"""How the arrays of a recording are cut and compressed in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

LEAST_CHUNK = 1 << 16
"""Bytes; chunks of a file are not made smaller than this."""


def as_netcdf(groups: Mapping[str, xr.Dataset]) -> dict[str, dict[str, dict[str, Any]]]:
    """Group -> variable -> how xarray is to store it in a netCDF file."""
    return {
        name: {str(v): _compressed(dataset[v]) for v in dataset.data_vars}
        for name, dataset in groups.items()
    }


def chunks(groups: Mapping[str, xr.Dataset]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Group -> variable -> shape of its pieces, for the variables that are cut."""
    shapes = {
        name: {str(v): _chunk(dataset[v]) for v in dataset.data_vars}
        for name, dataset in groups.items()
    }
    return {
        name: {v: shape for v, shape in of_group.items() if shape is not None}
        for name, of_group in shapes.items()
    }


def _chunk(variable: xr.DataArray) -> tuple[int, ...] | None:
    """The shape of one piece; None for an array that is kept in one.

    Arrays per head and key are cut so that one head can be read alone, if that is worth a chunk.
    """
    if variable.dtype == object or variable.ndim < 2 or variable.size == 0:
        return None
    if "head" not in variable.dims or not {"position", "token"} & set(variable.dims):
        return None
    sizes = dict(variable.sizes)
    chunk = {
        dim: 1 if dim in ("sample", "layer", "head", "rows") else size
        for dim, size in sizes.items()
    }
    # A chunk begins as one head of one layer of one sample and is extended until it is large
    # enough, heads last, so that a head can be read alone as long as possible.
    for dim in ("rows", "layer", "sample", "head"):
        if dim in chunk and np.prod(list(chunk.values())) * variable.dtype.itemsize < LEAST_CHUNK:
            chunk[dim] = sizes[dim]
    return tuple(chunk[dim] for dim in variable.dims)


def _compressed(variable: xr.DataArray) -> dict[str, Any]:
    if variable.dtype == object or variable.ndim < 2 or variable.size == 0:
        return {}
    # Shuffling puts bytes of equal significance side by side, which compress better.
    encoding: dict[str, Any] = {"zlib": True, "complevel": 4, "shuffle": True}
    if (shape := _chunk(variable)) is not None:
        encoding["chunksizes"] = shape
    if variable.dtype.kind == "f":
        encoding["_FillValue"] = np.nan
    return encoding
