"""Measurements that stand beside a recording as one labelled dataset each, in files of their own.

Comparisons, ablations and frontiers have classes of their own. What is a plain `xarray.Dataset`
needs only an entry here: how its file is read and written, what it is called in a report's folder
and on the command line, and which command makes it. `Run.further(name)` hands it to the figure
that shows it; `avl report`, the figure scripts and the dashboard offer it by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import xarray as xr

from avl_analysis.errors import InputError
from avl_analysis.heads.knockout import load_knockout, save_knockout
from avl_analysis.heads.patch_words import load_patch_names, save_patch_names
from avl_analysis.heads.sinks import load_sinks, save_sinks
from avl_analysis.heads.word_errors import load_word_errors, save_word_errors
from avl_analysis.relevance.pointing import load_pointing, save_pointing

Path_ = str | PathLike[str]


@dataclass(frozen=True)
class Kind:
    """One kind of measurement.

    Attributes:
        name: in `--further NAME=FILE` and of its file in a report's folder.
        figure: name of the figure that shows it.
        title: what it is, in words.
        lack: what is said where it was not measured: "attention was not cut".
        command: that makes its file, for messages.
        read, write: of its file, in netCDF.
    """

    name: str
    title: str
    lack: str
    command: str
    read: Callable[[Path_], xr.Dataset]
    write: Callable[[xr.Dataset, Path_], Path]
    figure: str

    @property
    def file(self) -> str:
        """Its name in the folder of a report."""
        return f"{self.name}.nc"

    @property
    def missing(self) -> str:
        """What is said where it was not measured."""
        return f"{self.lack}; pass a file as `{self.command} --out {self.file}` writes it"


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "knockout",
            "Attention cut between groups of tokens",
            "attention between groups of tokens was not cut",
            "avl knockout",
            load_knockout,
            save_knockout,
            "knockout",
        ),
        Kind(
            "sinks",
            "Sinks among image tokens",
            "sinks among image tokens were not looked for",
            "avl sinks",
            load_sinks,
            save_sinks,
            "sink_tokens",
        ),
        Kind(
            "errors",
            "Attention of right and wrong words",
            "no word was judged",
            "avl errors",
            load_word_errors,
            save_word_errors,
            "errors",
        ),
        Kind(
            "pointing",
            "What relevance maps point at",
            "relevance maps were not computed",
            "avl maps",
            load_pointing,
            save_pointing,
            "relevance",
        ),
        Kind(
            "patches",
            "What patches say",
            "the words of patches were not read",
            "avl patches",
            load_patch_names,
            save_patch_names,
            "patch_words",
        ),
    )
}
"""Name -> kind."""


def read_further(named: Iterable[str]) -> dict[str, xr.Dataset]:
    """Datasets by name from "NAME=FILE" texts.

    Raises:
        InputError: a text of another form, an unknown name, or a file that is not of that kind.
    """
    found = {}
    for text in named:
        # Cut at the first sign only: the path may hold further ones.
        name, equals, path = text.partition("=")
        if not equals or name not in KINDS:
            raise InputError(
                f"{text!r}: write NAME=FILE, for example knockout=knockout.nc; names are"
                f" {', '.join(KINDS)}"
            )
        found[name] = KINDS[name].read(path)
    return found


def found_in(files: Iterable[Path]) -> dict[str, xr.Dataset]:
    """What the files of a report hold."""
    by_name = {path.name: path for path in files}
    return {
        name: kind.read(by_name[kind.file]) for name, kind in KINDS.items() if kind.file in by_name
    }
