"""Figures of one watched answer: where the model looked, in every head, over the answer.

    seen = live.observe(vlm, Sample("question", (image,), "Describe the picture."))
    plot_token(seen, image, 3, layer=2).save("token.svg")

Each function describes a figure and returns it as a `Plot`. The dashboard draws the same figures,
so what it shows can be drawn again from Python. Attention is a share of the whole row's attention
throughout: rows add up to 1 over system, image and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from avl.tokens import Modality
from avl_analysis.errors import InputError
from avl_analysis.figures import Animation, Box, Caption, Figure, looks
from avl_analysis.figures.looks import who
from avl_analysis.figures.plot import Plot
from avl_analysis.figures.spec import Axis, Bar, Bars, Heat, Lines, Overlay, Panel
from avl_analysis.figures.strip import visible
from avl_analysis.heads.lens import Lens
from avl_analysis.heads.rollout import Rollout
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
    whole: bool = False,
) -> Plot:
    """The image, the attention of one answer token over it, and how layers divide their attention.

    Args:
        seen: the answer, watched.
        image: (height, width, 3) uint8, what was asked about.
        token: number of the answer token, from 0.
        layer: a decoder layer; None for the mean over layers.
        head: a query head; None for the mean over heads.
        boxes: outlines in pixels of the image, such as what the word is about.
        top: attention on a patch that is drawn at full strength; None takes the largest that is
            seen.
        whole: of an image that the model saw as a whole and in parts of higher resolution, show the
            view of the whole; the parts cover it otherwise.

    Raises:
        InputError: a token, layer or head that is not there.
    """
    look = seen.look(token, layer, head)
    panels: list[Panel] = [looks.plain_picture(image, boxes)]
    if seen.drawable:
        title = f"“{visible(seen.answer.words[token])}”, {who(layer, head)}"
        patches = seen.on_image(look)
        patches = patches.of_whole() if whole else patches
        panels.append(looks.token_overlay(image, patches, boxes=boxes, title=title, top=top))
    panels.append(by_layer(seen, token, head))
    what = f"Attention of answer token {token}, {who(layer, head)}, on the image and by layer."
    return _plot("token", "Where the model looked for a token", panels, what, seen, columns=3)


MOST_FRAMES = 8
"""Frames of a video that are drawn; of longer videos as many, evenly spread."""


def plot_video(
    seen: Observation,
    frames: Sequence[Pixels],
    token: int,
    layer: int | None = None,
    head: int | None = None,
    *,
    boxes: Sequence[Box] = (),
) -> Plot:
    """The frames of a video with the attention of one answer token, and a strip over time.

    The strip has a row for every answer token and a column for every frame: the attention on that
    frame while the token is written. Frames are those of the prompt's first video; where a model
    makes one token of a patch in several frames, the first frame of each group is drawn.

    Args:
        seen: the answer, watched.
        frames: (height, width, 3) uint8 each, all that were shown, in order.
        token: number of the answer token, from 0.
        layer: a decoder layer; None for the mean over layers.
        head: a query head; None for the mean over heads.
        boxes: an outline for every frame, in its pixels.

    Raises:
        InputError: no video in the prompt, or not known where its tokens lie, or a token, layer or
            head that is not there.
    """
    # Indices into `seen.images` that are frames; of these, the frames of the first video.
    timed = [number for number in seen.drawable if seen.images[number].frame >= 0]
    timed = [one for one in timed if seen.images[one].image == seen.images[timed[0]].image]
    if not timed:
        raise InputError(
            "no video with known places of its tokens was asked about: pass the answer to a"
            " question about a Video"
        )
    # Frames that share their tokens, rounded up, because the last group may be smaller.
    together = -(-len(frames) // len(timed))
    look = np.nan_to_num(seen.look(token, layer, head))
    # One scale for all frames.
    top = max(float(look[seen.images[one].position].max()) for one in timed)
    picked = np.linspace(0, len(timed) - 1, min(MOST_FRAMES, len(timed))).round().astype(int)
    panels: list[Panel] = []
    for number in picked.tolist():
        at, tokens = number * together, seen.images[timed[number]]
        panels.append(
            looks.token_overlay(
                frames[at],
                seen.on_image(look, timed[number]),
                # A slice, so that without boxes it is empty.
                boxes=tuple(boxes[at : at + 1]),
                title=f"frame {number}, {look[tokens.position].sum():.1%}",
                top=top,
            )
        )
    panels.append(_over_time(seen, timed, layer, head))
    what = (
        f"Attention of answer token {token}, {who(layer, head)}, on every frame, all on one scale"
        " (above each its share of all attention), and attention on every frame while each token is"
        " written."
    )
    return _plot("video", "Attention over time", panels, what, seen, columns=4)


def _over_time(
    seen: Observation, timed: Sequence[int], layer: int | None, head: int | None
) -> Heat:
    """Attention on every frame, by answer token.

    Args:
        seen: the answer, watched.
        timed: which of its images are the frames.
        layer: a decoder layer; None for the mean over layers.
        head: a query head; None for the mean over heads.
    """
    words = [visible(word) for word in seen.answer.words[: seen.steps]]
    rows = [np.nan_to_num(seen.look(step, layer, head)) for step in range(max(1, len(words)))]
    # (answer tokens, frames)
    mass = np.array([[row[seen.images[one].position].sum() for one in timed] for row in rows])
    return Heat(
        Axis("frame", "index", ticks=tuple((float(i), str(i)) for i in range(len(timed)))),
        Axis("answer token", "index", ticks=tuple((float(i), w) for i, w in enumerate(words))),
        Axis("attention", "share of the row"),
        mass,
        title="over time",
    )


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


def plot_choices(seen: Observation, token: int) -> Plot:
    """What the model could have written at one token, and how sure it was along the answer.

    Args:
        seen: the answer, watched.
        token: number of the answer token, from 0.

    Raises:
        InputError: a token that is not there.
    """
    choices = seen.answer.choices
    if not 0 <= token < len(choices):
        raise InputError(
            f"token {token} has no probabilities: those of {len(choices)} tokens were kept"
        )
    choice = choices[token]
    names = tuple(f"{rank} {visible(word)}" for rank, word in enumerate(choice.words, 1))
    share = Axis("probability", "share", (0.0, 1.0))
    bars = Bars(
        Axis("next token", "by rank"),
        share,
        names,
        (Bar("probability", np.array(choice.probabilities), slot=1),),
        horizontal=True,
        title=f"instead of token {token}",
    )
    # Choices include that of the end of the answer, which has no word.
    written = np.array([one.probability for one in choices[: len(seen.answer.words)]])
    likeliest = np.array([one.probabilities[0] for one in choices[: len(seen.answer.words)]])
    series = {"of the token written": written, "of the likeliest token": likeliest}
    lines = looks.evolution("probability over the answer", series, share)
    what = (
        f"Probabilities of the {len(names)} likeliest tokens at answer token {token}, where"
        f" “{_word(seen, token)}” was written with probability {choice.probability:.3g}, and of"
        " every token that was written."
    )
    title = "What the model could have written"
    return _plot("choices", title, [bars, lines], what, seen, columns=2)


def plot_rollout(
    seen: Observation, found: Rollout, image: Pixels, token: int, *, boxes: tuple[Box, ...] = ()
) -> Plot:
    """Attention rollout of one answer token over the image, beside its attention in one layer.

    Args:
        seen: the answer, watched.
        found: rollout of the same answer.
        image: (height, width, 3) uint8, what was asked about.
        token: number of the answer token, from 0.
        boxes: outlines in pixels of the image.

    Raises:
        InputError: a token that is not there, or a model of which it is not known where its image
            tokens lie.
    """
    last = found.layer
    look = seen.look(token, last)
    panels: list[Panel] = []
    for label, values in (
        (f"rollout through layers 0 to {last}", found.values[token].astype(np.float64)),
        (f"attention of layer {last} alone", look),
    ):
        drawn = looks.token_overlay(image, seen.on_image(values), boxes=boxes, title=label)
        panels.append(replace(drawn, value=replace(drawn.value, label=label.partition(" ")[0])))
    what = (
        f"Attention rollout (Abnar and Zuidema, 2020) of answer token {token}"
        f" (“{_word(seen, token)}”) and its attention in layer {last}, mean over heads; each panel"
        " has its own scale."
    )
    return _plot("rollout", "Attention through the layers", panels, what, seen, columns=2)


def plot_lens(seen: Observation, found: Lens) -> Plot:
    """Logit lens: with which probability each layer would write every token of the answer.

    Args:
        seen: the answer, watched.
        found: lens of the same answer.
    """
    steps = range(min(seen.steps, len(seen.answer.words)))
    heat = Heat(
        Axis(
            "answer token",
            "index",
            ticks=tuple((float(step), f"{step} {_word(seen, step)}") for step in steps),
        ),
        Axis("layer", "index"),
        Axis("probability", "share", (0.0, 1.0)),
        # (layers, answer tokens)
        found.written[: len(steps)].T.astype(np.float64),
        upward=True,
    )
    what = (
        "Probability of every token of the answer behind every layer, by the model's own last norm"
        " and output embedding (logit lens)."
    )
    return _plot("lens", "What every layer would write", [heat], what, seen, columns=1)


def plot_patch(
    seen: Observation,
    patches: Sequence[int],
    layer: int | None = None,
    head: int | None = None,
    *,
    image: int = 0,
) -> Plot:
    """How much every answer token looked at one patch of an image, or at several together.

    Args:
        seen: the answer, watched.
        patches: numbers of image tokens of one image, from 0, as hovering over a patch shows them.
        layer: a decoder layer; None for the mean over layers.
        head: a query head; None for the mean over heads.
        image: which image of the prompt.

    Raises:
        InputError: no patch, or one that the image does not have; a layer or head that is not
            there.
    """
    if not 0 <= image < len(seen.images):
        raise InputError(f"there is no image {image}: the prompt has {len(seen.images)}")
    position = seen.images[image].position
    chosen = sorted(set(patches))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(position):
        raise InputError(
            f"patches {chosen}: choose one or more of the {len(position)} tokens of image {image},"
            " counted from 0"
        )
    steps = range(min(seen.steps, len(seen.answer.words)))
    rows = [np.nan_to_num(seen.look(step, layer, head)) for step in steps]
    given = np.array([row[position[chosen]].sum() for row in rows])
    names = tuple(f"{step} {_word(seen, step)}" for step in steps)
    which = f"patch {chosen[0]}" if len(chosen) == 1 else f"{len(chosen)} patches"
    bars = Bars(
        Axis("answer token", "index"),
        Axis(f"attention on {which}", "share of the row"),
        names,
        (Bar(which, given, slot=1),),
    )
    what = f"Attention of every answer token on {which} of the image, {who(layer, head)}."
    return _plot("patch", "Which tokens looked here", [bars], what, seen, columns=1)


def plot_words(seen: Observation, layer: int | None = None, head: int | None = None) -> Plot:
    """Attention from every answer token to every word before it, the image and system as one each.

    Args:
        seen: the answer, watched.
        layer: a decoder layer; None for the mean over layers.
        head: a query head; None for the mean over heads.

    Raises:
        InputError: a layer or head that is not there, or an answer without a token.
    """
    steps = range(min(seen.steps, len(seen.answer.words)))
    if not steps:
        raise InputError("the answer has no token, so there is nothing to show of it")
    words = np.flatnonzero(seen.modality == Modality.TEXT)
    rows = []
    for step in steps:
        look = seen.look(step, layer, head)
        # The row that writes token `step` is at position prompt + step - 1 and reads no later key.
        unread = np.arange(look.size) >= seen.prompt + step
        parts = [
            np.nan_to_num(look[seen.modality == kind]).sum()
            for kind in (Modality.SYSTEM, Modality.IMAGE)
        ]
        rows.append([*parts, *np.where(unread, np.nan, look)[words]])
    names = ("system", "image", *(visible(seen.tokens[int(at)]) for at in words))
    answer = tuple((float(step), f"{step} {_word(seen, step)}") for step in steps)
    heat = Heat(
        Axis("attention on", "token", ticks=tuple(enumerate(names))),
        Axis("answer token", "index", ticks=answer),
        Axis("attention", "share of the row"),
        np.array(rows, dtype=np.float64),
    )
    what = f"Attention of every answer token on every word before it, {who(layer, head)}."
    return _plot("words", "From token to token", [heat], what, seen, columns=1)


def _word(seen: Observation, token: int) -> str:
    """An answer token as figures show it; the end of the answer has no text."""
    return visible(seen.answer.words[token]) if token < len(seen.answer.words) else "end"


def _largest(seen: Observation, row: NDArray[np.float64]) -> float:
    """Attention on the patch of the first image that gets most."""
    # Not 0 where the image got no attention, because the value is the end of a scale.
    return float(np.nanmax(row[seen.image == 0], initial=1e-6))


def _plot(
    name: str, title: str, panels: list[Panel], what: str, seen: Observation, *, columns: int
) -> Plot:
    model = str(seen.recording.attrs.get("model_name") or "unknown")
    return Plot(Figure(name, title, tuple(panels), Caption(what, 1, model, _ONE), columns=columns))
