"""How many attention weights are negligible, in which layer and head?"""

from __future__ import annotations

import xarray as xr

from avl_analysis.figures import Axis, Figure, Lines
from avl_analysis.intervals import estimate
from avl_reports.findings import Finding, judge
from avl_reports.policy_numbers import SECONDARY
from avl_reports.run import Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import LAYER, layer_head_map, modality_curves, share

QUESTION = "How sparse is attention, in which layers and heads?"
SPARSE = 1 - SECONDARY
"""Share of image tokens that must be negligible for dropping as many to look harmless."""


def section(run: Run) -> Section:
    """Maps over layers and heads at decode steps and the last prompt row.

    And how many keys attention amounts to.
    """
    decode = run.decode("threshold_sparsity")
    last = run["threshold_sparsity"].sel(step=0)
    negligible = share("negligible weights")
    effective = estimate(run.decode("effective_count"), ("layer", "key_modality"))
    gini = estimate(run.decode("gini"), ("layer", "key_modality"))
    seen = ("image", "text")
    figure = Figure(
        "sparsity",
        "Sparsity of attention",
        (
            layer_head_map(estimate(decode, ("layer", "head")), negligible, "decode steps"),
            layer_head_map(estimate(last, ("layer", "head")), negligible, "last prompt row"),
            Lines(
                LAYER,
                Axis("effective number of keys", "tokens", log=True),
                modality_curves(effective, "layer", seen),
                title="keys that attention amounts to, decode steps",
            ),
            Lines(
                LAYER,
                Axis("Gini coefficient", "0 equal, 1 on one key", (0.0, 1.0)),
                modality_curves(gini, "layer", seen),
                title="inequality of the weights, decode steps",
            ),
        ),
        run.caption(
            "Share of the visible keys whose weight is below 1 % of the row's largest (top), and"
            " how unevenly the weights on image and on text keys are spread (bottom; means over"
            " heads)."
        ),
    )
    return Section(
        QUESTION,
        figure,
        # The maps above let every head and row have negligible keys of its own. A policy that holds
        # one set per layer needs tokens that are negligible, in the mean over heads, at every
        # decode step; the finding is about those.
        (finding(run["shared_sparsity"]),),
        "The effective number of keys is the exponential of the entropy.",
    )


def finding(unused: xr.DataArray) -> Finding:
    """Whether a layer could do without as many image tokens as A-VL drops.

    For a whole answer and for all its heads.
    """
    mean = estimate(unused).number
    return Finding(
        "Half of the image tokens can be dropped (S = 50 %)",
        f"{mean.words('%')} of the image tokens are negligible to a layer at every decode step"
        " (weight, mean over heads, below 1 % of its largest on an image token; mean over layers).",
        f"at least {100 * SPARSE:.0f} %",
        judge(mean, "at least", SPARSE),
    )


if __name__ == "__main__":
    run_script(section)
