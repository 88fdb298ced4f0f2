"""Can the second layer speak for all layers behind it?"""

from __future__ import annotations

import numpy as np

from avl_analysis.figures import Figure, Line, Lines
from avl_analysis.intervals import estimate
from avl_reports.findings import Finding, judge
from avl_reports.policy_numbers import PREFILL, midway
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import LAYER, constant, curve, share

QUESTION = "Can an early layer choose the image tokens for all layers behind it?"


def section(run: Run) -> Section:
    """Overlap of the second layer's best image tokens with every later layer's."""
    agreement = run["layer_agreement"]
    # The filter's layer and those before it are NaN in every sample.
    later = agreement.isel(layer=np.flatnonzero(np.isfinite(agreement).any(("sample", "p"))))
    if not later.sizes["layer"]:
        raise NotMeasured("the second layer and one behind it must be recorded to compare them")
    lines: list[Line] = []
    for slot, p in enumerate(later["p"].values):
        lines.append(
            curve(f"best {100 * p:.0f} %", estimate(later.sel(p=p), ("layer",)), "layer", slot + 1)
        )
    # Two random sets of a share p of the tokens have the share p of their members in common.
    chance = [
        constant("random sets", line.x, float(p))
        for line, p in zip(lines, later["p"].values, strict=True)
    ]
    figure = Figure(
        "layer_agreement",
        "Agreement with the prefill filter's layer",
        (Lines(LAYER, share("overlap with the second layer"), (*lines, *chance)),),
        run.caption(
            "Share of the best image tokens of the last prompt row (by mean score over heads) that"
            " the second layer, where the prefill filter acts, has in common with each later layer."
            " Random sets overlap by their size."
        ),
        columns=1,
    )
    shared = estimate(later.sel(p=PREFILL)).number
    limit = midway(PREFILL)
    finding = Finding(
        f"The prefill filter keeps P = {100 * PREFILL:.0f} % by the second layer's ranking (off by"
        " default)",
        f"The best {100 * PREFILL:.0f} % of the second layer and of a later one overlap by"
        f" {shared.words('%')}.",
        f"at least {100 * limit:.0f} %, half-way from chance to identity",
        judge(shared, "at least", limit),
    )
    return Section(QUESTION, figure, (finding,), "")


if __name__ == "__main__":
    run_script(section)
