"""Where on the picture does the model look while it produces a word?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.figures import Axis, Figure, Overlay, Panel
from avl_analysis.figures.strip import visible
from avl_analysis.intervals import Estimate, estimate
from avl_reports.fig_localisation import lifts
from avl_reports.run import Example, NotMeasured, Run, Section
from avl_reports.script import run_script

QUESTION = "Where does the model look while it produces a word?"
EXAMPLES = 3
MAPS_PER_EXAMPLE = 3
_TASKS = ("caption", "ocr", "count", "where", "colour")


def section(run: Run) -> Section:
    """Examples of maps over their pictures and, where the truth is known, the lift on the region by
    layer.
    """
    places = grids(run)
    lift = lifts(run)
    by_layer = None if lift is None else estimate(lift, ("layer",))
    layer = _layer(run, by_layer)
    shown = choose(run, places)
    if not shown:
        raise NotMeasured(
            "no sample of the recording keeps its picture together with a map of attention on it"
        )
    panels: list[Panel] = [
        panel for example in shown for panel in _example(run, example, places[example.name], layer)
    ]
    figure = Figure(
        "overlay",
        "Attention on the picture",
        tuple(panels),
        run.caption(
            "Share of the attention on the picture that each patch draws while the quoted word is"
            " produced, mean over heads. Examples: the first rightly answered sample of some"
            f" tasks, not chosen by their maps. Layer {layer} {_why(by_layer)}. Outlines: what the"
            " question (left) or the word (maps) is about.",
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


def grids(run: Run) -> dict[str, tuple[int, int]]:
    """Rows and columns of the picture's grid, for samples with one picture of known grid."""
    tokens = run.recording.tokens
    found = {}
    for name in run.recording.samples:
        one = tokens.sel(sample=name)
        row, column = one["row"].values, one["column"].values
        if one["image"].values.max(initial=-1) == 0 and row.max(initial=-1) >= 0:
            found[name] = (int(row.max()) + 1, int(column.max()) + 1)
    return found


def _layer(run: Run, by_layer: Estimate | None) -> int:
    """The layer with the largest lift; without known regions, the middle one."""
    layers = run["image_score"]["layer"].values
    return int(
        layers[len(layers) // 2]
        if by_layer is None
        else layers[int(np.argmax(by_layer.mean.values))]
    )


def _why(by_layer: Estimate | None) -> str:
    return (
        "is the middle one"
        if by_layer is None
        else "puts the most attention on that region, over all samples"
    )


def choose(run: Run, places: dict[str, tuple[int, int]]) -> list[Example]:
    """The first rightly answered example of each of some tasks, then whatever else
    has a picture."""
    drawable = [e for e in run.examples if e.picture is not None and e.name in places]
    ranked = [
        e for task in _TASKS for e in [e for e in drawable if e.task == task and e.correct][:1]
    ]
    ranked += [e for e in drawable if e not in ranked]
    return ranked[:EXAMPLES]


def _example(run: Run, example: Example, grid: tuple[int, int], layer: int) -> list[Panel]:
    """The picture with its question, and maps at a few steps."""
    assert example.picture is not None
    rows, columns = grid
    value = Axis("attention on the patch", "share of image attention", (0.0, 0.15))
    question = f"{example.prompt} → {example.answer}"
    panels: list[Panel] = [
        Overlay(example.picture, value, boxes=example.boxes, title=short(question, 52))
    ]
    scores = run["image_score"].sel(sample=example.name)
    for step, shown in _maps(example, scores, layer):
        weights = scores.sel(step=step, layer=shown).values[: rows * columns]
        patches = (weights / np.nansum(weights)).reshape(rows, columns)
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
    """Steps and layers worth showing: words spread over the answer; for a short answer its first
    word in more layers.
    """
    measured = np.flatnonzero(np.isfinite(scores).any(("token", "layer")).values)
    steps = [int(t) for t in measured if t < max(1, len(example.words))]
    said = [t for t in steps if t < len(example.words) and example.words[t].strip(" ,.")]
    long = [t for t in said if len(example.words[t].strip()) > 3]
    pool = next((pool for pool in (long, said) if len(pool) >= MAPS_PER_EXAMPLE), said[:1] or steps)
    if len(pool) >= MAPS_PER_EXAMPLE:
        return [(pool[i], layer) for i in _spread(len(pool))]
    layers = [int(number) for number in scores["layer"].values]
    others = [number for number in layers if number != layer]
    chosen = sorted({layer, *(others[i] for i in _spread(len(others))[: MAPS_PER_EXAMPLE - 1])})
    return [(pool[0], number) for number in chosen] if pool else []


def _spread(count: int) -> list[int]:
    """Up to `MAPS_PER_EXAMPLE` places spread evenly over `count`."""
    return np.unique(
        np.linspace(0, count - 1, min(count, MAPS_PER_EXAMPLE)).round().astype(int)
    ).tolist()


def short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


if __name__ == "__main__":
    run_script(section)
