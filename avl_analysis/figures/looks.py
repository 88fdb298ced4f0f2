"""Figures about one token of one answer: the picture, the text and the head that was looking.

Plain arrays in, specs out. Attention is a share of the whole row's attention everywhere here (rows
add up to 1 over system, image and text), so numbers of picture and text can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from avl_analysis.figures.patches import Patches
from avl_analysis.figures.spec import Array, Axis, Bar, Bars, Box, Heat, Line, Lines, Overlay
from avl_analysis.figures.strip import Span, Strip, visible

ATTENTION = Axis("attention", "share of the row")
LAYER = Axis("layer", "index")
HEAD = Axis("head", "index")
STEP = Axis("answer token", "index")
FAINT = 0.05
"""Attention on a word that is drawn at full strength even if no word gets more, so that small
shares look small.
"""
UNLIKE = 1.0
"""Divergence in nats drawn at full strength: the full cache's token has lost about two thirds of
its probability.
"""
STATES = ("minor: dropped", "secondary: held", "core: held and read")
"""Names of `avl.State` 0, 1, 2, in the palette's class colours."""


def token_overlay(
    picture: NDArray[np.uint8],
    patches: Patches,
    *,
    boxes: tuple[Box, ...] = (),
    title: str = "",
    top: float | None = None,
) -> Overlay:
    """Attention of one token on the patches of a picture.

    Args:
        picture: (height, width, 3) uint8.
        patches: attention on the picture's tokens, with their places.
        boxes: outlines in pixels of the picture.
        title: what stands above.
        top: value drawn at full strength; None takes the largest that is seen.
    """
    # Limits must differ, also where no token of the picture got any attention.
    axis = Axis(ATTENTION.label, ATTENTION.unit, (0.0, max(top or patches.largest, 1e-6)))
    return Overlay(picture, axis, patches, boxes=boxes, title=title)


def plain_picture(picture: NDArray[np.uint8], boxes: tuple[Box, ...] = ()) -> Overlay:
    """The picture as it is."""
    return Overlay(picture, ATTENTION, boxes=boxes)


def token_strip(
    tokens: Sequence[str],
    values: Array,
    modality: NDArray[np.int8],
    prompt: int,
    marked: int | None = None,
) -> Strip:
    """Attention of one token on the words before it, the pictures left out.

    Args:
        tokens: text of every position of prompt and answer, also of what the model has not read.
        values: (positions read,) attention.
        modality: (positions read,) 0 system, 1 image, 2 text.
        prompt: number of prompt positions; what follows is the answer.
        marked: position of the token that was being produced.
    """
    # The last token of an answer was produced and never read: it is text without a value.
    unread = (0, len(tokens) - len(modality))
    modality = np.pad(modality, unread, constant_values=2)
    values = np.pad(np.asarray(values, dtype=float), unread, constant_values=np.nan)
    # Positions of the prompt and answer that are shown; places below are indices into these.
    kept = np.flatnonzero(modality != 1)
    text = tuple(tokens[int(i)] for i in kept)
    shown = values[kept]
    # System tokens are taken to come first. `question` is the number of prompt tokens shown, so it
    # is the place of the first token of the answer.
    system, question = int((modality[kept] == 0).sum()), int((kept < prompt).sum())
    spans = (
        Span("system", 0, system),
        Span("question", system, question),
        Span("answer", question, len(text)),
    )
    # Empty without a marked token, and for one that is not among the tokens shown.
    place = np.flatnonzero(kept == marked)
    largest = float(np.nanmax(shown, initial=0.0))
    axis = Axis(ATTENTION.label, ATTENTION.unit, (0.0, max(largest, FAINT)))
    return Strip(
        text,
        shown,
        axis,
        tuple(span for span in spans if span.first < span.last),
        int(place[0]) if place.size else None,
    )


