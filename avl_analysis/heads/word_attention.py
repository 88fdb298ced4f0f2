"""Attention while each word of an answer is produced, beside whether the word is right.

One row per judged word of a recording, with what the row that produced it attended to, by layer:
how much of it is on the picture, how spread out that is, and how much of it is on the part of the
picture that the word should be about. `error_auroc` says how well one of these numbers tells wrong
words from right ones. Everything is read from a recording; no model is run. Means are over the
heads of a layer.

Attention that differs between right and wrong words does not make them right or wrong: both follow
from the same hidden states, and some words are harder than others whatever is attended to. Words of
different kinds also look at the picture differently, so words are compared within their kind: a
colour with colours, not with an article that is never wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from avl_analysis.corpus.regions import only_image
from avl_analysis.corpus.words import FILLER, JudgedWord, judge_words
from avl_analysis.errors import InputError
from avl_analysis.heads.localisation import region_lift
from avl_analysis.intervals import Estimate, auroc
from avl_analysis.recordings.recording import Recording


@dataclass(frozen=True)
class Signal:
    """A number of a word that may tell whether it is wrong.

    Attributes:
        name: variable of `word_table`.
        title, unit: in words.
        short: the same for the label of a bar.
        wrong: 1 if wrong words should have the larger number, -1 if the smaller one.
    """

    name: str
    title: str
    unit: str
    short: str
    wrong: int


SIGNALS = (
    Signal("image_mass", "attention on the picture", "share", "on the picture", -1),
    Signal("image_entropy", "entropy of the attention on the picture", "nats", "its entropy", 1),
    Signal("region_lift", "attention on the right region", "times chance", "on the region", -1),
    Signal("surprise", "surprise of the model", "nats", "model's surprise", 1),
)
"""Signals in the order in which they are shown. Surprise, `-ln p` of the word, is no attention: it
is what attention has to be better than, or to add to, to be worth measuring for this.
"""


def word_table(recording: Recording) -> xr.Dataset:
    """Every judged word of a recording with what was attended to while it was produced.

    Returns:
        Dimension word, with `sample`, `step`, `text`, `truth`, `kind`, `task`, `right` (1, 0, NaN
        where it is not known) and `surprise` (nats, NaN where probabilities were not recorded);
        dimensions word and layer: `image_mass` (share of the row), `image_entropy` (nats, over the
        image tokens), `region_share` (share of the attention on the picture) and `region_lift`
        (that over the region's share of the picture; 1 is chance), NaN where not recorded or, of
        regions, not known.

    Raises:
        InputError: no sample of the recording knows the words of its right answer.
    """
    found: list[tuple[str, str, float, JudgedWord]] = []
    measured: dict[str, list[np.ndarray]] = {name: [] for name in _BY_LAYER}
    arrays = _arrays(recording)
    layers = recording["modality_mass"]["layer"].values
    for index, name in enumerate(recording.samples):
        facts = recording.facts(name)
        judged = judge_words(facts, only_image(recording, name))
        # A word may lie behind the last step that was recorded.
        judged = [word for word in judged if word.step < arrays["image_mass"].shape[1]]
        if not judged:
            continue
        surprise = facts.get("surprise", ())
        for word in judged:
            said = float(surprise[word.step]) if word.step < len(surprise) else np.nan
            found.append((name, str(facts.get("task", "")), said, word))
        for key, values in _of_sample(arrays, index, judged).items():
            measured[key].append(values)
    if not found:
        raise InputError(
            "no sample of this recording knows the words of its right answer, so none can be"
            " judged; record questions with known answers with this version (avl record)"
        )
    names, tasks, surprises, words = zip(*found, strict=True)
    right = [np.nan if word.right is None else float(word.right) for word in words]
    columns: dict[str, Any] = {
        "sample": np.array(names, dtype=object),
        "task": np.array(tasks, dtype=object),
        "step": np.array([word.step for word in words]),
        "text": np.array([word.word for word in words], dtype=object),
        "truth": np.array([word.truth for word in words], dtype=object),
        "kind": np.array([word.kind for word in words], dtype=object),
        "right": np.array(right),
        "surprise": np.array(surprises),
    }
    return xr.Dataset(
        {name: ("word", values) for name, values in columns.items()}
        | {name: (("word", "layer"), np.concatenate(rows)) for name, rows in measured.items()},
        {"layer": layers},
    )


_BY_LAYER = ("image_mass", "image_entropy", "region_share", "region_lift")
VARIABLES = {
    **dict.fromkeys(
        ("sample", "task", "step", "text", "truth", "kind", "right", "surprise"), ("word",)
    ),
    **dict.fromkeys(_BY_LAYER, ("word", "layer")),
}
"""Variables of `word_table` with their dimensions."""


def _arrays(recording: Recording) -> dict[str, np.ndarray]:
    """What is read of all samples, once: (samples, steps, layers) and scores of image tokens."""
    dims = ("sample", "step", "layer")
    mass = recording["modality_mass"].sel(key_modality="image").mean("head").transpose(*dims)
    found = {"image_mass": mass.values, "image_entropy": np.full(mass.shape, np.nan)}
    if "entropy" in recording.names:
        entropy = recording["entropy"].sel(key_modality="image").mean("head")
        found["image_entropy"] = entropy.transpose(*dims).values
    counts = recording.tokens["modality_count"].sel(key_modality="image")
    found["tokens"] = counts.values.astype(int)
    if "image_score" in recording.data["maps"]:
        scores = recording.data["maps"]["image_score"]
        found["scores"] = scores.transpose(*dims, "token").values
    return found


def _of_sample(
    arrays: Mapping[str, np.ndarray], index: int, words: Sequence[JudgedWord]
) -> Mapping[str, np.ndarray]:
    """(words, layers) of every number of one sample."""
    steps = [word.step for word in words]
    # (words, layers), the rows of the steps that produced them.
    mass, entropy = (arrays[name][index][steps] for name in ("image_mass", "image_entropy"))
    lift, share = np.full(mass.shape, np.nan), np.full(mass.shape, np.nan)
    tokens = int(arrays["tokens"][index])
    if "scores" in arrays and tokens:
        scores = arrays["scores"][index][..., :tokens]
        for row, word in enumerate(words):
            if word.region and word.step < len(scores):
                lift[row] = region_lift(scores[word.step], word.region)
                # The lift is the share over the region's share of the tokens; this undoes the
                # division.
                share[row] = lift[row] * len(word.region) / tokens
    return {
        "image_mass": mass,
        "image_entropy": entropy,
        "region_share": share,
        "region_lift": lift,
    }


def comparable(table: xr.Dataset) -> xr.Dataset:
    """The words whose being right or wrong is known and that could have been another word."""
    known = np.isfinite(table["right"].values) & (table["kind"].values != FILLER)
    return table.isel(word=np.flatnonzero(known))


def error_auroc(
    table: xr.Dataset, signal: Signal, layer: int | None = None, *, within: bool = True
) -> Estimate[float]:
    """How well a signal tells wrong words from right ones; 0.5 is chance, 1 perfect.

    Args:
        table: as `word_table` gives it.
        signal: one of `SIGNALS`; it counts in the direction that it names, so below 0.5 it points
            the other way.
        layer: a layer, None for the mean over layers.
        within: compare words of one kind and task only.

    Returns:
        `n` is the number of samples with a wrong word; without bounds where these are too few.
    """
    words = comparable(table)
    values = words[signal.name]
    if "layer" in values.dims:
        values = values.mean("layer") if layer is None else values.sel(layer=layer)
    pairs = zip(words["task"].values, words["kind"].values, strict=True)
    # Pairs of a right and a wrong word are compared within a stratum only.
    strata = [f"{task}/{kind}" for task, kind in pairs] if within else None
    wrong = words["right"].values == 0
    # The sign turns every signal so that larger means wrong.
    return auroc(signal.wrong * values.values, wrong, words["sample"].values, strata)
