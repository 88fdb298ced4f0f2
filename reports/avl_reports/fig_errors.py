"""Does attention say which words of an answer are wrong?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.errors import InputError
from avl_analysis.figures import Axis, Bar, Bars, Caption, Figure, Line, Lines, Rule
from avl_analysis.heads.word_attention import (
    SIGNALS,
    Signal,
    comparable,
    error_auroc,
    word_table,
)
from avl_analysis.intervals import METHOD, mean_intervals
from avl_reports.findings import Finding, judge
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script

QUESTION = "Does attention say which words of an answer are wrong?"
CHANCE = 0.5
WIDTH = 8
"""Words of an answer that a point of a curve stands for."""
LEAST = 5
"""Samples with a word in these places without which a point is not drawn."""
RIGHT, WRONG = 3, 5


def section(run: Run) -> Section:
    """Attention over the answer by whether the word is right, and how well each signal tells."""
    table = words_of(run)
    shown = comparable(table)
    bad = shown["right"].values == 0
    if not bad.any() or bad.all():
        which = "wrong" if bad.any() else "right"
        raise NotMeasured(
            f"all {bad.size} words that could be judged are {which}, so nothing tells them apart;"
            " `avl errors` asks about noisy pictures"
        )
    # The model's own surprise is one number per word, without layers; only the bars show it.
    curves = [signal for signal in SIGNALS if "layer" in shown[signal.name].dims]
    panels = [_curve(shown, signal) for signal in curves]
    noise = float(table.attrs.get("noise", 0))
    what = (
        f"{int(bad.sum())} of {bad.size} words are wrong; only words that could have been another"
        " are counted, no articles and commas."
        + (f" Pictures have noise of {noise:g} of a pixel's range." if noise else "")
        + f" Curves: mean of {WIDTH} places of the answer, of right and of wrong words. Bars: area"
        " under the ROC curve for “this word is wrong”, 0.5 is chance; samples are"
        " resampled, and no interval is given where fewer than eight hold a wrong word."
    )
    count = len(set(shown["sample"].values))
    caption = Caption(what, count, run.model, METHOD)
    figure = Figure(
        "errors",
        "Attention while right and wrong words are written",
        (*panels, _bars(table)),
        caption,
    )
    return Section(QUESTION, figure, findings(table), sentence(table))


def words_of(run: Run) -> xr.Dataset:
    """The judged words of `avl errors` where there are some, else those of the recording."""
    try:
        return run.further("errors")
    except NotMeasured:
        try:
            return word_table(run.recording)
        except (InputError, KeyError) as error:
            # Recordings without judged words (InputError) or without a statistic of the table
            # (KeyError).
            raise NotMeasured(str(error)) from error


def findings(table: xr.Dataset) -> tuple[Finding, ...]:
    """Whether less attention on the picture, or on the right part of it, goes with wrong words."""
    found = []
    for name, choice in (
        ("image_mass", "Words are wrong where the picture gets less attention"),
        ("region_lift", "Words are wrong where the right part of the picture gets less attention"),
    ):
        signal = next(signal for signal in SIGNALS if signal.name == name)
        area = error_auroc(table, signal)
        found.append(
            Finding(
                choice,
                f"Against words of the same kind, {signal.title} (mean over layers and heads) tells"
                f" wrong from right with an area under the ROC curve of {area.words()}.",
                f"at least {CHANCE:g}",
                judge(area, "at least", CHANCE),
            )
        )
    return tuple(found)


def sentence(table: xr.Dataset) -> str:
    """How attention compares with the model's own probability, in one plain sentence."""
    areas = {signal.name: error_auroc(table, signal) for signal in SIGNALS}
    # Told apart from attention, because it is what attention has to be better than.
    own = areas.pop("surprise")
    said = {signal.title: areas[signal.name].words() for signal in SIGNALS if signal.name in areas}
    told = ", ".join(f"{title} {area}" for title, area in said.items())
    versus = (
        f"; the probability that the model itself gave to the word: {own.words()}"
        if np.isfinite(own.mean)
        else ""
    )
    return (
        f"How well a word's attention tells that it is wrong: {told}{versus}. None of this says"
        " that the attention made the word wrong."
    )


