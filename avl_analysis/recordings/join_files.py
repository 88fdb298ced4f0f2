"""Joining the recordings of many shards into one file without holding them all.

`merge` in recording.py does the same in memory. Here the stored values are copied as they are, one
variable of one shard at a time: a first look at all shards finds out which variables there are and
how large they get, then the file is laid out and filled. What a shard lacks (nothing about pictures
where none of its samples had one) or has shorter is filled with the variable's own fill value, as
stacking single samples does.

The file is laid out through h5netcdf, which knows what makes an HDF5 file a netCDF file, and filled
through h5py, which is many times faster for many small variables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np

from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.files import hdf5_for_writing
from avl_analysis.recordings.checks import digest
from avl_analysis.recordings.schema import FACTS_DIGEST, GROUPS, RAGGED, RecordingError

_SAMPLE = "sample"
_SAME = ("model", "model_type", "model_revision", "statistics", "policy")
# Attributes that HDF5 and netCDF keep for themselves; h5netcdf writes them anew.
_INTERNAL = frozenset(
    [
        "CLASS",
        "NAME",
        "DIMENSION_LIST",
        "REFERENCE_LIST",
        "_Netcdf4Dimid",
        "_Netcdf4Coordinates",
        "_NCProperties",
    ]
)
# The netCDF library writes this as the NAME of a dimension that has no labels.
_NO_VARIABLE = "This is a netCDF dimension but not a netCDF variable"


@dataclass(eq=False)
class _Variable:
    """How a variable is stored.

    Names of its dimensions, type, attributes, chunks of a shape, compression; and its values where
    they are the same in every shard.
    """

    dims: tuple[str, ...]
    dtype: np.dtype
    attrs: dict[str, Any]
    chunks: tuple[int, ...] | None
    shape: tuple[int, ...]
    compression: dict[str, Any]
    values: np.ndarray | None

    @property
    def fill(self) -> Any:
        """What stands where a sample has no value."""
        if h5py.check_string_dtype(self.dtype) is not None:
            return ""
        return self.attrs.get("fill", np.nan if self.dtype.kind == "f" else 0)


@dataclass(eq=False)
class _Plan:
    """Variables, sizes of dimensions and attributes of the joined file."""

    attrs: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, dict[str, _Variable]] = field(default_factory=dict)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    samples: int = 0


def join(
    files: Sequence[Path], target: Path, attrs: Mapping[str, Any], samples: int | None = None
) -> None:
    """Write one recording with the samples of all files, in the order of the files.

    Args:
        files: recordings, in order.
        target: the file to write.
        attrs: attributes of the result, over those of the first file.
        samples: how many samples the files must hold together; None if that is not known.

    Raises:
        RecordingError: files that are not recordings, or not of one model and one choice of
            statistics and layers.
        InputError: the target cannot be written; what it held before is unchanged.
    """
    # Two passes over the files: first only sizes, names and labels are read, so that the result can
    # be laid out; then values are copied file by file, and memory holds one file at a time.
    plan = _Plan()
    for file in files:
        with _opened(file) as source:
            _look(plan, source, file.name)
    if samples is not None and plan.samples != samples:
        raise RecordingError(
            f"the parts hold {plan.samples} samples, not the {samples} that were recorded: delete"
            f" {files[0].parent} and record again"
        )
    with hdf5_for_writing(target) as written:
        # h5netcdf makes dimensions as netCDF wants them; values are then written with h5py, whose
        # handles are cheap.
        with h5netcdf.File(written, "w") as joined:
            joined.attrs.update({**plan.attrs, **attrs})
            for group in plan.variables:
                _lay_out(plan, group, joined.create_group(group))
        with h5py.File(written, "r+") as joined:
            for file, start in zip(files, plan.starts, strict=True):
                with _opened(file) as source:
                    _fill(plan, source, joined, start)
            # The digest copied from the first file is of its facts alone; digests of parts cannot
            # be combined.
            if FACTS_DIGEST in joined.attrs:
                facts = joined["tokens/facts"].asstr()[...]
                joined.attrs[FACTS_DIGEST] = digest(map(str, facts))


@contextmanager
def _opened(file: Path) -> Iterator[h5py.File]:
    """The file; whatever is wrong with its content is said with its name."""
    remedy = ": delete it and its note, and record again"
    try:
        with blamed_on_input(f"{file} cannot be read", remedy), h5py.File(file, "r") as source:
            yield source
    except InputError as error:
        raise RecordingError(str(error)) from error


# -- looking ---------------------------------------------------------------------------------------


def _look(plan: _Plan, source: h5py.File, name: str) -> None:
    """Take a shard's variables and sizes into the plan."""
    found = {key: value for key, value in source.attrs.items() if key not in _INTERNAL}
    plan.attrs = plan.attrs or found
    for key in _SAME:
        if found.get(key) != plan.attrs.get(key):
            raise RecordingError(
                f"cannot join: {name} was recorded with another {key} ({found.get(key)}, not"
                f" {plan.attrs.get(key)}); delete the parts and record again"
            )
    count, names = 0, list[str]()
    for group in [group for group in GROUPS if group in source]:
        for variable, stored in _variables(source[group]):
            _note(plan, group, variable, stored, name)
            if variable == _SAMPLE:
                count = stored.shape[0]
                names = [_text(label) for label in stored[...]]
    if twice := plan.names & set(names):
        raise RecordingError(
            f"cannot join: {name} holds sample {min(twice)} again; delete it and its note, and"
            " record again"
        )
    plan.names |= set(names)
    plan.starts.append(plan.samples)
    plan.samples += count


