"""Figures of relevance maps: one answer token, four maps over the image.

found = relevance(vlm, sample, seen.answer.ids, step=3)
plot_relevance(found, image, layer=2).save("relevance.pdf")
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avl_analysis.figures import Axis, Box, Caption, Figure, looks
from avl_analysis.figures.looks import who
from avl_analysis.figures.plot import Plot
from avl_analysis.figures.spec import Overlay, Panel
from avl_analysis.figures.strip import visible
from avl_analysis.relevance import METHODS, UNITS
from avl_analysis.relevance.maps import Relevance

Pixels = NDArray[np.uint8]


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
