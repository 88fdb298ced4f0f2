"""A recording: labelled arrays of many samples, with where they come from.

Saved, loaded, merged, estimated.

    recording["modality_mass"]           per sample, layer, head and step (step 0: the last prompt
                                         row)
    recording["modality_mass_prefill"]   mean over prompt rows, by query modality
    recording.dataset                    all of them; `recording.tree` with tokens, sums, maps and
                                         raw attention too

Sums are kept with their counts and divided only when asked, so that merging recordings is
concatenation over samples and exact in any order and any split.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Protocol, overload

import numpy as np
import xarray as xr

from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.files import user_path, write_whole
from avl_analysis.intervals import estimate, medians
from avl_analysis.recordings import storage, summary, zarr_folder
from avl_analysis.recordings.checks import check_data, digest, facts_of_text
from avl_analysis.recordings.netcdf import netcdf_bytes, read_netcdf, write_netcdf
from avl_analysis.recordings.schema import (
    FACTS_DIGEST,
    FORMAT,
    GROUPS,
    READ,
    TOKEN_FIELDS,
    VERSION,
    Part,
    RecordingError,
    concatenate,
    stack,
)

FULL_CACHE = "full cache"
"""Attribute `policy` of a recording of the model as it is, without a policy on it."""


class Source(Protocol):
    """What a recording in the making is read from."""

    running: bool

    def names(self) -> list[str]:
        """Names of the samples so far."""

    def parts(self) -> list[Part]:
        """Their arrays."""


class Recording:
    """See the module. Made by `record`, `load_recording` and `merge`."""

    def __init__(self, data: Mapping[str, xr.Dataset], attrs: Mapping[str, Any]) -> None:
        self._data: dict[str, xr.Dataset] | None = dict(data)
        self._source: Source | None = None
        self._labels: Mapping[str, Sequence[Any]] = {}
        self._state: tuple[int, ...] = ()
        self._facts: dict[str, dict[str, Any]] = {}
        self.attrs = dict(attrs)

    @classmethod
    def live(
        cls, source: Source, labels: Mapping[str, Sequence[Any]], attrs: Mapping[str, Any]
    ) -> Recording:
        """A recording in the making; `labels` are those of layers and heads."""
        recording = cls({}, attrs)
        recording._source, recording._labels, recording._data = source, labels, None
        return recording

    @property
    def data(self) -> dict[str, xr.Dataset]:
        """Group -> dataset, as in `schema.GROUPS`.

        While the model still runs, of the samples as they stand.
        """
        source = self._source
        if source is None:
            return self._data or {}
        parts = source.parts()
        # Lengths of all samples: arrays are stacked anew only if something was added since.
        state = tuple(int(part["tokens"]["token_id"][1].size) for part in parts)
        if self._data is None or state != self._state:
            self._data, self._state = stack(parts, source.names(), self._labels), state
        if not source.running:  # nothing can follow: let go of the parts
            self._source = None
        return self._data

    @property
    def samples(self) -> list[str]:
        """Names of the samples."""
        if self._source is not None:
            return self._source.names()
        tokens = (self._data or {}).get("tokens", xr.Dataset())
        return [str(name) for name in tokens["sample"].values] if "sample" in tokens.coords else []

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return summary.as_text(self)

    def _repr_html_(self) -> str:
        return summary.as_html(self)

    def show(self) -> None:
        """Show how attention is divided by layer: here in a notebook, else in the browser.

        Raises:
            RecordingError: nothing was recorded, or not the statistic "modality_mass".
        """
        drawing = summary.mass_by_layer(self)
        if drawing is None:
            raise RecordingError(
                "there is no modality_mass to show; record with it and call the model inside the"
                " with block"
            )
        drawing.show()

    # -- reading -----

    @property
    def names(self) -> list[str]:
        """Names that `recording[name]` knows."""
        data = self.data
        summed = [str(n) for n in data["sums"].data_vars if not str(n).endswith("_count")]
        return sorted(
            {str(n) for n in data["statistics"].data_vars}
            | set(summed)
            | {str(n) for n in data["maps"].data_vars}
        )

    def __getitem__(self, name: str) -> xr.DataArray:
        """One statistic per sample, sums divided by their counts (NaN where nothing was counted).

        Raises:
            KeyError: unknown name; the message lists the known ones.
        """
        data = self.data
        for group in ("statistics", "maps", "attention"):
            if name in data[group]:
                return data[group][name]
        if name in data["sums"]:
            total, count = data["sums"][name], data["sums"].get(f"{name}_count")
            return (
                total
                if count is None
                # 0 / 0 would be NaN, too, but with a warning.
                else (total / count.where(count > 0)).rename(name).assign_attrs(total.attrs)
            )
        raise KeyError(f"this recording holds no {name!r}; it holds {', '.join(self.names)}")

    def total(self, name: str) -> xr.DataArray:
        """The undivided sum of a statistic that is a sum and a count, e.g. H2O's accumulated score.

        Raises:
            KeyError: the statistic is not kept as a sum.
        """
        sums = self.data["sums"]
        if name not in sums:
            kept = ", ".join(str(n) for n in sums.data_vars if not str(n).endswith("_count"))
            raise KeyError(f"{name!r} is not kept as a sum; these are: {kept}")
        return sums[name]

    @property
    def dataset(self) -> xr.Dataset:
        """All statistics, per sample."""
        arrays = [
            self[name].to_dataset(name=name) for name in self.names if name not in self.data["maps"]
        ]
        # Labels must be equal: joined in another way, arrays would be filled with NaN or shortened.
        return xr.merge(
            arrays, join="exact", compat="equals", combine_attrs="override"
        ).assign_attrs(self.attrs)

    @property
    def tokens(self) -> xr.Dataset:
        """What the tokens of every sample are."""
        return self.data["tokens"]

    @property
    def tree(self) -> xr.DataTree:
        """The whole recording."""
        return xr.DataTree.from_dict(
            {"/": xr.Dataset(attrs=self.attrs), **{f"/{k}": v for k, v in self.data.items()}}
        )

    def estimate(
        self, name: str, keep: Iterable[str] = (), *, median: bool = False, **labels: Any
    ) -> xr.Dataset:
        """Mean over samples with its 95 % bootstrap interval; see `avl_analysis.intervals`.

        Each sample counts once: it is averaged over all other dimensions first, leaving out what is
        undefined. A half-life is infinite where nothing decays, and so is then its mean; ask for
        its median.

        Args:
            name: a statistic, one of `names`.
            keep: dimensions of the result, e.g. ("layer", "key_modality"); none gives one number.
            median: take medians, within samples and over them, in place of means.
            labels: select these coordinates before averaging, e.g. step=slice(1, None) for decode
                steps.

        Returns:
            Variables mean, low, high, n (samples that have a value). Fewer than five samples have a
            mean, but no interval (NaN).

        Raises:
            KeyError: unknown name.
            RecordingError: a dimension it does not have.
        """
        # Sums are divided first, so that the mean is of quotients per sample.
        array = self[name].sel(labels)
        kept = tuple(keep)
        if unknown := set(kept) - set(map(str, array.dims)):
            raise RecordingError(
                f"{name} has no {', '.join(sorted(unknown))}; it has"
                f" {', '.join(map(str, array.dims))}"
            )
        return (medians if median else estimate)(array, kept).dataset

    # -- facts about samples -----

    def drop_attention(self) -> xr.Dataset:
        """Take the raw weights out of a complete recording, to keep the rest in little memory.

        Returns:
            The group `attention` as it was; `recording["attention"]` is unknown from then on.
        """
        data = self.data
        attention = data["attention"]
        self._data = {**data, "attention": xr.Dataset()}
        return attention

    def annotate(self, sample: int | str = -1, **facts: Any) -> None:
        """Remember facts about a sample: prompt, answer, task, boxes, ... (anything JSON can hold).

        Args:
            **facts: name -> value.
            sample: name, or place in `samples` (default: the latest).

        Raises:
            RecordingError: no such sample, or a fact JSON cannot hold.
        """
        name = self.name_of(sample)
        # Tried here, where the caller can see which fact it is, and not when the file is written.
        try:
            json.dumps(facts)
        except TypeError as error:
            raise RecordingError(
                f"facts about sample {name!r} must be plain numbers, strings, lists and dicts:"
                f" {error}"
            ) from error
        self._facts.setdefault(name, {}).update(facts)

    def facts(self, sample: int | str = -1) -> dict[str, Any]:
        """What `annotate` was told about a sample."""
        return dict(self._facts.get(self.name_of(sample), {}))

    def name_of(self, sample: int | str) -> str:
        """The name of a sample, given its name or its place in `samples`.

        Raises:
            RecordingError: no such sample.
        """
        names = self.samples
        if isinstance(sample, str) and sample in names:
            return sample
        if isinstance(sample, int) and -len(names) <= sample < len(names):
            return names[sample]
        held = f"{names[0]} to {names[-1]}" if names else "none yet"
        raise RecordingError(
            f"there is no sample {sample!r}; this recording holds {len(names)} samples ({held})"
        )

    # -- files -----

    @overload
    def save(self, target: str | PathLike[str]) -> Path: ...

    @overload
    def save(self, target: BinaryIO) -> None: ...

    def save(self, target: str | PathLike[str] | BinaryIO) -> Path | None:
        """Write one netCDF file, or one zarr folder.

        The estimates of `dataset` are written too, for readers that know only netCDF.

        Args:
            target: a path; one that ends in ".zarr" becomes a zarr folder, which needs the extra
                `[zarr]`, any other a netCDF file. Or a file object opened for writing bytes, which
                gets a netCDF file in one piece, from where it stands.

        Returns:
            The path; None for a file object.

        Raises:
            RecordingError: nothing was recorded, or the file cannot be written; what it held before
                is unchanged. Of a file object, only that it does not take bytes; what else its
                `write` raises is passed on.
        """
        if not len(self):
            raise RecordingError(
                "nothing was recorded, so there is nothing to save; call the model inside the with"
                " block"
            )
        groups = dict(self.data)
        # Quotients of sums and counts are written beside them; reading drops them again, so that
        # merged sums never meet quotients of their parts.
        groups["statistics"] = self.dataset.drop_attrs(deep=False)
        names = groups["tokens"]["sample"].values
        facts = [json.dumps(self._facts.get(str(name), {})) for name in names]
        groups["tokens"] = groups["tokens"].assign(facts=("sample", np.array(facts, dtype=object)))
        about = {"format": FORMAT, "version": VERSION, FACTS_DIGEST: digest(facts)}
        root = xr.Dataset(attrs={**self.attrs, **about})
        written = {"/": root, **groups}
        try:
            return _write(target, written)
        except InputError as error:
            raise RecordingError(str(error)) from error


def _write(target: str | PathLike[str] | BinaryIO, groups: Mapping[str, xr.Dataset]) -> Path | None:
    """Write a recording's groups to wherever they are to go."""
    if not isinstance(target, (str, PathLike)):
        write_whole(target, netcdf_bytes(groups, storage.as_netcdf(groups)))
        return None
    if Path(target).suffix == zarr_folder.SUFFIX:
        return zarr_folder.write_zarr(target, groups, storage.chunks(groups))
    return write_netcdf(target, groups, storage.as_netcdf(groups))


