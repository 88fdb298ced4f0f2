"""Does relevance point at what a word is about better than raw attention does?"""

from __future__ import annotations

import json

import numpy as np
import xarray as xr

from avl_analysis.figures import Axis, Caption, Figure, Overlay, Panel
from avl_analysis.figures.patches import Patches
from avl_analysis.figures.strip import visible
from avl_analysis.intervals import METHOD, paired_difference
from avl_analysis.map_plots import pointing_caption, pointing_panel
from avl_analysis.relevance import METHODS, UNITS
from avl_reports.findings import Finding, judge
from avl_reports.run import Run, Section, example
from avl_reports.script import run_script

QUESTION = "Does relevance point at what a word is about better than raw attention does?"
_TASKS = ("colour", "what", "shape", "where")


def section(run: Run) -> Section:
    """Pointing by layer, and the maps of one word."""
    found = run.further("pointing")
    panels: tuple[Panel, ...] = (*_example(found), pointing_panel(found))
    what = pointing_caption(found) + (
        " Above: the maps of one word, mean over layers, each on its own scale."
        if len(panels) > 1
        else ""
    )
    caption = Caption(what, found.sizes["sample"], run.model, METHOD)
    figure = Figure("relevance", "Relevance maps of a word", panels, caption, columns=3)
    # (samples,) whether the strongest token of each map is on what the word is about
    raw, chefer = (found["pointing_all"].sel(map=name).values for name in ("raw", "chefer"))
    gain = paired_difference(chefer, raw)
    finding = Finding(
        "Image tokens are ranked by raw attention",
        "Relevance propagation points at what the word is about in"
        f" {100 * float(np.nanmean(chefer)):.0f} % of questions, raw attention (mean over layers)"
        f" in {100 * float(np.nanmean(raw)):.0f} %; the difference: {gain.words('%')}.",
        "relevance propagation gains nothing",
        # The finding is about ranking by raw attention, so a gain of relevance speaks against it.
        judge(gain, "at most", 0.0),
    )
    return Section(QUESTION, figure, (finding,), _sentence(found))


def _sentence(found: xr.Dataset) -> str:
    """Which map points best in which layer."""
    means = found["pointing"].mean("sample")
    # Maps by layers, cut down to those that hold the maximum; of several the first is named.
    best = means.where(means == means.max(), drop=True)
    method, layer = str(best["layered"].values[0]), int(best["layer"].values[0])
    return (
        f"Of the maps of single layers, {METHODS[method]} of layer {layer} points best"
        f" ({100 * float(means.max()):.0f} % of questions; the layer is the best of those shown)."
        " A map that points at the object is no evidence that the answer needs it."
    )


def _example(found: xr.Dataset) -> tuple[Overlay, ...]:
    """The maps of the first question of some task whose picture is kept."""
    facts = [json.loads(str(text)) for text in found["about"].values]
    order = sorted(
        range(len(facts)),
        # 9 is behind every place in `_TASKS`; the sort keeps the order of the file otherwise.
        key=lambda row: _TASKS.index(task) if (task := facts[row].get("task")) in _TASKS else 9,
    )
    for row in order:
        shown = example(str(found["sample"].values[row]), facts[row])
        if shown.picture is None:
            continue
        places = found["position"].isel(sample=row).values
        panels = []
        # those of the file: one written by an earlier version has fewer
        for method in map(str, found["map"].values):
            values = found["maps"].isel(sample=row).sel(map=method).values
            # Padding and tokens without a known place, (tokens, 4) edges of NaN, are not drawn.
            kept = np.isfinite(places).all(1)
            patches = Patches(values[kept], places[kept])
            # Units differ from map to map, so each has its own scale.
            top = float(np.nanmax(patches.values, initial=0.0))
            axis = Axis(METHODS[method], UNITS[method], (0.0, top if top > 0 else 1.0))
            title = f"{METHODS[method]}: “{visible(facts[row]['word'])}”"
            panels.append(Overlay(shown.picture, axis, patches, boxes=shown.boxes, title=title))
        return tuple(panels)
    return ()


if __name__ == "__main__":
    run_script(section)
