"""netCDF files: written whole or not at all, and read after a look at what they declare.

A small file can declare arrays of any size, take its content from other files, or hold groups that
contain each other. `check_hdf5` refuses these before anything is read; it needs only what the file
says about itself.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import h5netcdf
import h5py
import xarray as xr

from avl_analysis.errors import InputError
from avl_analysis.files import hdf5_for_writing, user_path

MOST_OBJECTS = 10_000
"""Groups and variables a file may hold; recordings have fewer than 200."""
MOST_DEPTH = 4
"""Groups within groups; recordings have one level."""


def write_netcdf(
    path: str | os.PathLike[str],
    groups: Mapping[str, xr.Dataset],
    encoding: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write datasets as groups of one netCDF file, whole or not at all.

    Args:
        path: the file; what it held before is replaced.
        groups: name -> dataset; "/" is the root, which must come first.
        encoding: name of a group -> variable -> how xarray is to store it.

    Raises:
        InputError: the file cannot be written; what it held is unchanged.
    """
    with hdf5_for_writing(path) as file, h5netcdf.File(file, "w") as netcdf:
        _dump(netcdf, groups, encoding)
    return Path(path)


def netcdf_bytes(
    groups: Mapping[str, xr.Dataset],
    encoding: Mapping[str, Mapping[str, Any]] | None = None,
) -> bytes:
    """What `write_netcdf` writes, in memory.

    Args:
        groups: as in `write_netcdf`.
        encoding: as in `write_netcdf`.
    """
    buffer = io.BytesIO()
    with h5netcdf.File(buffer, "w") as netcdf:
        _dump(netcdf, groups, encoding)
    return buffer.getvalue()


def _dump(
    netcdf: h5netcdf.File,
    groups: Mapping[str, xr.Dataset],
    encoding: Mapping[str, Mapping[str, Any]] | None,
) -> None:
    for name, dataset in groups.items():
        # Each group is added to what the file holds already.
        store = xr.backends.H5NetCDFStore(netcdf, group=name, mode="a")
        dataset.dump_to_store(store, encoding=dict((encoding or {}).get(name, {})))


def read_netcdf(
    path: Path | BinaryIO, groups: Iterable[str], *, called: str = ""
) -> dict[str, xr.Dataset]:
    """The named groups of a netCDF file ("/" is the root), in memory; a missing one is empty.

    Args:
        path: the file, or a file object opened for reading bytes that can seek.
        groups: names of groups.
        called: what messages call the file; empty for its path.

    Raises:
        InputError: as `check_hdf5`, with half of this machine's memory as the limit.
        OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError: not a netCDF file,
            or a damaged one.
    """
    check_hdf5(path, half_of_the_memory(), called=called)
    read: dict[str, xr.Dataset] = {}
    with h5py.File(path, "r") as file:
        present = {"/", *file}
    for name in groups:
        if name not in present:
            read[name] = xr.Dataset()
            continue
        # xarray's annotation names only buffered files; any seekable file object works
        with xr.open_dataset(cast(Any, path), engine="h5netcdf", group=name) as opened:
            read[name] = opened.load()
    return read


def write_labelled(
    dataset: xr.Dataset, path: str | os.PathLike[str], kind: str, version: int
) -> Path:
    """Write one dataset as a file that says what kind of measurement it holds.

    Args:
        dataset: what was measured.
        path: the file; what it held before is replaced.
        kind: name of the kind, kept as the attribute `format`.
        version: of the file's layout.

    Raises:
        InputError: the file cannot be written.
    """
    return write_netcdf(path, {"/": dataset.assign_attrs(format=kind, version=version)})


def read_labelled(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    command: str,
    needed: Mapping[str, tuple[str, ...]],
) -> xr.Dataset:
    """Read what `write_labelled` wrote.

    Args:
        path: the file.
        kind: that it must be of.
        version: of its layout.
        command: that makes such a file, for messages.
        needed: variables that figures read, with their dimensions.

    Raises:
        InputError: no such file, not one of this kind and version, or a damaged one.
    """
    source = user_path(path)
    if not source.is_file():
        raise InputError(f"there is no file {source}; make one with {command}")
    try:
        result = read_netcdf(source, ["/"])["/"]
    # h5py, h5netcdf and xarray raise any of these about a damaged file.
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{source} is not a readable netCDF file: {error}") from error
    if result.attrs.pop("format", None) != kind or result.attrs.pop("version", None) != version:
        raise InputError(f"{source} is not a file that {command} of this version wrote")
    for name, dims in needed.items():
        if name not in result.variables or result[name].dims != dims:
            raise InputError(
                f"{source} is damaged: {name} is missing or has other dimensions than"
                f" {', '.join(dims)}; make it again with {command}"
            )
    return result


def check_hdf5(path: Path | BinaryIO, most_bytes: int, *, called: str = "") -> None:
    """Refuse an HDF5 file that is too large, takes content from other files, or loops.

    Too large: its arrays unpack to more than `most_bytes`. Loops: its groups contain each other.

    Args:
        path: the file, or a file object that can seek.
        most_bytes: most that its arrays may unpack to.
        called: what messages call the file; empty for its path.

    Raises:
        InputError: any of these.
        OSError: not an HDF5 file, or a damaged one.
    """
    source = called or str(path)
    with h5py.File(path, "r") as file:
        total, count = 0, 0
        # A list in place of recursion: groups of a damaged file may contain each other without end.
        waiting: list[tuple[h5py.Group, int]] = [(file, 0)]
        while waiting:
            group, depth = waiting.pop()
            for name in group:
                shown = repr(str(name)[:60])
                # The link itself is looked at before anything behind it is opened.
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    raise InputError(
                        f"{source} takes {shown} from another place, perhaps another file, which is"
                        " not read"
                    )
                item, count = group[name], count + 1
                if isinstance(item, h5py.Group):
                    waiting.append((item, depth + 1))
                elif isinstance(item, h5py.Dataset):
                    if item.external or item.is_virtual:
                        raise InputError(
                            f"{source} takes {shown} from another file, which is not read"
                        )
                    # A variable without any value has the size None.
                    total += (item.size or 0) * item.dtype.itemsize
                # Asked inside the loop, which would not end in a file whose groups form a circle.
                if depth > MOST_DEPTH or count > MOST_OBJECTS:
                    raise InputError(
                        f"{source} holds groups within groups without end, or more than"
                        f" {MOST_OBJECTS} variables: no such file is read"
                    )
    if total > most_bytes:
        raise InputError(
            f"{source} unpacks to {total / 2**20:,.0f} MB; at most {most_bytes / 2**20:,.0f} MB are"
            " accepted here: record fewer samples or layers"
        )


def half_of_the_memory() -> int:
    """Bytes; reading and unpacking needs about twice the size of the arrays."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return 2**33