def load_recording(path: str | PathLike[str] | BinaryIO) -> Recording:
    """Read what `Recording.save` wrote.

    Args:
        path: a netCDF file, a zarr folder, or a file object that gives the bytes of a netCDF file,
            from where it stands to its end.

    Raises:
        RecordingError: there is no such file, it is not a recording, it is one of another version
            of the format, its content was damaged or changed, or it is a zarr folder and zarr is
            not installed.
    """
    try:
        source, kind, groups = _read(path)
    except InputError as error:
        raise RecordingError(str(error)) from error
    attrs = dict(groups.pop("/").attrs)
    if attrs.pop("format", None) != FORMAT:
        raise RecordingError(
            f"{source} is a {kind} but not a recording of this toolkit (no format = {FORMAT!r} in"
            " it)"
        )
    if (version := str(attrs.pop("version", None))) not in map(str, READ):
        raise RecordingError(
            f"{source} has recording format {version}, this program reads"
            f" {' and '.join(map(str, READ))}; record again, or read the file with the version that"
            " wrote it"
        )
    try:
        with blamed_on_input("its parts do not fit together"):
            return _recording(groups, attrs)
    except InputError as error:
        raise RecordingError(
            f"{source} is damaged or was changed ({error}): copy it again, or record again"
        ) from error