def _curve(words: xr.Dataset, signal: Signal) -> Lines:
    """A signal over the answer, of right and of wrong words."""
    value = Axis("entropy" if signal.unit == "nats" else "attention", signal.unit)
    place = Axis("word of the answer", "index")
    lines = _by_place(words, signal)
    return Lines(place, value, lines, _rules(signal), title=signal.title)


def _rules(signal: Signal) -> tuple[Rule, ...]:
    return (Rule(1.0, "uniform map", "y"),) if signal.name == "region_lift" else ()


def _by_place(words: xr.Dataset, signal: Signal) -> tuple[Line, ...]:
    """Means over samples of each sample's own mean in a group of places."""
    # (words,) mean over layers; below, the group of places and the sample of each word.
    values = words[signal.name].mean("layer").values
    group = words["step"].values // WIDTH
    # `sample` (words,) is the row of each word's sample in the tables below.
    samples, sample = np.unique(words["sample"].values.astype(str), return_inverse=True)
    places = np.arange(group.max() + 1)
    means: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    slots = {}
    for name, slot, wanted in (("right words", RIGHT, 1.0), ("wrong words", WRONG, 0.0)):
        chosen = (words["right"].values == wanted) & np.isfinite(values)
        # (samples, groups of places)
        total, count = (np.zeros((len(samples), len(places))) for _ in range(2))
        # Several words share a place of the table. `add.at` adds all of them; indexed `+=` would
        # keep one.
        np.add.at(total, (sample[chosen], group[chosen]), values[chosen])
        np.add.at(count, (sample[chosen], group[chosen]), 1)
        # NaN where a sample has no such word, so that it is left out and not counted as 0.
        own = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        found = mean_intervals(own)
        few = found.n < LEAST
        mean, low, high = (
            np.where(few, np.nan, part) for part in (found.mean, found.low, found.high)
        )
        means[name], slots[name] = (mean, low, high), slot
    # the places behind the last one that is drawn would only stretch the axis
    drawn = np.flatnonzero(np.any([np.isfinite(mean) for mean, _, _ in means.values()], axis=0))
    kept = places[: int(drawn[-1]) + 1] if drawn.size else places[:1]
    # The middle of each group, in words.
    x = kept * WIDTH + (WIDTH - 1) / 2
    return tuple(
        Line(name, x, *_first(parts, len(kept)), slot=slots[name]) for name, parts in means.items()
    )


def _first(
    parts: tuple[np.ndarray, np.ndarray, np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low and high at the first places."""
    mean, low, high = parts
    return mean[:count], low[:count], high[:count]


def _bars(table: xr.Dataset) -> Bars:
    """How well each signal tells wrong words, against words of one kind and against all."""
    bars = []
    # Kinds of words may differ both in attention and in how often they are wrong. Compared within a
    # kind, a signal gains nothing from telling kinds apart.
    for name, slot, within in (("words of one kind", 1, True), ("all words", 2, False)):
        areas = [error_auroc(table, signal, within=within) for signal in SIGNALS]
        mean, low, high = (
            np.array([getattr(area, end) for area in areas]) for end in ("mean", "low", "high")
        )
        bars.append(Bar(name, mean, low, high, slot=slot))
    return Bars(
        Axis("signal", "name"),
        Axis("area under the ROC curve", "share", (0.0, 1.0)),
        tuple(signal.short for signal in SIGNALS),
        tuple(bars),
        (Rule(CHANCE, "chance", "x"),),
        horizontal=True,
        title="telling wrong words",
    )


if __name__ == "__main__":
    run_script(section)
