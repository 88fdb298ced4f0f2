"""Recordings as zarr folders: written whole or not at all, and read after a look at their metadata.

Needs the package zarr, the extra `[zarr]`. A folder can name arrays of any size, codecs that run
code, and links to other files; `check_zarr` refuses these before a number is read. Only format 3 of
zarr is written and read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import xarray as xr

from avl_analysis.errors import InputError
from avl_analysis.files import atomic_folder
from avl_analysis.recordings.netcdf import MOST_DEPTH, MOST_OBJECTS, half_of_the_memory

SUFFIX = ".zarr"
METADATA = "zarr.json"
CODECS = frozenset({"bytes", "vlen-utf8", "zstd", "blosc", "gzip", "crc32c", "transpose"})
"""Codecs that may be named; they turn bytes into numbers and texts, and run nothing."""
_ITEM_BYTES = 64
"""Bytes that an item of a type without a fixed size, such as a text, is taken to have."""


def check_installed() -> None:
    """Refuse to go on without the package zarr.

    Raises:
        InputError: it is not installed.
    """
    if find_spec("zarr") is None:
        raise InputError(
            "a .zarr folder needs the package zarr, which is not installed: pip install"
            " 'avl-analysis[zarr]', or use a .nc file"
        )


def is_zarr(path: Path) -> bool:
    """Whether a path is a zarr folder."""
    return (path / METADATA).is_file()


def write_zarr(
    path: str | os.PathLike[str],
    groups: Mapping[str, xr.Dataset],
    chunks: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> Path:
    """Write datasets as groups of one zarr folder, whole or not at all.

    Args:
        path: the folder; an older zarr folder there is replaced, anything else is not.
        groups: name -> dataset; "/" is the root, which must come first.
        chunks: name of a group -> variable -> shape of the pieces it is cut into.

    Raises:
        InputError: zarr is not installed, or the folder cannot be written; what was there before is
            unchanged.
    """
    check_installed()
    with atomic_folder(path, is_zarr) as folder:
        for name, dataset in groups.items():
            cut = {variable: {"chunks": shape} for variable, shape in chunks.get(name, {}).items()}
            _texts_as_objects(dataset).to_zarr(
                str(folder),
                group=None if name == "/" else name,
                mode="a",
                encoding=cut,
                zarr_format=3,
                consolidated=False,
            )
    return Path(path)


def read_zarr(path: Path, groups: Iterable[str]) -> dict[str, xr.Dataset]:
    """The named groups of a zarr folder ("/" is the root), in memory; a missing one is empty.

    Args:
        path: the folder.
        groups: names of groups.

    Raises:
        InputError: zarr is not installed; as `check_zarr`, with half of this machine's memory as
            the limit.
        OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError: a damaged folder.
    """
    check_installed()
    check_zarr(path, half_of_the_memory())
    read: dict[str, xr.Dataset] = {}
    for name in groups:
        inside = path if name == "/" else path / name
        if not is_zarr(inside):
            read[name] = xr.Dataset()
            continue
        group = None if name == "/" else name
        with xr.open_zarr(str(path), group=group, consolidated=False, chunks=None) as opened:
            read[name] = _texts_as_objects(opened.load())
    return read


def check_zarr(path: Path, most_bytes: int) -> None:
    """Refuse a zarr folder that is too large, leads elsewhere, or names unknown codecs.

    Args:
        path: the folder.
        most_bytes: most that its arrays may unpack to, texts counted as `_ITEM_BYTES` each.

    Raises:
        InputError: any of these, or metadata that is not that of zarr 3.
    """
    total = count = 0
    # os.walk does not enter linked folders, so what they hold would not be counted: links are
    # refused.
    for folder, folders, files in os.walk(path):
        depth = len(Path(folder).relative_to(path).parts)
        for name in (*folders, *files):
            if (Path(folder) / name).is_symlink():
                raise InputError(f"{path} holds a link, {name!r}, which is not followed")
        if METADATA not in files:
            continue
        count += 1
        if count > MOST_OBJECTS or depth > MOST_DEPTH + 1:
            raise InputError(
                f"{path} holds more than {MOST_OBJECTS} groups and variables, or groups deeper than"
                f" {MOST_DEPTH}: no such folder is read"
            )
        total += _declared_bytes(Path(folder) / METADATA, path)
    if total > most_bytes:
        raise InputError(
            f"{path} unpacks to {total / 2**20:,.0f} MB; at most {most_bytes / 2**20:,.0f} MB are"
            " accepted here: record fewer samples or layers"
        )


def _declared_bytes(metadata: Path, path: Path) -> int:
    """Bytes that an array says it unpacks to; 0 for a group."""
    about = json.loads(metadata.read_text(encoding="utf-8"))
    if not isinstance(about, dict) or about.get("zarr_format") != 3:
        raise InputError(f"{path} is not a folder of zarr format 3")
    if about.get("node_type") == "group":
        return 0
    named = {str(codec.get("name")) for codec in about["codecs"]}
    if unknown := named - CODECS:
        raise InputError(
            f"{path} names the codecs {', '.join(sorted(unknown))}, which are not read; known are"
            f" {', '.join(sorted(CODECS))}"
        )
    kind = about["data_type"]
    fixed = isinstance(kind, str) and kind.startswith(("int", "uint", "float", "bool"))
    size = np.dtype(kind).itemsize if fixed else _ITEM_BYTES
    grid = about["chunk_grid"]["configuration"]["chunk_shape"]
    # a chunk is unpacked whole, so one that is larger than its array counts whole
    return size * max(math.prod(map(int, about["shape"])), math.prod(map(int, grid)))


def _texts_as_objects(dataset: xr.Dataset) -> xr.Dataset:
    """Texts of any length: zarr 3 has no stable form for texts of a fixed length."""
    changed = {
        str(name): values.astype(object)
        for name, values in dataset.variables.items()
        if values.dtype.kind in "UT"
    }
    coords = {name: values for name, values in changed.items() if name in dataset.coords}
    return dataset.assign(
        {name: values for name, values in changed.items() if name not in coords}
    ).assign_coords(coords)
