"""Figures of relevance maps: one answer token, four maps over the image.

found = relevance(vlm, sample, seen.answer.ids, step=3)
plot_relevance(found, image, layer=2).save("relevance.pdf")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avl_analysis.figures import (
    Axis,
    Bar,
    Bars,
    Box,
    Caption,
    Figure,
    Line,
    Lines,
    Rule,
    looks,
)
from avl_analysis.figures.looks import who
from avl_analysis.figures.plot import Plot
from avl_analysis.figures.spec import Overlay, Panel
from avl_analysis.figures.strip import visible
from avl_analysis.heads.ablation import Head
from avl_analysis.heads.grounding import LocalisationHeads, ground
from avl_analysis.intervals import METHOD, mean_intervals
from avl_analysis.recordings.recording import Recording
from avl_analysis.relevance import METHODS, UNITS
from avl_analysis.relevance.maps import Relevance

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]


def map_overlay(
    found: Relevance,
    image: Pixels,
    method: str,
    layer: int | None = None,
    head: int | None = None,
    *,
    boxes: tuple[Box, ...] = (),
    number: int = 0,
) -> Overlay:
    """One relevance map over its image, on a scale of its own.

    Args:
        found: the maps of one answer token.
        image: (height, width, 3) uint8, what was asked about.
        method: one of `relevance.METHODS`.
        layer: a decoder layer; None for the mean over layers.
        head: a query head; None for the mean over heads.
        boxes: outlines in pixels of the image.
        number: which image of the prompt.

    Raises:
        InputError: a method, layer, head or image that is not there, or unknown places.
    """
    patches = found.patches(method, layer, head, number)
    largest = float(np.nanmax(patches.values, initial=0.0))
    axis = Axis(METHODS[method], UNITS[method], (0.0, largest if largest > 0 else 1.0))
    return Overlay(image, axis, patches, boxes=boxes, title=METHODS[method])


def plot_relevance(
    found: Relevance,
    image: Pixels,
    layer: int | None = None,
    head: int | None = None,
    *,
    boxes: tuple[Box, ...] = (),
    number: int = 0,
) -> Plot:
    """The image, and raw attention with the three relevance maps of one answer token over it.

    Args:
        found: the maps of one answer token.
        image: (height, width, 3) uint8, what was asked about.
        layer: a decoder layer; None for the mean over layers.
        head: a query head; None for the mean over heads.
        boxes: outlines in pixels of the image, such as what the word is about.
        number: which image of the prompt.

    Raises:
        InputError: a layer, head or image that is not there, or unknown places.
    """
    panels: list[Panel] = [looks.plain_picture(image, boxes)]
    panels += [
        map_overlay(found, image, method, layer, head, boxes=boxes, number=number)
        for method in METHODS
    ]
    word = visible(found.word)
    what = (
        f"Four maps of answer token {found.step} (“{word}”, probability"
        f" {found.probability:.2g}), {who(layer, head)}; relevance propagation runs through all"
        " layers and heads. Each map is on its own scale; relative attention is relative to"
        f" “{found.instruction}”."
    )
    caption = Caption(what, 1, found.model, "one answer has no interval")
    return Plot(Figure("relevance", f"What mattered for “{word}”", tuple(panels), caption, 5))


RANDOM = 20
"""Random sets of as many heads that localisation heads are held against."""
SETS = ("localisation heads", "all heads", "as many random heads")


@dataclass(frozen=True, eq=False)
class Grounding:
    """Localisation heads scored beside all heads and random ones, as figures show it.

    Attributes:
        chosen: the heads, and how they were chosen.
        pointing, iou: (pictures, `SETS`); of random sets the mean over `RANDOM` draws.
        area: share of patches on the object, which pointing at random reaches.
        examples: a sample of each picture.
    """

    chosen: LocalisationHeads
    pointing: Floats
    iou: Floats
    area: float
    examples: tuple[str, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """The sorted attention sums with their elbow, pointing, and overlap of boxes."""
        ordered = np.sort(self.chosen.sums.values.ravel())
        curve = Line("heads", np.arange(ordered.size, dtype=float), ordered, slot=1)
        sums = Lines(
            Axis("head, sorted", "index"),
            Axis("attention on the image", "share", (0.0, 1.0)),
            (curve,),
            (Rule(self.chosen.elbow, "elbow", "y"),),
            "attention sums",
        )
        pointing = Axis("strongest patch on the object", "share", (0.0, 1.0))
        overlap = Axis("overlap with the known box", "IoU", (0.0, 1.0))
        rules = (Rule(self.area, "at random"),)
        return (
            sums,
            _bars(self.pointing, pointing, "pointing", rules),
            _bars(self.iou, overlap, "box", ()),
        )


def grounding(
    recording: Recording, chosen: LocalisationHeads, samples: Sequence[str] | None = None
) -> Grounding:
    """Score localisation heads beside the mean over all heads and as many random heads.

    Args:
        recording: other pictures than the heads were chosen by.
        chosen: the heads.
        samples: names of the samples to score on; None takes all.

    Raises:
        InputError: as `heads.grounding.ground`.
    """
    layers = chosen.sums["layer"].values
    every = [(int(layer), head) for layer in layers for head in range(chosen.sums.sizes["head"])]
    rng = np.random.default_rng(0)
    sets: dict[str, Sequence[Head]] = {SETS[0]: chosen.heads, SETS[1]: every}
    for number in range(RANDOM):
        drawn = rng.choice(len(every), len(chosen.heads), replace=False)
        sets[f"random {number}"] = [every[index] for index in drawn]
    found = ground(recording, sets, samples)
    pointing, iou = (
        np.concatenate([found[name].values[:2], found[name].values[2:].mean(0, keepdims=True)]).T
        for name in ("pointing", "iou")
    )
    examples = tuple(map(str, found["example"].values))
    return Grounding(chosen, pointing, iou, float(found["area"].mean()), examples)


def plot_grounding(
    recording: Recording, chosen: LocalisationHeads, samples: Sequence[str] | None = None
) -> Plot:
    """How localisation heads were chosen, and how well they find what questions are about.

    Args:
        recording: other pictures than the heads were chosen by.
        chosen: what `heads.grounding.choose_heads` gave.
        samples: names of the samples to score on; None takes all.

    Raises:
        InputError: as `heads.grounding.ground`.
    """
    found = grounding(recording, chosen, samples)
    names = ", ".join(f"{layer}.{head}" for layer, head in chosen.heads)
    caption = Caption(
        f"Heads {names} (layer.head), chosen by attention sum and spatial entropy, on pictures with"
        " one known box. Dotted line: pointing at random.",
        len(found.pointing),
        str(recording.attrs.get("model", "unknown")),
        METHOD,
        of="pictures",
    )
    return Plot(Figure("grounding", "Localisation heads", found.panels, caption, columns=3))


def _bars(values: Floats, axis: Axis, title: str, rules: tuple[Rule, ...]) -> Bars:
    """One bar per set of heads, with intervals over pictures."""
    found = mean_intervals(values)
    bar = Bar(title, found.mean, found.low, found.high, slot=1)
    category = Axis("map", "heads")
    return Bars(category, axis, SETS, (bar,), rules, horizontal=True, title=title)
