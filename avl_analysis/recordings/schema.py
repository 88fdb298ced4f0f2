"""Names, dimensions and labels of everything a recording holds.

The one vocabulary of statistics, files and figures.

Arrays are described by `Field`s: the dimensions in words, unit, range and meaning. Dimensions in
`RAGGED` differ in length between samples; stacking pads them with the field's fill value (NaN where
there is a number to be missing).

Dimensions:

* sample: one row of one prefill, by its name.
* layer, head: decoder layer and query head, counted from 0.
* step: rows that produce a token; 0 is the last prompt row, t >= 1 the t-th decode step.
* query_modality, key_modality: what the query token (of prompt rows) and the key are: system,
  image, text.
* position: place among a sample's tokens, padding left out, generated tokens included.
* token: i-th image token of the sample's prompt, in the order of the prompt, all images in a row;
  `token_position` gives its position. The order is not that of a picture: there may be several
  views of an image, class and newline tokens between the others. Draw by the box.
* frame: frame (or group of frames) of a sample's videos, all videos in a row; 0 alone, without a
  value, for samples without a video.
* rows: which query rows a sum runs over: "prompt", "prompt text", "decode".

Where in its image a token lies (group `tokens`, by position):

* image: index of the image within the prompt; -1 for everything that is no image token.
* left, top, right, bottom: the part of the image that the token stands for, as fractions of the
  whole original image's width and height, counted from its top left corner, 0 to 1. NaN where there
  is none (text, class and newline tokens) or it is unknown, which is always all four. Where a
  processor crops the image, boxes cover what was kept only. A box over padding that the processor
  put beside the image has no area.
* tile: which view of the image the token belongs to: 0 is the view of the whole image (resized, or
  its centre crop), 1, 2, ... are views of it in higher resolution, in the order of their tokens; -1
  for everything that is no image token, and for image tokens of whose view nothing is known. Views
  overlap: draw the tokens of one tile number 0, or those of all higher ones together. Newline and
  class tokens have the number of the view they stand beside.
* frame: of the tokens of a video, which is one image here, the frame they show, counted from 0;
  where a model makes one token of a patch in several frames (Qwen-VL: two), the group of frames.
  -1 for pictures, for tokens of a video that belong to no frame, and where it is unknown. The box
  is a part of the frame. Tokens of different frames cover the same place: draw one frame at a time.
* row, column: of the token in the finest grid of its image, whose tiles count as one grid; -1 where
  there is none (a coarser second view of the same image) or it is unknown.
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
VERSION = 3
"""Version of the file layout that is written. Version 3 added the frame of video tokens."""

READ = (2, VERSION)
"""Versions that are read; a file of another one is refused. Files of version 2 say nothing of time:
the frame of their tokens is unknown.
"""

EDGES = ("left", "top", "right", "bottom")
"""Variables that hold the box of a token, as fractions of the whole image."""

FACTS_DIGEST = "facts_sha256"
"""Attribute of a file: digest of the facts of all samples."""

RAGGED = frozenset({"step", "position", "token", "picture", "query", "key", "frame"})
ROWS = ("prompt", "prompt text", "decode")
GROUPS = ("tokens", "sums", "statistics", "maps", "attention")
"""Groups of a recording: what the tokens are; additive sums with their counts (`<name>_count`);
values per sample that are exact as they stand; image-token scores to draw over pictures; raw
attention slices.
"""

FIXED: Mapping[str, Sequence[Any]] = {
    "query_modality": MODALITIES,
    "key_modality": MODALITIES,
    "rows": ROWS,
}
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


def _token_field(fill: Any, long_name: str, **attrs: Any) -> Field:
    return Field(("position",), fill, attrs={"long_name": long_name, **attrs})


TOKEN_FIELDS: Mapping[str, Field] = {
    "token_id": _token_field(-1, "id in the model's vocabulary"),
    "modality": _token_field(-1, "system (0), image (1) or text (2)"),
    "image": _token_field(-1, "index of the image in the prompt"),
    "row": _token_field(-1, "row in the finest grid of the image"),
    "column": _token_field(-1, "column in the finest grid of the image"),
    "frame": _token_field(-1, "frame of the video, or group of frames"),
    "tile": _token_field(-1, "view of the image: 0 of the whole, 1, 2, ... of parts"),
    **{
        edge: _token_field(
            np.nan,
            f"{edge} edge of the part of the image that the token stands for",
            unit="fraction of the image's " + ("height" if edge in ("top", "bottom") else "width"),
        )
        for edge in EDGES
    },
}
"""What is kept of every token of a sample."""


def layer_labels(layers: Sequence[int], heads: int, kv_heads: int) -> dict[str, Sequence[Any]]:
    """Labels of the dimensions that follow from the model."""
    return {
        "layer": layers,
        "other_layer": layers,
        "head": range(heads),
        "key_head": range(kv_heads),
    }


Part = dict[str, dict[str, tuple[Field, np.ndarray]]]
"""One sample: group -> name -> (field, array without the sample dimension)."""


def stack(
    parts: Sequence[Part], names: Sequence[str], coords: Mapping[str, Sequence[Any]]
) -> dict[str, xr.Dataset]:
    """Datasets of several samples, padded where they differ in length.

    `coords` labels the dimensions all share.

    Raises:
        ValueError: two statistics give one dimension different labels (xarray would silently join
            them).
    """
    return {
        group: _stack_group([part.get(group, {}) for part in parts], names, coords)
        for group in GROUPS
    }


def _stack_group(
    parts: Sequence[dict[str, tuple[Field, np.ndarray]]],
    names: Sequence[str],
    coords: Mapping[str, Sequence[Any]],
) -> xr.Dataset:
    # Taken from all samples: some may lack a statistic, such as one about pictures.
    fields = {name: described for part in parts for name, (described, _) in part.items()}
    sizes: dict[str, int] = {}
    for part in parts:
        for described, array in part.values():
            for dim, size in zip(described.dims, array.shape, strict=True):
                # Ragged dimensions are as long as the longest sample; of all others every part has
                # the same size.
                sizes[dim] = max(size, sizes.get(dim, 0)) if dim in RAGGED else size
    variables = {}
    for name, described in fields.items():
        arrays = [part[name][1] if name in part else None for part in parts]
        stacked = _stack_arrays(arrays, tuple(sizes[dim] for dim in described.dims), described.fill)
        variables[name] = (
            ("sample", *described.dims),
            stacked,
            {**described.attrs, "fill": described.fill},
        )
    dims = {dim for dims, _, _ in variables.values() for dim in dims}
    known: dict[str, Any] = {"sample": np.array(list(names), dtype=object), **FIXED, **coords}
    # Ragged dimensions are numbered from 0, as far as the longest sample reaches.
    known |= {dim: range(sizes[dim]) for dim in RAGGED & dims}
    for described in fields.values():
        for dim, labels in described.coords.items():
            # xarray would align by label and silently leave out what only one of them has.
            if dim in known and dim not in coords and list(known[dim]) != list(labels):
                raise ValueError(
                    f"two statistics label {dim} differently: {list(known[dim])} and {list(labels)}"
                )
            known[dim] = labels
    return xr.Dataset(
        variables, coords={dim: np.asarray(labels) for dim, labels in known.items() if dim in dims}
    )


def _stack_arrays(
    arrays: Sequence[np.ndarray | None], shape: tuple[int, ...], fill: Any
) -> np.ndarray:
    present = [array for array in arrays if array is not None]
    # A single sample needs no copy; raw weights may take gigabytes.
    if len(arrays) == 1 and present[0].shape == shape:
        return present[0][None]
    stacked = np.full((len(arrays), *shape), fill, dtype=np.result_type(*present))
    for index, array in enumerate(arrays):
        if array is not None:
            at: tuple[int | slice, ...] = (index, *(slice(n) for n in array.shape))
            stacked[at] = array
    return stacked


def concatenate(datasets: Sequence[xr.Dataset], what: str) -> xr.Dataset:
    """Samples of several datasets behind one another.

    Exact, everything but ragged dimensions must agree.

    Raises:
        RecordingError: if they hold different variables, layers, heads or labels.
    """
    first = datasets[0]
    for other in datasets[1:]:
        if set(other.data_vars) != set(first.data_vars):
            differing = sorted(set(map(str, other.data_vars)) ^ set(map(str, first.data_vars)))
            raise RecordingError(
                f"cannot merge: {', '.join(differing)} ({what}) are in some of the recordings only;"
                " record them with the same statistics and options"
            )
        for dim in set(map(str, first.dims)) - RAGGED - {"sample"}:
            if not np.array_equal(np.asarray(first[dim]), np.asarray(other[dim])):
                raise RecordingError(
                    f"cannot merge: the recordings differ in {dim} ({_some(first[dim])} and"
                    f" {_some(other[dim])}); record them with the same model, layers and options"
                )
    # Padded first and then joined exactly: an outer join would sort labels and change types.
    sizes = {dim: max(d.sizes[dim] for d in datasets) for dim in RAGGED & set(first.dims)}
    grown = [pad(dataset, sizes) for dataset in datasets]
    return xr.concat(grown, dim="sample", join="exact", data_vars="all", combine_attrs="override")


def pad(dataset: xr.Dataset, sizes: Mapping[str, int]) -> xr.Dataset:
    """Pad the ragged dimensions of every variable to `sizes` with the variable's own fill value."""
    # Labels of ragged dimensions are 0, 1, 2, ..., so new labels append behind the old ones.
    wanted = {dim: np.arange(n) for dim, n in sizes.items()}
    fills = {
        name: variable.attrs.get("fill", np.nan) for name, variable in dataset.data_vars.items()
    }
    return dataset.reindex(wanted, fill_value=fills) if wanted else dataset


def _some(labels: Iterable[Any]) -> str:
    values = [str(v) for v in np.asarray(labels)]
    return ", ".join(values[:6]) + (f", ... ({len(values)})" if len(values) > 6 else "")
