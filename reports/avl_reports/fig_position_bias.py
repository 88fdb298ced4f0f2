"""Does an image token's place in the picture decide how much attention it gets?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.figures import Axis, Figure, Line, Lines, Rule
from avl_analysis.figures.spec import Heat
from avl_analysis.intervals import estimate
from avl_reports.findings import Finding, Verdict, judge_all, judge_within
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import LAYER, curve, log_share

QUESTION = "Does an image token's place in the picture decide how much attention it gets?"
FACTOR = 2.0
"""Between the first and the last image token the trend may change attention by at most this factor.
"""


def section(run: Run) -> Section:
    """Mean attention by place in the raster with the exponential fit.

    The fitted trend by layer, and the mean map.
    """
    sigma = run["position_bias"].sel(bias_parameter="sigma")
    received = _received(run)
    lines = _raster(received)
    figure = Figure(
        "position_bias",
        "Attention by place in the picture",
        (
            Lines(
                Axis("place in the raster", "share", (0.0, 1.0)),
                log_share("attention per text row", lines),
                lines,
                title="mean over layers and heads",
            ),
            Lines(
                LAYER,
                Axis("trend sigma", "ln(last / first)"),
                (curve("exponential fit", estimate(sigma, ("layer",)), "layer", 1),),
                (Rule(0.0, "no trend", "y"),),
                title="trend by layer",
            ),
            *_map(run, received),
        ),
        run.caption(
            "Mean weight of an image token for the text rows of the prompt, by its place in reading"
            " order. The fit is mu exp(sigma i / N) over the i-th of N tokens, least squares on the"
            " logarithm."
        ),
    )
    return Section(QUESTION, figure, (finding(run["position_bias"]),), "")


def finding(bias: xr.DataArray) -> Finding:
    """Whether every layer ranks image tokens without a strong trend over the raster.

    A-VL ranks within a layer, so a layer counts by itself: opposite trends do not cancel. Supported
    if the intervals of all layers lie within the bound, not supported if that of one lies outside.

    Args:
        bias: the statistic `position_bias`, (sample, layer, bias_parameter).
    """
    # sigma is the logarithm of last over first, so a factor is a distance from 0 either way.
    bound = float(np.log(FACTOR))
    trends = estimate(bias.sel(bias_parameter="sigma"), ("layer",))
    layers = [int(layer) for layer in trends.mean["layer"].values]
    each = [trends.at(layer=layer).number for layer in layers]
    verdicts = [judge_within(one, bound) for one in each]
    inside, outside = (verdicts.count(v) for v in (Verdict.SUPPORTED, Verdict.NOT_SUPPORTED))
    # -1: a layer that was not measured is never the strongest.
    size = [abs(one.mean) if np.isfinite(one.mean) else -1.0 for one in each]
    strongest = int(np.argmax(size))
    explained = estimate(bias.sel(bias_parameter="r2")).number
    return Finding(
        "Scores rank image tokens without correcting for their place",
        f"From the first to the last image token the trend sigma is within the bound in {inside} of"
        f" {len(layers)} layers and outside in {outside}; the strongest is layer"
        f" {layers[strongest]}'s, {each[strongest].words()} (a factor of"
        f" {np.exp(each[strongest].mean):.2f}). The fits explain {explained.words('%')} of the"
        " variance of the log weight.",
        f"sigma within ±{bound:.2f}, a factor of {FACTOR:g}, in every layer by itself",
        judge_all(verdicts),
    )


def _received(run: Run) -> xr.DataArray:
    """(sample, token): attention received per text row of the prompt, mean over layers and heads.

    Samples whose number of image tokens differs from the first one's are left out.
    """
    scores = run["accumulated_score"].sel(rows="prompt text").mean(("layer", "head"))
    positions = run.recording.tokens["token_position"]
    counts = (positions >= 0).sum("token").values
    if not counts.max(initial=0):
        raise NotMeasured("no sample has a picture")
    # Samples can be averaged token by token only where they have equally many.
    same = np.flatnonzero(counts == counts[0])
    tokens = int(counts[0])
    # Scores are by position in the prompt; `token_position` says where the image tokens stand.
    values = [scores.isel(sample=s).values[positions.isel(sample=s).values[:tokens]] for s in same]
    coords = {"sample": scores["sample"].values[same], "token": np.arange(tokens)}
    return xr.DataArray(np.stack(values), dims=("sample", "token"), coords=coords)


def _raster(received: xr.DataArray) -> tuple[Line, Line]:
    found = estimate(received, ("token",))
    # The middle of each token's stretch. The statistic counts from i / N; the half token moves the
    # height of the fit and not its slope.
    x = (found.mean["token"].values + 0.5) / found.mean.sizes["token"]
    measured = Line("measured", x, found.mean.values, found.low.values, found.high.values, slot=1)
    use = measured.y > 0
    slope, offset = (
        np.polyfit(x[use], np.log(measured.y[use]), 1) if use.sum() > 2 else (np.nan, np.nan)
    )
    return measured, Line("exponential fit", x, np.exp(offset + slope * x), slot=5, role="fit")


def _map(run: Run, received: xr.DataArray) -> list[Heat]:
    """The mean map, where all pictures have one known grid.

    Tokens are put where their row and column say: those of a picture seen in tiles do not come in
    raster order, and newline tokens and a second, coarser view have no place in the grid.
    """
    tokens = run.recording.tokens.sel(sample=received["sample"])
    # Positions of the first sample, used for all: where another sample has its image elsewhere, its
    # rows and columns differ below and no map is drawn.
    position = tokens["token_position"].isel(sample=0, token=slice(0, received.sizes["token"]))
    row, column = (tokens[name].isel(position=position.values).values for name in ("row", "column"))
    known = row[0] >= 0
    if not known.any() or (row != row[0]).any() or (column != column[0]).any():
        return []
    mean = received.mean("sample").values[known]
    grid = np.full((int(row[0].max()) + 1, int(column[0].max()) + 1), np.nan)
    # (rows, columns), NaN where no token stands
    grid[row[0][known], column[0][known]] = mean / mean.mean()
    value = Axis("attention", "times the mean", (0.0, float(max(2.0, np.nanmax(grid)))))
    down, across = Axis("row", "patches"), Axis("column", "patches")
    return [Heat(across, down, value, grid, title="mean map over the picture")]


if __name__ == "__main__":
    run_script(section)