def fidelity_strip(
    name: str, words: Sequence[str], kl: Array, other: Mapping[int, str], slot: int = 1
) -> Strip:
    """An answer of the full cache, shaded by how far a policy's prediction is from it.

    Args:
        name: of the policy.
        words: the answer, one text a token.
        slot: colour slot of the policy.
        kl: (tokens,) divergence in nats; `UNLIKE` is drawn at full strength.
        other: place -> token the policy prefers, where it prefers another one.
    """
    # The end of an answer has a divergence and no word; the shorter of both lengths counts.
    shown = np.asarray(kl, dtype=float)[: len(words)]
    axis = Axis("KL(full || policy)", "nats", (0.0, UNLIKE))
    notes = {at: word for at, word in other.items() if at < shown.size}
    text = tuple(words[: shown.size])
    return Strip(text, shown, axis, (Span(name, 0, len(text)),), slot=slot, notes=notes)


def mass_by_layer(layers: Sequence[int], mass: Mapping[str, Sequence[float]]) -> Lines:
    """How one token divides its attention between system, image and text, layer by layer."""
    lines = tuple(
        Line(name, np.array(layers, dtype=float), np.array(mass[name], dtype=float), slot=slot)
        # The order is that of the palette's slots for modalities.
        for slot, name in enumerate(("system", "image", "text"))
    )
    return Lines(LAYER, Axis("attention", "share of the row", (0.0, 1.0)), lines, title="by layer")


def mass_by_token(
    words: Sequence[str], mass: Mapping[str, Sequence[float]], chosen: int | None = None
) -> Bars:
    """Attention on the picture and on text for every answer token."""
    names = tuple(f"{i} {visible(word)}" for i, word in enumerate(words))
    bars = tuple(
        Bar(name, np.array(mass[name]), slot=slot) for slot, name in ((1, "image"), (2, "text"))
    )
    title = "" if chosen is None else f"token {chosen} is chosen"
    return Bars(STEP, Axis("attention", "share of the row", (0.0, 1.0)), names, bars, title=title)


def evolution(
    name: str, values: Mapping[str, Array], axis: Axis, title: str = "", *, slot: int = 1
) -> Lines:
    """Curves over answer tokens; NaN where nothing was measured.

    `slot` is the palette's slot of the first.
    """
    lines = tuple(
        Line(
            key,
            np.arange(len(series), dtype=float),
            np.asarray(series, dtype=float),
            slot=slot + place,
        )
        for place, (key, series) in enumerate(values.items())
    )
    return Lines(STEP, axis, lines, title=title or name)


def age_profile(ages: Array, weights: Mapping[str, Array], title: str = "") -> Lines:
    """Mean attention on a text token by how many tokens ago it was."""
    lines = tuple(
        Line(name, np.asarray(ages, dtype=float), np.asarray(series, dtype=float), slot=slot)
        # Slot 2 is that of text, which the ages are of.
        for slot, (name, series) in enumerate(weights.items(), start=2)
    )
    return Lines(
        Axis("age of the text token", "tokens"),
        Axis("mean attention", "share of the row"),
        lines,
        title=title,
    )


def head_map(values: Array, layers: Sequence[int], value: Axis, title: str = "") -> Heat:
    """Layers x heads, layer 0 at the top."""
    ticks = tuple((float(i), str(layer)) for i, layer in enumerate(layers))
    return Heat(HEAD, Axis(LAYER.label, LAYER.unit, ticks=_thin(ticks)), value, values, title=title)


def states_overlay(picture: NDArray[np.uint8], states: Patches, title: str = "") -> Overlay:
    """What a policy did with every patch: classes 0, 1, 2 of `STATES`.

    NaN where there is no token.
    """
    return Overlay(picture, Axis("state", "class"), states, classes=STATES, title=title)


def who(layer: int | None, head: int | None) -> str:
    """Whose attention a figure shows, in words; None is the mean."""
    where = "mean over layers" if layer is None else f"layer {layer}"
    return f"{where}, {'mean over heads' if head is None else f'head {head}'}"


def _thin(ticks: tuple[tuple[float, str], ...], most: int = 16) -> tuple[tuple[float, str], ...]:
    return ticks[:: max(1, -(-len(ticks) // most))]
