"""Where and when does the model look in a video?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avl_analysis.figures import Axis, Box, Figure, Heat, Line, Lines, Overlay, Panel
from avl_analysis.figures.strip import visible
from avl_analysis.intervals import estimate
from avl_analysis.recordings.image_tokens import ImageTokens, images_of
from avl_reports.fig_localisation import largest_layer
from avl_reports.fig_overlay import on_one_scale, short
from avl_reports.run import Example, NotAsked, NotMeasured, Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import constant, curve, least, reached, share

QUESTION = "Where and when does the model look in a video?"
MOST_FRAMES = 6
"""Frames drawn; of longer videos as many, evenly spread."""
MOST_WORDS = 24
"""Words of the answer in the strip over time."""
CORES = (0.1, 0.3)
"""Sizes of the core whose place is followed from frame to frame."""
_FRAME = Axis("frame of the video", "index")


def section(run: Run) -> Section:
    """One video with attention over every frame, the strip over time, and all videos together.

    Raises:
        NotAsked: no sample shows a video.
        NotMeasured: a video is recorded without its frames, their places or the statistics of time.
    """
    if not any(_frames(run, name) for name in run.recording.samples):
        raise NotAsked("no sample of the recording shows a video")
    shown = next((e for e in run.examples if e.frames and _frames(run, e.name)), None)
    if shown is None:
        raise NotMeasured("no sample keeps the frames of its video, and known places of its tokens")
    tokens = _frames(run, shown.name)
    mass = run["frame_mass"]
    layer = _layer(run)
    overlays = _overlays(run, shown, tokens, layer)
    panels: list[Panel] = [*overlays, _strip(run, shown, layer), _by_layer(run), _cores(run)]
    known = int(np.isfinite(mass).any(("layer", "step", "frame")).sum())
    # Frames per group of tokens, rounded up because the last group may hold fewer.
    together = -(-len(shown.frames) // len(tokens))
    grouped = (
        f" This model makes one token of a patch in {together} frames; of each group the first"
        " frame is drawn."
        if together > 1
        else ""
    )
    figure = Figure(
        "video",
        "Attention in a video",
        tuple(panels),
        run.caption(
            "First the frames of one video (the first sample that keeps its frames): share of the"
            " attention on the video that each patch draws while the first word is written, all"
            f" frames on one scale, layer {layer}, mean over heads; outlines: what the question is"
            " about, where that is known. Then, of the same video and layer, attention on each"
            " frame while each word is written; attention on each frame by layer, mean over the"
            " answer and over all samples with a video; and how much the core of one frame shares"
            " with that of a later one, by place (a random core of the same size shares its size)."
            + grouped,
            known,
        ),
        columns=3,
    )
    return Section(
        QUESTION,
        figure,
        (),
        "Brighter patches draw more attention. In the strip, a bright column is a frame that every"
        " word looks at; a moving bright cell is attention that follows the answer through time.",
    )


def _frames(run: Run, name: str) -> list[ImageTokens]:
    """The frames of a sample's first video, in order; none without a video of known places."""
    # `frame` is -1 for pictures.
    images = [i for i in images_of(run.recording.tokens.sel(sample=name)) if i.frame >= 0]
    # Further videos of the sample are left out: an example keeps the frames of one.
    return [i for i in images if i.image == images[0].image and i.placed]


def _layer(run: Run) -> int:
    """The layer with most attention on frames, over all samples."""
    # With `min_count` a sample without a video stays NaN; a plain sum would count it as 0.
    mass = run["frame_mass"].sum("frame", min_count=1).mean(("sample", "step"))
    return largest_layer(mass.rename("frame_mass"))


def _overlays(
    run: Run, example: Example, tokens: list[ImageTokens], layer: int
) -> tuple[Overlay, ...]:
    """The frames with what the first answer token looked at, on one scale."""
    # Step 0 is the last prompt row, which produces the first word: (image tokens,).
    scores = run["image_score"].sel(sample=example.name, layer=layer).values[0]
    # Over all frames, also those not drawn, so that shares of different frames can be compared.
    total = sum(float(np.nansum(scores[frame.token])) for frame in tokens)
    value = Axis("attention on the patch", "share", (0.0, 1.0))
    together = -(-len(example.frames) // len(tokens))
    picked = np.linspace(0, len(tokens) - 1, min(MOST_FRAMES, len(tokens))).round().astype(int)
    panels = []
    for number in picked:
        frame = tokens[int(number)]
        # The first of the frames that this group of tokens stands for.
        at = int(number) * together
        weights = scores[frame.token] / total if total > 0 else scores[frame.token]
        panels.append(
            Overlay(
                example.frames[at],
                value,
                frame.patches(weights),
                boxes=_box(example, at),
                title=f"frame {int(number)}, {100 * np.nansum(weights):.0f} %",
            )
        )
    scaled = on_one_scale(panels)
    return tuple(panel for panel in scaled if isinstance(panel, Overlay))


def _box(example: Example, frame: int) -> tuple[Box, ...]:
    """What the question is about in this frame, where boxes say it for every frame."""
    return example.boxes[frame : frame + 1] if len(example.boxes) == len(example.frames) else ()


def _strip(run: Run, example: Example, layer: int) -> Heat:
    """Attention on every frame, by word of the answer."""
    mass = run["frame_mass"].sel(sample=example.name, layer=layer)
    values: NDArray[np.float64] = mass.transpose("step", "frame").values.astype(np.float64)
    values = values[: max(1, min(len(example.words), MOST_WORDS))]
    # The dimension is padded to the longest video of the recording.
    values = values[:, np.isfinite(values).any(0)]
    words = [visible(word) for word in example.words[: len(values)]] or ["first word"]
    ticks = tuple((float(step), word) for step, word in enumerate(words))
    frames = tuple((float(i), str(i)) for i in range(values.shape[1]))
    return Heat(
        Axis("frame of the video", "index", ticks=frames),
        Axis("word of the answer", "index", ticks=ticks),
        Axis("attention", "share"),
        values,
        title=f"over time: {short(example.prompt, 40)}",
    )


def _by_layer(run: Run) -> Lines:
    """Attention on every frame, in a few layers, over all samples."""
    mass = run["frame_mass"]
    by_frame = estimate(mass, ("layer", "frame"), least=least(run))
    layers = [int(layer) for layer in mass["layer"].values]
    picked = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    lines = tuple(
        curve(f"layer {layer}", by_frame.at(layer=layer), "frame", slot)
        for slot, layer in enumerate(picked)
    )
    value = Axis("attention on the frame", "share")
    return Lines(_FRAME, value, lines, title="by layer, all videos")


def _cores(run: Run) -> Lines:
    """How much the core of a frame shares with that of a later one."""
    overlap = run["frame_core_overlap"]
    lines: list[Line] = []
    for slot, core in enumerate(CORES):
        by_lag = estimate(overlap.sel(core=core), ("frame_lag",), least=least(run))
        known = reached(by_lag, "frame_lag")
        line = curve(f"core {100 * core:.0f} %", known, "frame_lag", slot + 1)
        # A random core of a share of the tokens has that share in common with any other.
        lines += [line, constant("random core", line.x, core)]
    return Lines(
        Axis("distance in time", "frames"), share("core shared"), tuple(lines), title="cores"
    )


if __name__ == "__main__":
    run_script(section)
