"""Sinks among image tokens: what a study of them holds, and how it is read.

A sink is an image token with one of three signatures in a layer (`sink_signatures`). Much attention
alone makes no sink: a token that shows what the question is about gets much, too. For drawn scenes
it is therefore known of every token whether it lies on an object or on the ground.
`sink_study.study_sinks` makes the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypeVar

import numpy as np
import xarray as xr

from avl_analysis.errors import InputError
from avl_analysis.recordings.netcdf import read_labelled, write_labelled

SIGNATURES = ("concentration", "value drain", "massive activation")
CONDITIONS = (
    "sinks hidden",
    "as many others hidden",
    "others with as much attention hidden",
    "only sinks shown",
    "only as many others shown",
)
"""What is done to an answer, in the order of the results."""
CONCENTRATED = 5.0
"""Times the attention of the mean image token from which on attention is concentrated; ours."""
DRAINED = 0.5
"""Times the median value norm of the image tokens up to which a value is drained; ours."""
MASSIVE = 20.0
"""Times the root mean square from which on a dimension is massive (Kang et al., 2503.03321)."""
FORMAT, VERSION = "avl-sinks", 1
VARIABLES: Mapping[str, tuple[str, ...]] = {
    name: ("sample", *dims)
    for names, dims in (
        (("attention", "value_norm", "massive"), ("layer", "token")),
        (("input_norm", "on_object"), ("token",)),
        (
            ("image_mass", "image_largest", "first_mass", "first_value_norm", "first_largest"),
            ("layer",),
        ),
        (("before", "stayed", "followed"), ()),
        (("log_prob_change", "same_answer", "hidden_attention"), ("condition",)),
    )
    for name in names
}
"""Variables of a study with their dimensions."""

Values = TypeVar("Values", np.ndarray, xr.DataArray)


@dataclass(frozen=True)
class Thresholds:
    """From where on a number is a signature.

    Attributes:
        concentrated, drained, massive: see `CONCENTRATED`, `DRAINED`, `MASSIVE`.
    """

    concentrated: float = CONCENTRATED
    drained: float = DRAINED
    massive: float = MASSIVE

    @classmethod
    def of_width(cls, width: int) -> Thresholds:
        """Those for hidden states of `width` dimensions.

        A dimension holds at most `sqrt(width)` times the root mean square, which in a small model
        is less than `MASSIVE`. No threshold is therefore beyond half of what is possible, where one
        dimension holds a quarter of the squared norm.
        """
        return cls(massive=min(MASSIVE, float(np.sqrt(width)) / 2))

    def holds(
        self, signature: str, attention: Values, value_norm: Values, massive: Values
    ) -> Values:
        """Where the signature is; nowhere where its number is NaN.

        Args:
            signature: one of `SIGNATURES`.
            attention: times the attention of the mean image token.
            value_norm: times the median value norm.
            massive: largest sink dimension over the root mean square.

        Raises:
            InputError: another signature.
        """
        check_signature(signature)
        # Comparisons with NaN are False, as wanted.
        with np.errstate(invalid="ignore"):
            if signature == "concentration":
                return attention >= self.concentrated
            if signature == "value drain":
                return value_norm <= self.drained
            return massive >= self.massive


def check_signature(signature: str) -> None:
    """Refuse a signature that does not exist.

    Raises:
        InputError: names those that do.
    """
    if signature not in SIGNATURES:
        raise InputError(f"unknown signature {signature!r}: choose from {', '.join(SIGNATURES)}")


def thresholds_of(study: xr.Dataset) -> Thresholds:
    """The thresholds a study was made with."""
    return Thresholds(
        *(float(study.attrs[name]) for name in ("concentrated", "drained", "massive"))
    )


def flags(study: xr.Dataset, signature: str) -> xr.DataArray:
    """Which image tokens have a signature, (sample, layer, token) bool; False behind the last.

    Args:
        study: what `study_sinks` gave.
        signature: one of `SIGNATURES`.
    """
    numbers = (study[name] for name in ("attention", "value_norm", "massive"))
    return thresholds_of(study).holds(signature, *numbers)


def mass_on_sinks(study: xr.Dataset, signature: str) -> xr.DataArray:
    """Share of a text row's attention that is on sinks, (sample, layer).

    Args:
        study: what `study_sinks` gave.
        signature: one of `SIGNATURES`.
    """
    # `attention` is in units of the mean image token, whose share of a row is image mass / count.
    count = np.isfinite(study["attention"]).sum("token")
    on_sinks = study["attention"].where(flags(study, signature)).sum("token")
    return on_sinks / count.where(count > 0) * study["image_mass"]


def save_sinks(study: xr.Dataset, path: str | PathLike[str]) -> Path:
    """Write what `study_sinks` gave as one netCDF file.

    Raises:
        InputError: the file cannot be written.
    """
    return write_labelled(study, path, FORMAT, VERSION)


def load_sinks(path: str | PathLike[str]) -> xr.Dataset:
    """Read what `save_sinks` wrote.

    Raises:
        InputError: no such file, or not one of these.
    """
    study = read_labelled(path, FORMAT, VERSION, "avl sinks", VARIABLES)
    for name in ("signature", "dimensions", "concentrated", "drained", "massive"):
        if name not in study.attrs:
            raise InputError(f"{path} is damaged: it does not say its {name}; make it again")
    check_signature(str(study.attrs["signature"]))
    return study
