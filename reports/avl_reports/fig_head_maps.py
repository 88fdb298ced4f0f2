"""What do single heads look at?"""

from __future__ import annotations

import numpy as np

from avl_analysis.figures import Axis, Figure, Overlay
from avl_analysis.intervals import estimate
from avl_reports.fig_heads import hit_rate
from avl_reports.fig_overlay import choose, drawable, missing, on_one_scale, short, views
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script

QUESTION = "What do single heads look at?"
HEADS = 3


def section(run: Run) -> Section:
    """Maps of the heads that hit the region most often, on examples.

    Else of those with most image attention.
    """
    # Recordings keep maps of single heads at the last prompt row; it produces the first word.
    last = run["image_score_last"]
    places = drawable(run)
    shown = choose(run, places)
    if not shown:
        raise NotMeasured(missing(run, "maps of its heads"))
    heads, why = _heads(run)
    value = Axis("attention on the patch", "share of the head's image attention", (0.0, 0.3))
    panels: list[Overlay] = []
    for example in shown:
        assert example.picture is not None
        image = places[example.name]
        question = short(f"{example.prompt} → {example.answer}", 52)
        # The first column shows picture and question without a map.
        panels.append(Overlay(example.picture, value, boxes=example.boxes, title=question))
        boxes = example.regions[0].boxes if example.regions else ()
        for layer, head in heads:
            # `token` is padded to the sample with most image tokens; `image.token` picks those of
            # this picture, in the order of its boxes.
            weights = last.sel(sample=example.name, layer=layer, head=head).values[image.token]
            # Of the attention on the picture alone, so that heads with much and with little of it
            # can be compared.
            patches = image.patches(weights / np.nansum(weights))
            panels.append(
                Overlay(
                    example.picture,
                    value,
                    patches,
                    boxes=boxes,
                    title=f"layer {layer}, head {head}",
                )
            )
    figure = Figure(
        "head_maps",
        "Single heads on the picture",
        on_one_scale(panels),
        run.caption(
            "Share of a head's image attention that each patch draws from the last prompt row,"
            f" which produces the first word of the answer. {why} Outlined: what the question"
            " (left) or the first word (maps) is about."
            + views(places[example.name] for example in shown),
            len(shown),
        ),
        columns=1 + len(heads),
    )
    return Section(QUESTION, figure, (), "")


def _heads(run: Run) -> tuple[list[tuple[int, int]], str]:
    """The heads to show as (layer, head), and how they were chosen."""
    hits = hit_rate(run)
    if hits is not None:
        score, why = (
            estimate(hits, ("layer", "head")).mean,
            "Heads: those whose strongest patch is most often on the region.",
        )
    else:
        mass = run["modality_mass"].sel(step=0, key_modality="image")
        score, why = (
            estimate(mass, ("layer", "head")).mean,
            "Heads: those with the largest share of attention on pictures.",
        )
    # Places in the flattened (layers, heads). Scores are not below 0, so heads without a score come
    # last; of equal ones the earlier head comes first.
    ranked = np.argsort(-np.nan_to_num(score.values, nan=-1.0), axis=None, kind="stable")[:HEADS]
    places = [np.unravel_index(int(index), score.shape) for index in ranked]
    return [
        (int(score["layer"].values[row]), int(score["head"].values[column]))
        for row, column in places
    ], why


if __name__ == "__main__":
    run_script(section)