def _read(path: str | PathLike[str] | BinaryIO) -> tuple[str, str, dict[str, xr.Dataset]]:
    """What a file is called in messages, what kind of file it is, and its groups."""
    wanted, netcdf = ("/", *GROUPS), "netCDF file"
    if not isinstance(path, (str, PathLike)):
        name = "the file object given"
        # HDF5 needs to seek, which not every file object can, so all of it is read into memory.
        with blamed_on_input(f"{name} does not hold a readable netCDF file, so not a recording"):
            return name, netcdf, read_netcdf(io.BytesIO(path.read()), wanted, called=name)
    source = user_path(path)
    if zarr_folder.is_zarr(source):
        with blamed_on_input(f"{source} is not a readable zarr folder, so not a recording"):
            return str(source), "zarr folder", zarr_folder.read_zarr(source, wanted)
    if not source.is_file():
        raise InputError(
            f"there is no recording file {source}; make one with recording.save(...) or `avl record"
            " --out`"
        )
    with blamed_on_input(f"{source} is not a readable netCDF file, so not a recording"):
        return str(source), netcdf, read_netcdf(source, wanted)


def _recording(data: dict[str, xr.Dataset], attrs: dict[str, Any]) -> Recording:
    """The recording that a file's groups and attributes hold."""
    stored = data["tokens"].get("facts")
    texts = [] if stored is None else [str(text) for text in stored.values]
    # A file without a digest is accepted; one with another digest is not.
    if attrs.pop(FACTS_DIGEST, None) not in (None, digest(texts)):
        raise RecordingError("the facts about the samples are not those that were written")
    data["tokens"] = data["tokens"].drop_vars("facts", errors="ignore")
    if "image" in data["tokens"] and "frame" not in data["tokens"]:  # written before videos
        unknown = xr.full_like(data["tokens"]["image"], -1)
        unknown.attrs = {**TOKEN_FIELDS["frame"].attrs, "fill": -1}
        data["tokens"]["frame"] = unknown
    check_data(data, attrs)
    # Quotients that `save` wrote for other readers.
    derived = [name for name in data["sums"].data_vars if name in data["statistics"]]
    values = data["statistics"].drop_vars(derived)
    # Labels that only the dropped quotients had would stay behind, with dimensions that no variable
    # has.
    data["statistics"] = values.drop_vars(
        [dim for dim in values.coords if all(dim not in v.dims for v in values.values())]
    )
    recording = Recording(data, attrs)
    for name, text in zip(recording.samples, texts, strict=stored is not None):
        recording._facts[name] = facts_of_text(text, name)
    return recording


