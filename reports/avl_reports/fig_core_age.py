"""How long does a core stay good?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.figures import Axis, Figure, Line, Lines, Rule
from avl_analysis.intervals import estimate, per_sample
from avl_reports.findings import Finding, judge
from avl_reports.policy_numbers import CORE, REFRESH, TARGET
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import constant, curve, least, left_out, reached, share

QUESTION = "How long does a core stay good?"
_AGE = Axis("age of the core", "decode steps")


def section(run: Run) -> Section:
    """What a core chosen some steps ago still catches.

    Attention mass, and tokens of the true core.
    """
    hits = run["core_hit_rate"]
    if not bool(np.isfinite(hits).any()):
        raise NotMeasured("nothing was decoded, so no core could age")
    rules = (Rule(REFRESH, "K"),)
    figure = Figure(
        "core_age",
        "What an aging core still catches",
        (
            Lines(
                _AGE,
                share("image attention caught"),
                _by_age(run, hits.sel(hit="mass")),
                rules,
                title="attention",
            ),
            Lines(
                _AGE,
                share("true core caught"),
                _by_age(run, hits.sel(hit="recall")),
                rules,
                title="tokens",
            ),
        ),
        run.caption(
            "Share of a decode step's image attention (left) and of its own best tokens (right)"
            " that a core chosen some steps earlier catches, by size of the core; at age 0 it is"
            " the best a core of that size can do. Mean over layers. A random core catches its own"
            f" size.{left_out(run, 'Ages')}"
        ),
    )
    return Section(
        QUESTION, figure, (finding(hits),), "Scores are means over heads, as A-VL takes them."
    )


def finding(hits: xr.DataArray) -> Finding:
    """Whether a core of the paper's size, K steps old, catches nearly what a fresh one does."""
    # (samples, ages). Old over fresh is taken within each sample, so that what makes a sample easy
    # for any core does not widen the interval.
    mass = per_sample(hits.sel(core=CORE, hit="mass"), ("core_age",))
    # Ages count from 0 in steps of one, so places along `core_age` are ages.
    kept = estimate(mass.isel(core_age=REFRESH) / mass.isel(core_age=0)).number
    now = estimate(mass.isel(core_age=REFRESH)).number
    return Finding(
        f"A core of {100 * CORE:.0f} % is refreshed every K = {REFRESH} steps",
        f"A core {REFRESH} steps old catches {now.words('%')} of the image attention,"
        f" {kept.words('%')} of what a fresh one catches.",
        f"at least {100 * TARGET:.0f} % of a fresh one's",
        judge(kept, "at least", TARGET),
    )


def _by_age(run: Run, hits: xr.DataArray) -> tuple[Line, ...]:
    lines: list[Line] = []
    for slot, core in enumerate(hits["core"].values):
        # Old cores occur in long answers only; the tail that few samples reach is cut off.
        ages = reached(estimate(hits.sel(core=core), ("core_age",), least=least(run)), "core_age")
        lines.append(curve(f"core {100 * core:.0f} %", ages, "core_age", slot + 1))
    sizes = hits["core"].values
    return (
        *lines,
        # At any age, a random core of a share of the tokens catches that share on average.
        *(constant("random core", one.x, float(c)) for one, c in zip(lines, sizes, strict=True)),
    )


if __name__ == "__main__":
    run_script(section)
