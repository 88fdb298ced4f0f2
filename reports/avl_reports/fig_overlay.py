"""Where on the picture does the model look while it produces a word?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import xarray as xr

from avl_analysis.figures import Axis, Figure, Overlay, Panel
from avl_analysis.figures.strip import visible
from avl_analysis.intervals import Estimate, estimate
from avl_analysis.recordings.image_tokens import ImageTokens, images_of
from avl_reports.fig_localisation import largest_layer, lifts
from avl_reports.run import Example, NotMeasured, Run, Section
from avl_reports.script import run_script

QUESTION = "Where does the model look while it produces a word?"
EXAMPLES = 3
MAPS_PER_EXAMPLE = 3
MOST = 0.15
"""Share of the attention on the picture at which the scale of the maps ends at the latest."""
_TASKS = ("caption", "ocr", "count", "where", "colour")


def section(run: Run) -> Section:
    """Examples of maps over their images.

    Where the truth is known, the lift on the region by layer.
    """
    places = drawable(run)
    lift = lifts(run)
    by_layer = None if lift is None else estimate(lift, ("layer",))
    layer = _layer(run, by_layer)
    shown = choose(run, places)
    if not shown:
        raise NotMeasured(missing(run, "a map of attention on it"))
    panels = on_one_scale(
        [
            panel
            for example in shown
            for panel in _example(run, example, places[example.name], layer)
        ]
    )
    figure = Figure(
        "overlay",
        "Attention on the picture",
        panels,
        run.caption(
            "Share of the attention on the picture that each patch draws while the quoted word is"
            " produced, mean over heads. Examples: the first rightly answered sample of some"
            f" tasks, not chosen by their maps. Layer {layer} {_why(by_layer)}. Outlines: what the"
            " question (left) or the word (maps) is about."
            + views(places[example.name] for example in shown),
            len(shown),
        ),
        columns=1 + MAPS_PER_EXAMPLE,
    )
    return Section(
        QUESTION,
        figure,
        (),
        "Brighter patches draw more attention; the picture is shown in grey below them.",
    )


def on_one_scale(panels: Sequence[Overlay]) -> tuple[Panel, ...]:
    """Maps whose scale ends at the largest value of all, so that small patches are seen too.

    The limits the maps bring are the most the scale may reach; what is above them is drawn at full
    strength.
    """
    maps = [panel for panel in panels if panel.patches is not None]
    values = [np.nanmax(panel.patches.values, initial=0.0) for panel in maps if panel.patches]
    largest = max(values, default=0.0)

    def scaled(panel: Overlay) -> Overlay:
        low, high = panel.value.limits or (0.0, np.inf)
        # A tiny upper end keeps the scale from having no width where all maps are 0.
        limits = (low, float(np.clip(largest, 1e-6, high)))
        return replace(panel, value=replace(panel.value, limits=limits))

    return tuple(scaled(panel) for panel in panels)


def drawable(run: Run) -> dict[str, ImageTokens]:
    """The tokens of the picture, for samples with one picture and known places of its tokens."""
    tokens, found = run.recording.tokens, {}
    for name in run.recording.samples:
        images = images_of(tokens.sel(sample=name))
        # An example keeps one picture, so maps of several pictures have nothing to be drawn on.
        if len(images) == 1 and images[0].placed:
            found[name] = images[0]
    return found


def missing(run: Run, what: str) -> str:
    """Why no sample can be drawn over its picture; `what` is what would be drawn."""
    if not any(example.picture is not None for example in run.examples):
        if any(example.frames for example in run.examples):
            return "it is drawn over one picture, and samples show videos, which fig_video draws"
        return f"no sample of the recording keeps its picture together with {what}"
    return (
        f"no sample of the recording has one picture, {what}, and known places of its tokens;"
        " places are known where a family's layout is (docs/families.md) and inputs come from"
        " vlm.prepare"
    )


def views(images: Iterable[ImageTokens]) -> str:
    """What a caption says where pictures are seen in several views, or in part."""
    shown = list(images)
    words = ""
    # Tile 0 is the view of the whole picture, larger numbers are parts of it.
    if any((image.tile > 0).any() and (image.tile == 0).any() for image in shown):
        words += (
            " The model sees the whole picture and parts of it in higher resolution; patches of the"
            " latter are drawn over those of the former."
        )
    if any(_leaves_out(image) for image in shown):
        words += " Where no patch is drawn, the model does not see the picture."
    return words


def _leaves_out(image: ImageTokens) -> bool:
    """Whether a border of the picture lies under no token."""
    left, top = np.nanmin(image.boxes[:, :2], axis=0)
    right, bottom = np.nanmax(image.boxes[:, 2:], axis=0)
    # Left out where more than one per cent of a side lies under no token; edges are fractions of
    # the picture.
    return bool(max(left, top, 1 - right, 1 - bottom) > 0.01)


def _layer(run: Run, by_layer: Estimate | None) -> int:
    """The layer with the largest lift; without known regions, the middle one."""
    if by_layer is not None:
        return largest_layer(by_layer.mean)
    layers = run["image_score"]["layer"].values
    return int(layers[len(layers) // 2])


def _why(by_layer: Estimate | None) -> str:
    return (
        "is the middle one"
        if by_layer is None
        else "puts the most attention on that region, over all samples"
    )


def choose(run: Run, places: dict[str, ImageTokens]) -> list[Example]:
    """The first rightly answered example of each of some tasks.

    Then whatever else has an image.
    """
    drawable = [e for e in run.examples if e.picture is not None and e.name in places]
    # One per task, the first in the recording's order, whatever its map looks like.
    ranked = [
        e for task in _TASKS for e in [e for e in drawable if e.task == task and e.correct][:1]
    ]
    ranked += [e for e in drawable if e not in ranked]
    return ranked[:EXAMPLES]


def _example(run: Run, example: Example, image: ImageTokens, layer: int) -> list[Overlay]:
    """The picture with its question, and maps at a few steps."""
    assert example.picture is not None
    value = Axis("attention on the patch", "share of image attention", (0.0, MOST))
    question = f"{example.prompt} → {example.answer}"
    panels = [Overlay(example.picture, value, boxes=example.boxes, title=short(question, 52))]
    scores = run["image_score"].sel(sample=example.name)
    for step, shown in _maps(example, scores, layer):
        # (image tokens of this picture,); `token` is padded to the sample with most image tokens.
        weights = scores.sel(step=step, layer=shown).values[image.token]
        patches = image.patches(weights / np.nansum(weights))
        boxes = example.regions[step].boxes if step < len(example.regions) else ()
        word = visible(example.words[step] if step < len(example.words) else "")
        panels.append(
            Overlay(
                example.picture,
                value,
                patches,
                boxes=boxes,
                title=f"step {step}, layer {shown}: “{word}”",
            )
        )
    return panels


def _maps(example: Example, scores: xr.DataArray, layer: int) -> list[tuple[int, int]]:
    """Steps and layers worth showing: words spread over the answer.

    For a short answer its first word in more layers.
    """
    measured = np.flatnonzero(np.isfinite(scores).any(("token", "layer")).values)
    # Steps behind the last word produced the end token. Without words step 0 is left.
    steps = [int(t) for t in measured if t < max(1, len(example.words))]
    # Words, not blanks and punctuation; of these, those of more than three letters come first.
    said = [t for t in steps if t < len(example.words) and example.words[t].strip(" ,.")]
    long = [t for t in said if len(example.words[t].strip()) > 3]
    # The first pool that fills all maps, else a single word: the first one said.
    pool = next((pool for pool in (long, said) if len(pool) >= MAPS_PER_EXAMPLE), said[:1] or steps)
    if len(pool) >= MAPS_PER_EXAMPLE:
        return [(pool[i], layer) for i in _spread(len(pool))]
    # Too few words: one word in the chosen layer and in others spread over the model.
    layers = [int(number) for number in scores["layer"].values]
    others = [number for number in layers if number != layer]
    chosen = sorted({layer, *(others[i] for i in _spread(len(others))[: MAPS_PER_EXAMPLE - 1])})
    return [(pool[0], number) for number in chosen] if pool else []


def _spread(count: int) -> list[int]:
    """Up to `MAPS_PER_EXAMPLE` places spread evenly over `count`."""
    return np.unique(
        # `unique` because rounding may give a place twice.
        np.linspace(0, count - 1, min(count, MAPS_PER_EXAMPLE)).round().astype(int)
    ).tolist()


def short(text: str, length: int) -> str:
    """The text, cut to a number of letters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


if __name__ == "__main__":
    run_script(section)
