"""Layers x heads.

Every statistic that tells heads apart, as a matrix, a ranking, and a coarse taxonomy.

Reads recordings; knows neither models nor pages. A statistic with further dimensions (modality of
the key, tau of coverage) becomes one `Measure` per label. Means run over the samples and, where a
statistic has steps, over decode steps; step 0 (the last prompt row) is left out of that mean unless
there is nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from avl_analysis.errors import InputError
from avl_analysis.recordings.recording import Recording

_OWN = ("sample", "layer", "head", "step")
_LONGEST = 6
"""Labels of a further dimension up to which each becomes a measure of its own."""

KINDS = ("visual", "scanning", "sink", "local", "text", "mixed")
"""Kinds of heads in the order in which they are looked for; a head is the first that fits."""
VISUAL, HIT, SINK, LOCAL, TEXT = 0.5, 0.5, 0.3, 0.8, 0.5
"""Thresholds, shares of a head's attention while decoding, ours but for the sink's (Gu et al., ICLR
2025): visual and scanning heads give at least half to the picture; where it is known what words are
about, a head is visual only if its strongest patch is on that for at least half of the words
(visual-head score, after SparseMM), else scanning. Sink heads give at least 0.3 to the first token;
text heads at least half to text, and are local if four fifths of that is on the 16 most recent text
tokens.
"""
_RECENT = 16

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """One number per head.

    Attributes:
        key: name for addresses and options, e.g. "modality_mass/image".
        title: in words, e.g. "attention mass: image".
        unit: unit in words.
        name, labels: the statistic and the labels of its further dimensions.
    """

    key: str
    title: str
    unit: str
    name: str
    labels: tuple[tuple[str, Any], ...] = ()


def measures(recording: Recording) -> list[Measure]:
    """Everything in a recording that has a layer and a head, prompt-wide sums aside."""
    found = []
    for name in recording.names:
        array = recording[name]
        if {"layer", "head"} <= set(array.dims) and not name.endswith("_prefill"):
            found += list(_split(name, array))
    return found


def measure(recording: Recording, key: str) -> Measure:
    """The measure with this key. Raises InputError if the recording has none such."""
    known = {m.key: m for m in measures(recording)}
    if key not in known:
        raise InputError(f"no measure {key!r} in this recording; there are {', '.join(known)}")
    return known[key]


def matrix(recording: Recording, chosen: Measure, step: int | None = None) -> Matrix:
    """(layers, heads) values.

    Args:
        recording: holds the statistic.
        chosen: which number.
        step: one token's value (0 is the first answer token) where the statistic has steps; None
            for the mean.
    """
    array = recording[chosen.name].sel(dict(chosen.labels))
    if "step" in array.dims:
        if step is not None and step in array["step"]:
            array = array.sel(step=step)
        else:
            # Decode steps, unless the statistic is undefined at all of them (answers of one token).
            decoded = array.sel(step=slice(1, None))
            array = (decoded if bool(np.isfinite(decoded).any()) else array).mean("step")
    if "sample" in array.dims:
        array = array.mean("sample")
    return np.asarray(array.transpose("layer", "head").values, dtype=np.float64)


def has_steps(recording: Recording, chosen: Measure) -> bool:
    """Whether the measure can be read for a single token."""
    return "step" in recording[chosen.name].dims


def kinds(recording: Recording, score: Matrix | None = None) -> NDArray[np.str_]:
    """(layers, heads) of `KINDS`, by the thresholds above.

    Args:
        recording: holds the statistics that tell heads apart.
        score: (layers, heads) visual-head score, NaN where unknown; None where nothing is known
            about regions, and then no head is scanning.

    Raises:
        InputError: the recording lacks a statistic the taxonomy needs.
    """
    needed = ("modality_mass", "first_token_mass", "recent_text_mass")
    if missing := [name for name in needed if name not in recording.names]:
        raise InputError(
            f"the taxonomy of heads needs {', '.join(missing)}; record with all statistics"
        )
    image, text = (
        matrix(recording, measure(recording, f"modality_mass/{m}")) for m in ("image", "text")
    )
    first = matrix(recording, measure(recording, "first_token_mass"))
    recent = matrix(recording, measure(recording, f"recent_text_mass/{_RECENT}"))
    by_text = text >= TEXT
    # A NaN score compares as False and so counts as missed: such a head is scanning, not visual.
    missed = np.zeros(image.shape, bool) if score is None else ~(score >= HIT)
    # In the order of `KINDS`: a head is of the first kind whose condition it meets.
    fits = [
        (image >= VISUAL) & ~missed,
        # Reached only by heads that missed, which makes them scanning.
        image >= VISUAL,
        first >= SINK,
        by_text & (recent >= LOCAL),
        by_text,
    ]
    return np.select(fits, list(KINDS[:-1]), KINDS[-1])


def rank(values: Matrix, layers: tuple[int, ...]) -> list[tuple[int, int, float]]:
    """(layer, head, value) of every head, largest value first; heads without a value last."""
    # Stable: of equal values the head of the earlier layer comes first.
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), axis=None, kind="stable")
    places = [np.unravel_index(int(i), values.shape) for i in order]
    return [(layers[int(row)], int(column), float(values[row, column])) for row, column in places]


def _split(name: str, array: xr.DataArray) -> Iterator[Measure]:
    """One measure per label of the further dimensions; none if there are too many."""
    own = [str(dim) for dim in array.dims if dim not in _OWN]
    title, unit = str(array.attrs.get("long_name", name)), str(array.attrs.get("units") or "share")
    if any(array.sizes[dim] > _LONGEST for dim in own):
        return
    for labels in product(*(array[dim].values.tolist() for dim in own)):
        tail = [str(label) for label in labels]
        words = (
            f"{title}: {', '.join(_word(d, v) for d, v in zip(own, labels, strict=True))}"
            if own
            else title
        )
        yield Measure(
            "/".join([name, *tail]), words, unit, name, tuple(zip(own, labels, strict=True))
        )


def _word(dim: str, label: Any) -> str:
    """A label as one reads it: names as they are, numbers with the name of their dimension."""
    return str(label) if isinstance(label, str) else f"{dim.replace('_', ' ')} {label:g}"
