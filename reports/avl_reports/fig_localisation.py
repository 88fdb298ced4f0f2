"""Does attention fall on the part of the picture that the current word is about?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.figures import Axis, Bar, Bars, Figure, Line, Lines, Rule
from avl_analysis.intervals import estimate
from avl_reports.findings import Finding, judge
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script

QUESTION = "Does attention fall on what the current word is about?"
LIFT = 2.0
"""Attention on the region must be this many times what a uniform map would put there."""


def section(run: Run) -> Section:
    """Lift on the region by layer, and by task in the layer where it is largest."""
    lift = lifts(run)
    if lift is None:
        raise NotMeasured("the recording does not say what part of the picture any word is about")
    by_layer = estimate(lift, ("layer",))
    # Chosen as the largest mean, so the bars of this layer are no test of it; the finding below is
    # over all layers.
    best = largest_layer(by_layer.mean)
    measured = int(np.isfinite(lift).any("layer").sum())
    axis = Axis("attention on the region / chance", "times")
    layers = by_layer.mean["layer"].values
    curve = Line(
        "mean over heads",
        layers,
        by_layer.mean.values,
        by_layer.low.values,
        by_layer.high.values,
        slot=1,
    )
    figure = Figure(
        "localisation",
        "Attention on the region a word is about",
        (
            Lines(
                Axis("layer", "index"),
                axis,
                (curve,),
                (Rule(1.0, "uniform map", "y"),),
                title="by layer",
            ),
            _by_task(run, lift.sel(layer=best), axis, f"by task, layer {best}"),
        ),
        run.caption(
            "Share of image attention on the region over the region's share of the picture; 1 is"
            " what a uniform map gives. Mean over the words of rightly answered samples whose"
            " region is known.",
            measured,
        ),
    )
    mean = estimate(lift).number
    finding = Finding(
        "Image tokens are chosen by their attention score",
        f"The score A-VL ranks by puts {mean.words('times')} the attention of chance on what the"
        " word is about (all layers).",
        f"at least {LIFT:g} times",
        judge(mean, "at least", LIFT),
    )
    return Section(
        QUESTION,
        figure,
        (finding,),
        "The truth is known to the pixel because the pictures are drawn.",
    )


def largest_layer(by_layer: xr.DataArray) -> int:
    """The layer with the largest value; layers that were not measured (NaN) are passed over.

    Args:
        by_layer: (layer,).

    Raises:
        NotMeasured: no layer has a value.
    """
    # `argmax` would return the place of a NaN, and `nanargmax` fails where there is nothing else.
    if not np.isfinite(by_layer).any():
        raise NotMeasured(f"no layer has a value of {by_layer.name or 'what is shown'}")
    return int(by_layer["layer"].values[int(np.nanargmax(by_layer.values))])


def lifts(run: Run) -> xr.DataArray | None:
    """Share of image attention on the region over the region's share of the image.

    (sample, layer); 1 is chance.

    Mean over the produced words whose region is known; None if the recording knows no regions.
    """
    scores = run["image_score"]
    names, rows = scores["sample"].values, []
    counts = run.recording.tokens["modality_count"].sel(key_modality="image").values
    for index, example in enumerate(run.examples):
        # Examples and statistics are both in the recording's order; rows are matched by it.
        assert example.name == str(names[index])
        tokens = int(counts[index])
        # Words that are about a known part of the picture; words behind the last recorded step have
        # no map.
        steps = [
            t
            for t, region in enumerate(example.regions)
            if region.tokens and t < scores.sizes["step"]
        ]
        if not steps or not tokens:
            # Kept as NaN, so that rows stay in step with samples.
            rows.append(np.full(scores.sizes["layer"], np.nan))
            continue
        # (steps, layers, image tokens). The dimension is padded to the sample with most image
        # tokens; this sample has the first `tokens`.
        maps = (
            scores.isel(sample=index, step=steps, token=slice(0, tokens))
            .transpose("step", "layer", "token")
            .values
        )
        # Of the attention on the picture; the step's other attention does not count. Without any
        # (a layer that was not measured, say) the share is unknown.
        total = np.nansum(maps, axis=-1, keepdims=True)
        share = np.nan_to_num(maps) / np.where(total > 0, total, np.nan)
        places = [list(example.regions[step].tokens) for step in steps]
        # Attention on the region over the region's share of the image tokens, (layers,) for each
        # word.
        on = [
            one[:, place].sum(-1) * tokens / len(place)
            for one, place in zip(share, places, strict=True)
        ]
        rows.append(np.mean(on, axis=0))
    values = np.array(rows)
    if not np.isfinite(values).any():
        return None
    coords = {"sample": names, "layer": scores["layer"].values}
    return xr.DataArray(values, dims=("sample", "layer"), coords=coords, name="lift")


def _by_task(run: Run, lift: xr.DataArray, axis: Axis, title: str) -> Bars:
    tasks = np.array([example.task or "unnamed" for example in run.examples])
    known = [task for task in dict.fromkeys(tasks) if np.isfinite(lift.values[tasks == task]).any()]
    parts = [
        estimate(lift.isel(sample=np.flatnonzero(tasks == task))).number for task in sorted(known)
    ]
    values, low, high = (
        np.array([getattr(part, end) for part in parts]) for end in ("mean", "low", "high")
    )
    bar = Bar("lift", values, low, high, slot=1)
    rules = (Rule(1.0, "uniform map"),)
    return Bars(
        Axis("task", "name"),
        axis,
        tuple(sorted(known)),
        (bar,),
        rules,
        horizontal=True,
        title=title,
    )


if __name__ == "__main__":
    run_script(section)