def _variables(group: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    for name, stored in group.items():
        if isinstance(stored, h5py.Dataset) and not _text(stored.attrs.get("NAME", "")).startswith(
            _NO_VARIABLE
        ):
            yield name, stored


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _note(plan: _Plan, group: str, name: str, stored: h5py.Dataset, file: str) -> None:
    variables, sizes = plan.variables.setdefault(group, {}), plan.sizes.setdefault(group, {})
    known = variables.get(name)
    if known is None or 0 in known.shape:  # the type of nothing is arbitrary
        known = variables[name] = _describe(name, stored)
    elif 0 in stored.shape:
        return
    elif known.dtype != stored.dtype or len(known.shape) != stored.ndim:
        raise RecordingError(
            f"cannot join: {name} of {file} is stored otherwise than before; record again"
        )
    for dim, size in zip(known.dims, stored.shape, strict=True):
        if dim in RAGGED:
            sizes[dim] = max(size, sizes.get(dim, 0))
        elif dim != _SAMPLE and sizes.setdefault(dim, size) != size:
            raise RecordingError(
                f"cannot join: {dim} has {size} entries in {file}, {sizes[dim]} before; record"
                " again"
            )
    if known.values is not None and not np.array_equal(known.values, stored[...]):
        raise RecordingError(
            f"cannot join: {file} labels {name} differently; record all with the same options"
        )


def _describe(name: str, stored: h5py.Dataset) -> _Variable:
    # A dimension's own labels are a scale: other variables refer to it, and it refers to none.
    if stored.attrs.get("CLASS") == b"DIMENSION_SCALE":
        dims: tuple[str, ...] = (name,)
    else:
        dims = tuple(dim[0].name.rsplit("/", 1)[-1] for dim in stored.dims)
    compression = {}
    if stored.chunks is not None and stored.compression is not None:
        compression = {
            "compression": stored.compression,
            "compression_opts": stored.compression_opts,
            "shuffle": stored.shuffle,
        }
    # Labels that are the same in every shard are kept and compared; ragged dimensions are numbered.
    shared = _SAMPLE not in dims and not RAGGED & set(dims)
    attrs = {key: value for key, value in stored.attrs.items() if key not in _INTERNAL}
    values = stored[...] if shared else None
    return _Variable(dims, stored.dtype, attrs, stored.chunks, stored.shape, compression, values)


# -- writing ---------------------------------------------------------------------------------------


def _lay_out(plan: _Plan, group: str, target: Any) -> None:
    """Make the dimensions and variables of a group, and write what belongs to no sample."""
    sizes = {**plan.sizes[group], _SAMPLE: plan.samples}
    variables = plan.variables[group]
    for dim in dict.fromkeys(dim for variable in variables.values() for dim in variable.dims):
        target.dimensions[dim] = sizes[dim]
    for name, variable in variables.items():
        options = dict(variable.compression)
        if options and variable.chunks is not None:
            # A chunk that covered a whole dimension of the shard covers that of the result.
            options["chunks"] = tuple(
                sizes[dim] if chunk == length and dim != _SAMPLE else min(chunk, sizes[dim])
                for dim, chunk, length in zip(
                    variable.dims, variable.chunks, variable.shape, strict=True
                )
            )
        attrs = dict(variable.attrs)
        if "_FillValue" in attrs:
            options["fillvalue"] = attrs.pop("_FillValue")
        text = h5py.check_string_dtype(variable.dtype) is not None
        dtype = h5py.string_dtype() if text else variable.dtype
        made = target.create_variable(name, variable.dims, dtype=dtype, **options)
        made.attrs.update(attrs)
        if variable.values is not None:
            made[...] = variable.values
        elif _SAMPLE not in variable.dims:
            # A ragged dimension's labels, as long as the longest sample of all shards.
            made[...] = np.arange(sizes[variable.dims[0]], dtype=variable.dtype)


def _fill(plan: _Plan, source: h5py.File, target: h5py.File, start: int) -> None:
    """Copy the values of a shard's samples to where they belong."""
    for group, variables in plan.variables.items():
        here = dict(_variables(source[group])) if group in source else {}
        count = here[_SAMPLE].shape[0] if _SAMPLE in here else 0
        for name, variable in variables.items():
            if _SAMPLE not in variable.dims:
                continue
            into = target[group][name]
            # As many samples as the shard has; every other dimension as long as in the result.
            shape = tuple(
                count if dim == _SAMPLE else into.shape[axis]
                for axis, dim in enumerate(variable.dims)
            )
            values = np.full(
                shape, variable.fill, dtype=object if variable.dtype.kind == "O" else variable.dtype
            )
            if name in here:
                # Shorter samples are padded with the variable's own fill value, as `schema.stack`
                # does.
                values[tuple(slice(0, size) for size in here[name].shape)] = here[name][...]
            into[
                tuple(
                    slice(start, start + count) if dim == _SAMPLE else slice(None)
                    for dim in variable.dims
                )
            ] = values
