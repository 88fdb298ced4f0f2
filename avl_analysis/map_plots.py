"""Figures of relevance maps: one answer token, five maps over the image.

found = relevance(vlm, sample, seen.answer.ids, step=3)
plot_relevance(found, image, layer=2).save("relevance.pdf")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from avl_analysis.errors import InputError
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
from avl_analysis.heads.patch_words import PatchWords
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
    whole: bool = False,
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
        whole: of an image that the model saw as a whole and in parts of higher resolution, show the
            view of the whole; the parts cover it otherwise.

    Raises:
        InputError: a method, layer, head or image that is not there, or unknown places.
    """
    patches = found.patches(method, layer, head, number)
    patches = patches.of_whole() if whole else patches
    largest = patches.largest
    # Limits must differ, also for a map without a positive value.
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
    whole: bool = False,
) -> Plot:
    """The image, and raw attention with the other maps of one answer token over it.

    Args:
        found: the maps of one answer token.
        image: (height, width, 3) uint8, what was asked about.
        layer: a decoder layer; None for the mean over layers.
        head: a query head; None for the mean over heads.
        boxes: outlines in pixels of the image, such as what the word is about.
        number: which image of the prompt.
        whole: as in `map_overlay`.

    Raises:
        InputError: a layer, head or image that is not there, or unknown places.
    """
    panels: list[Panel] = [looks.plain_picture(image, boxes)]
    panels += [
        map_overlay(found, image, method, layer, head, boxes=boxes, number=number, whole=whole)
        for method in METHODS
    ]
    word = visible(found.word)
    what = (
        f"Five maps of answer token {found.step} (“{word}”, probability"
        f" {found.probability:.2g}), {who(layer, head)}; relevance propagation runs through all"
        " layers and heads. Each map is on its own scale; relative attention is relative to"
        f" “{found.instruction}”."
    )
    caption = Caption(what, 1, found.model, "one answer has no interval")
    return Plot(Figure("relevance", f"What mattered for “{word}”", tuple(panels), caption, 3))


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
    # A fixed seed: the same recording and heads give the same random sets and so the same figure.
    rng = np.random.default_rng(0)
    sets: dict[str, Sequence[Head]] = {SETS[0]: chosen.heads, SETS[1]: every}
    for number in range(RANDOM):
        drawn = rng.choice(len(every), len(chosen.heads), replace=False)
        sets[f"random {number}"] = [every[index] for index in drawn]
    found = ground(recording, sets, samples)
    pointing, iou = (
        # Rows are sets, in the order they were given: the first two stay, all random ones become
        # their mean. Transposed to (pictures, 3), in the order of `SETS`.
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


KIND_SLOTS = {"shape": 1, "colour": 3, "character": 2, "name": 1}
"""Kind of a name -> colour slot of its curve."""


def plot_patch_words(
    found: PatchWords, image: Pixels, depth: int, *, boxes: tuple[Box, ...] = (), number: int = 0
) -> Plot:
    """The image, and over it the most probable word of every patch at one depth.

    Args:
        found: what `heads.patch_words.patch_words` gave.
        image: (height, width, 3) uint8, what was asked about.
        depth: decoder layers passed, 0 for what enters the first.
        boxes: outlines in pixels of the image.
        number: which image of the prompt.

    Raises:
        InputError: a depth or image that is not there, or unknown places.
    """
    words = found.words(depth)
    if not 0 <= number < len(found.images) or not found.images[number].placed:
        raise InputError(f"image {number} has no tokens with a known place to write words on")
    tokens = found.images[number]
    # Probability of the likeliest word at this depth, (tokens of the image,)
    patches = tokens.patches(found.probability[depth, tokens.token, 0])
    overlay = Overlay(
        image,
        Axis("probability of the word", "share", (0.0, 1.0)),
        patches,
        boxes=boxes,
        title=_passed(depth),
        words=tuple(visible(words[token]) for token in tokens.token),
    )
    caption = Caption(
        f"The most probable word of each patch's state, {_passed(depth)}, through the final norm"
        " and the output embedding (logit lens). The stronger the colour, the more probable.",
        1,
        found.model,
        "one picture has no interval",
    )
    panels = (looks.plain_picture(image, boxes), overlay)
    return Plot(Figure("patch_words", "What each patch says", panels, caption))


def plot_patch_names(result: xr.Dataset) -> Plot:
    """For which share of an object's patches the top words hold its name, by depth.

    Args:
        result: what `heads.patch_words.say_names` or `load_patch_names` gave.
    """
    caption = Caption(
        names_caption(result),
        result.sizes["picture"],
        str(result.attrs.get("model", "unknown")),
        METHOD,
        of="pictures",
    )
    return Plot(Figure("patch_names", "What patches say", (names_panel(result),), caption))


def names_panel(result: xr.Dataset) -> Lines:
    """The curves of `plot_patch_names`: own patches, and the background as baselines."""
    depth = result["depth"].values.astype(float)
    lines = []
    for kind in map(str, result["kind"].values):
        part = result.sel(kind=kind).transpose("picture", "depth")
        own = mean_intervals(part["own"].values)
        slot = KIND_SLOTS.get(kind, 4)
        lines.append(Line(f"its {kind}", depth, own.mean, own.low, own.high, slot=slot))
    # The baselines share one name, so they share one entry of the legend.
    for kind in map(str, result["kind"].values):
        usual = result["background"].sel(kind=kind).transpose("picture", "depth").values
        mean = mean_intervals(usual).mean
        slot = KIND_SLOTS.get(kind, 4)
        lines.append(Line("the same name, background", depth, mean, slot=slot, role="baseline"))
    value = Axis("patches that say it", "share", (0.0, 1.0))
    return Lines(Axis("layers passed", "index"), value, tuple(lines), title="names by depth")


def names_caption(result: xr.Dataset) -> str:
    """What the curves of `plot_patch_names` are."""
    return (
        "Share of the patches of an object, or of a printed character, among whose"
        f" {result.attrs.get('top', '?')} most probable words is its name, by layers passed; the"
        " state goes through the final norm and the output embedding (logit lens). Baselines: the"
        " same names on patches that show no object."
    )


def _passed(depth: int) -> str:
    return f"after {depth} layer{'' if depth == 1 else 's'}" if depth else "before the first layer"


def plot_pointing(result: xr.Dataset) -> Plot:
    """For which share of words the strongest patch of each map lies on what the word is about.

    Args:
        result: what `relevance.pointing.point` gave.
    """
    caption = Caption(
        pointing_caption(result),
        result.sizes["sample"],
        str(result.attrs.get("model", "unknown")),
        METHOD,
    )
    figure = Figure("pointing", "Which map points at it", (pointing_panel(result),), caption)
    return Plot(figure)


def pointing_panel(result: xr.Dataset) -> Lines:
    """The curves of `plot_pointing`: a line per map over layers, and relevance propagation."""
    layers = result["layer"].values.astype(float)
    lines = []
    for slot, method in enumerate(map(str, result["layered"].values), 1):
        values = result["pointing"].sel(layered=method).transpose("sample", "layer").values
        found = mean_intervals(values)
        lines.append(Line(METHODS[method], layers, found.mean, found.low, found.high, slot=slot))
    # Of one map for all layers the line is level, with the interval of its one number.
    whole = mean_intervals(result["pointing_all"].sel(map="chefer").values)
    mean, low, high = (np.full(layers.shape, p) for p in (whole.mean, whole.low, whole.high))
    lines.append(Line(METHODS["chefer"], layers, mean, low, high, slot=len(lines) + 1))
    value = Axis("strongest patch on the object", "share", (0.0, 1.0))
    rules = (Rule(float(result["area"].mean()), "at random", "y"),)
    return Lines(Axis("layer", "index"), value, tuple(lines), rules, title="by layer")


def pointing_caption(result: xr.Dataset) -> str:
    """What the curves of `plot_pointing` are."""
    return (
        "Share of rightly answered questions whose strongest patch, in each map of one word of the"
        " answer, lies on what the word is about; mean over heads, layer by layer, and relevance"
        " propagation through all layers. Relative attention is relative to"
        f" “{result.attrs.get('instruction', '?')}”."
    )
