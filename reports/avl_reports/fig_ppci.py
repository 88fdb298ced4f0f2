"""Do the most attended image tokens stay the same from step to step, and from layer to layer?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.figures import Axis, Figure, Line, Lines, Rule
from avl_analysis.intervals import estimate
from avl_reports.findings import Finding, judge
from avl_reports.policy_numbers import CORE, REFRESH, midway
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import LAYER, STEP, constant, curve, least, left_out, matrix, reached, share

QUESTION = "Do the most attended image tokens stay the same?"
_OVERLAP = share("overlap of the best tokens")


def section(run: Run) -> Section:
    """Overlap of top sets between steps, between layers, and between prefill and decoding."""
    continuity = run["ppci_continuity"]
    if not bool(np.isfinite(continuity).any()):
        raise NotMeasured("no answer is long enough to compare two decode steps")
    layers = estimate(run["ppci_heterogeneity"].sel(p=CORE), ("layer", "other_layer"))
    cosine = estimate(run.decode("consecutive_cosine"), ("layer",))
    figure = Figure(
        "ppci",
        "Overlap of the most attended image tokens",
        (
            Lines(
                Axis("lag", "decode steps"),
                _OVERLAP,
                _by_lag(run, continuity),
                (Rule(REFRESH, "K"),),
                title="two decode steps apart",
            ),
            Lines(STEP, _OVERLAP, _prefill(run), title="prefill's last row and a decode step"),
            matrix(
                layers,
                "layer",
                "other_layer",
                LAYER,
                LAYER,
                _OVERLAP,
                f"two layers, best {100 * CORE:.0f} %",
            ),
            Lines(
                LAYER,
                Axis("cosine", "0 to 1", (0.0, 1.0)),
                (curve("consecutive steps", cosine, "layer", 1),),
                title="image scores of two consecutive steps",
            ),
        ),
        run.caption(
            "Share of the best image tokens (by mean score over heads) that two moments or two"
            " layers have in common; random sets overlap by their size p. Means over layers where"
            f" not shown.{left_out(run, 'Lags and steps')}"
        ),
    )
    return Section(QUESTION, figure, findings(continuity, run["ppci_heterogeneity"]), "")


def findings(continuity: xr.DataArray, heterogeneity: xr.DataArray) -> tuple[Finding, ...]:
    """Whether a core lasts K steps, and whether layers differ enough to choose for themselves."""
    # Lags count from 1, so lag K is at place K - 1.
    at_lag = estimate(continuity.isel(lag=REFRESH - 1).sel(p=CORE)).number
    size = heterogeneity.sizes["layer"]
    # Without the diagonal: a layer agrees with itself wholly, which would raise the mean.
    pairs = xr.DataArray(~np.eye(size, dtype=bool), dims=("layer", "other_layer"))
    between = estimate(heterogeneity.sel(p=CORE).where(pairs)).number
    limit = midway(CORE)
    return (
        Finding(
            "A core is kept for K = 3 steps",
            f"The best {100 * CORE:.0f} % of two decode steps that are {REFRESH} apart overlap by"
            f" {at_lag.words('%')}.",
            f"at least {100 * limit:.0f} %, half-way from chance to identity",
            judge(at_lag, "at least", limit),
        ),
        Finding(
            "Every layer chooses its own image tokens",
            f"The best {100 * CORE:.0f} % of two layers overlap by {between.words('%')}.",
            f"at most {100 * limit:.0f} %, half-way from chance to identity",
            judge(between, "at most", limit),
        ),
    )


def _by_lag(run: Run, continuity: xr.DataArray) -> tuple[Line, ...]:
    lines: list[Line] = []
    baselines: list[Line] = []
    for slot, p in enumerate(continuity["p"].values):
        lags = reached(estimate(continuity.sel(p=p), ("lag",), least=least(run)), "lag")
        lines.append(
            curve(f"best {100 * p:.0f} %", lags, "lag", slot + 1, first=_first(continuity))
        )
        baselines.append(constant("random sets", np.asarray(lines[-1].x), float(p)))
    return (*lines, *baselines)


def _first(continuity: xr.DataArray) -> float:
    """Lags count from 1; without labels their places count from 0."""
    return 0.0 if "lag" in continuity.coords else 1.0


def _prefill(run: Run) -> tuple[Line, ...]:
    # Step 0 is the prompt row itself.
    overlap = run["ppci_prefill"].sel(step=slice(1, None))
    lines: list[Line] = []
    for slot, p in enumerate(overlap["p"].values):
        steps = reached(estimate(overlap.sel(p=p), ("step",), least=least(run)), "step")
        lines.append(curve(f"best {100 * p:.0f} %", steps, "step", slot + 1))
    return (
        *lines,
        *(
            constant("random sets", line.x, float(p))
            for line, p in zip(lines, overlap["p"].values, strict=True)
        ),
    )


if __name__ == "__main__":
    run_script(section)