def merge(recordings: Sequence[Recording]) -> Recording:
    """One recording with the samples of all, sorted by name; exact, whatever the order and split.

    Raises:
        RecordingError: nothing to merge, a sample name in two of them, different models, layers or
            statistics.
    """
    filled = [recording for recording in recordings if len(recording)]
    if not filled:
        raise RecordingError("nothing to merge: no recording with a sample was given")
    names = [name for recording in filled for name in recording.samples]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecordingError(
            f"cannot merge: samples {', '.join(twice[:5])} are in more than one recording; number"
            " them apart with record(..., first_sample=...)"
        )
    for key, usual in (
        ("model", ""),
        ("model_type", ""),
        ("statistics", ""),
        ("policy", FULL_CACHE),
    ):
        # An attribute that one of the recordings lacks counts as the usual value.
        values = {str(recording.attrs.get(key) or usual) for recording in filled}
        if len(values) > 1:
            raise RecordingError(
                f"cannot merge: the recordings differ in {key}: {' | '.join(sorted(values))}"
            )
    # Its date and seed, whatever the order.
    first = min(filled, key=lambda recording: min(recording.samples))
    data = {
        group: concatenate([recording.data[group] for recording in filled], group)
        for group in GROUPS
    }
    merged = Recording(
        {g: d.sortby("sample") if "sample" in d.dims else d for g, d in data.items()}, first.attrs
    )
    for recording in filled:
        merged._facts.update(recording._facts)
    return merged
