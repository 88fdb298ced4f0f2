"""Figures of one watched answer: where the model looked, in every head, over the answer.

    seen = live.observe(vlm, Sample("question", (image,), "Describe the picture."))
    plot_token(seen, image, 3, layer=2).save("token.svg")

Each function describes a figure and returns it as a `Plot`. The dashboard draws the same figures,
so what it shows can be drawn again from Python. Attention is a share of the whole row's attention
throughout: rows add up to 1 over system, image and text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avl_analysis.errors import InputError
from avl_analysis.figures import Animation, Box, Caption, Figure, looks
from avl_analysis.figures.looks import who
from avl_analysis.figures.plot import Plot
from avl_analysis.figures.spec import Axis, Lines, Overlay, Panel
from avl_analysis.figures.strip import visible
from avl_analysis.live import Observation

Pixels = NDArray[np.uint8]
_ONE = "one answer has no interval"


def plot_token(
    seen: Observation,
    image: Pixels,
    token: int,
    layer: int | None = None,
    head: int | None = None,
    *,
    boxes: tuple[Box, ...] = (),
    top: float | None = None,
) -> Plot:
    """The image, the attention of one answer token over it, and how layers divide their attention.

    Args:
        seen: the answer, watched.
        image: (height, width, 3) uint8, what was asked about.
        token: number of the answer token, from 0.
        layer: a decoder layer; None for the mean over layers.
        head: a query head; None for the mean over heads.
        boxes: outlines in pixels of the image, such as what the word is about.
        top: attention on a patch that is drawn at full strength; None takes the largest.

    Raises:
        InputError: a token, layer or head that is not there.
    """
    look = seen.look(token, layer, head)
    panels: list[Panel] = [looks.plain_picture(image, boxes)]
    if seen.drawable:
        title = f"“{visible(seen.answer.words[token])}”, {who(layer, head)}"
        panels.append(
            looks.token_overlay(image, seen.on_image(look), boxes=boxes, title=title, top=top)
        )
    panels.append(by_layer(seen, token, head))
    what = f"Attention of answer token {token}, {who(layer, head)}, on the image and by layer."
    return _plot("token", "Where the model looked for a token", panels, what, seen, columns=3)


def by_layer(seen: Observation, token: int, head: int | None = None) -> Lines:
    """How every layer divides one answer token's attention between system, image and text.

    Args:
        seen: the answer, watched.
        token: number of the answer token, from 0.
        head: a query head; None for the mean over heads.
    """
    masses = [seen.mass(token, layer, head) for layer in seen.layers]
    return looks.mass_by_layer(
        seen.layers, {name: [mass[name] for mass in masses] for name in masses[0]}
    )


def plot_head_overlays(seen: Observation, image: Pixels, token: int, layer: int) -> Plot:
    """One answer token's attention over the image in every head of a layer, on one scale.

    Args:
        seen: the answer, watched.
        image: (height, width, 3) uint8, what was asked about.
        token: number of the answer token, from 0.
        layer: a decoder layer.

    Raises:
        InputError: a token or layer that is not there, or a model of which it is not known where
            its image tokens lie.
    """
    rows = [seen.look(token, layer, head) for head in range(seen.heads)]
    top = max(_largest(seen, row) for row in rows)
    panels: list[Panel] = [
        looks.token_overlay(image, seen.on_image(row), title=f"head {head}", top=top)
        for head, row in enumerate(rows)
    ]
    word = visible(seen.answer.words[token])
    what = (
        f"Attention of answer token {token} (“{word}”) in every head of layer {layer}; full colour:"
        f" {top:.2g} of the row's attention on one patch, in all panels."
    )
    return _plot("head_overlays", f"All heads of layer {layer}", panels, what, seen, columns=4)


def plot_over_answer(
    seen: Observation, image: Pixels, layer: int | None = None, head: int | None = None
) -> Plot:
    """Attention over the image while the answer is written, one frame per token.

    All frames are on one scale.

    Args:
        seen: the answer, watched.
        image: (height, width, 3) uint8, what was asked about.
        layer: a decoder layer; None for the mean over layers.
        head: a query head; None for the mean over heads.

    Raises:
        InputError: a layer or head that is not there, an answer without a token, or a model of
            which it is not known where its image tokens lie.
    """
    steps = range(min(seen.steps, len(seen.answer.words)))
    if not steps:
        raise InputError("the answer has no token, so there is nothing to show over it")
    rows = [seen.look(step, layer, head) for step in steps]
    top = max(_largest(seen, row) for row in rows)
    frames: list[Overlay] = [
        looks.token_overlay(
            image,
            seen.on_image(row),
            title=f"token {step}: “{visible(seen.answer.words[step])}”",
            top=top,
        )
        for step, row in zip(steps, rows, strict=True)
    ]
    moving = Animation(tuple(frames), tuple(steps), title=f"over the answer, {who(layer, head)}")
    what = (
        f"Attention of every answer token, {who(layer, head)}; full colour: {top:.2g} of the row's"
        " attention on one patch, in all frames."
    )
    return _plot("over_answer", "Attention over the answer", [moving], what, seen, columns=1)


def plot_mass(seen: Observation, layer: int, head: int) -> Plot:
    """How one head divides its attention between image and text at every answer token.

    Args:
        seen: the answer, watched.
        layer: a decoder layer.
        head: a query head.
    """
    masses = [seen.mass(token, layer, head) for token in range(seen.steps)]
    series = {key: np.array([mass[key] for mass in masses]) for key in ("image", "text")}
    axis = Axis("attention", "share of the row", (0.0, 1.0))
    lines = looks.evolution("over the answer", series, axis)
    what = f"Attention on image and text at every answer token, {who(layer, head)}."
    return _plot("mass", "Attention over the answer", [lines], what, seen, columns=1)


def _largest(seen: Observation, row: NDArray[np.float64]) -> float:
    """Attention on the patch of the first image that gets most."""
    return float(np.nanmax(row[seen.image == 0], initial=1e-6))


def _plot(
    name: str, title: str, panels: list[Panel], what: str, seen: Observation, *, columns: int
) -> Plot:
    model = str(seen.recording.attrs.get("model_name") or "unknown")
    return Plot(Figure(name, title, tuple(panels), Caption(what, 1, model, _ONE), columns=columns))
