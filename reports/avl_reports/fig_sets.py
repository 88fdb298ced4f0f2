"""Which image tokens would A-VL attend to, hold and drop while an answer is written?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avl_analysis.figures import Animation, Axis, Box, Figure, Overlay
from avl_analysis.recordings.image_tokens import ImageTokens
from avl_analysis.statistics.top_sets import size_of
from avl_reports.fig_overlay import drawable, missing, views
from avl_reports.policy_numbers import CORE, REFRESH, SECONDARY
from avl_reports.run import Example, NotMeasured, Run, Section
from avl_reports.script import run_script

QUESTION = "Which image tokens would A-VL attend to, hold and drop while an answer is written?"
CLASSES = ("minor", "secondary", "core")
SHOWN = 8
_VALUE = Axis("set of the image token", "class")


def section(run: Run) -> Section:
    """The three sets of one layer over the decode steps of the longest answer.

    As pictures and as an animation.
    """
    chosen, image = _longest(run)
    assert chosen.picture is not None
    scores = run["image_score"].sel(sample=chosen.name)
    layer = int(scores["layer"].values[scores.sizes["layer"] // 2])
    # (steps, image tokens); steps behind the end of this answer are NaN and drop out below.
    one = scores.sel(layer=layer).isel(token=image.token).transpose("step", "token").values
    sets = choose_sets(one[np.isfinite(one).all(1)], SECONDARY, CORE, REFRESH)
    frames = tuple(
        Overlay(
            chosen.picture,
            _VALUE,
            image.patches(classes.astype(float)),
            CLASSES,
            _outlines(chosen, step),
            title=_title(chosen, step),
        )
        for step, classes in enumerate(sets)
    )
    # The figure shows some steps, first and last among them; the animation shows all.
    picks = np.unique(np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().astype(int))
    figure = Figure(
        "sets",
        "Core, secondary and minor image tokens over decode steps",
        tuple(frames[i] for i in picks),
        run.caption(
            f"A-VL's rules (S = {SECONDARY:g}, C = {CORE:g}, K = {REFRESH}) applied to the scores"
            f" of the full model, layer {layer}, mean over heads: minor tokens are dropped after"
            " prefill, secondary ones are held and read at refresh steps, core ones are read at"
            " every step. Outlined: what the word being written is about. Question:"
            f" “{chosen.prompt}” Answer: “{chosen.answer}”." + views([image]),
            1,
        ),
        columns=4,
    )
    return Section(
        QUESTION,
        figure,
        (),
        "Dark: dropped for good. Blue: held, read at refresh steps only. Amber: read at every"
        " step.",
        Animation(frames, tuple(range(len(frames))), title="sets over decode steps"),
    )


def choose_sets(
    scores: NDArray[np.floating], secondary: float, core: float, refresh: int
) -> NDArray[np.int64]:
    """Classes of every image token at every step, (steps, tokens), by A-VL's rules.

    0 minor, 1 secondary, 2 core.

    Args:
        secondary: share of image tokens held.
        core: share of image tokens read at every step.
        refresh: decode steps between refreshes.
        scores: (steps, tokens), step 0 the last prompt row.

    The best `int(secondary * N)` of step 0 are held; the best `int(core * N)` of those are core. At
    steps t divisible by `refresh` (> 0) the held tokens are ranked again by that step's scores; the
    new core counts from step t + 1.
    """
    n = scores.shape[1]
    # What is not held here is dropped for good: later choices are among `held` only.
    held = _best(scores[0], np.arange(n), size_of(secondary, n))
    attended = _best(scores[0], held, min(size_of(core, n), held.size))
    classes = np.zeros(scores.shape, dtype=np.int64)
    for step in range(len(scores)):
        # The core lies within the held tokens, so it is written over them.
        classes[step, held] = 1
        classes[step, attended] = 2
        # After the classes of this step, because a refresh step reads all held tokens and its core
        # counts from the next step on.
        if refresh > 0 and step > 0 and step % refresh == 0:
            attended = _best(scores[step], held, attended.size)
    return classes


def _best(scores: NDArray[np.floating], among: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The `count` best-scored of some tokens, in raster order; of equals the earlier ones."""
    ranked = among[np.argsort(-scores[among], kind="stable")]
    return np.sort(ranked[:count])


def _longest(run: Run) -> tuple[Example, ImageTokens]:
    """The longest right answer with a drawable picture, else the longest answer."""
    places = drawable(run)
    able = [
        example
        for example in run.examples
        if example.picture is not None and example.name in places
    ]
    if not able or max(len(example.words) for example in able) < 2:
        raise NotMeasured(missing(run, "an answer of at least two words"))
    # Rightness comes before length.
    best = max(able, key=lambda example: (example.correct, len(example.words)))
    return best, places[best.name]


def _title(example: Example, step: int) -> str:
    word = example.words[step].strip() if step < len(example.words) else "end"
    refresh = ", refresh" if step > 0 and step % REFRESH == 0 else ""
    return f"step {step}{refresh}: “{word}”"


def _outlines(example: Example, step: int) -> tuple[Box, ...]:
    return example.regions[step].boxes if step < len(example.regions) else ()


if __name__ == "__main__":
    run_script(section)
