"""Which heads park their attention on one token?"""

from __future__ import annotations

import numpy as np

from avl_analysis.figures import Figure, Lines
from avl_analysis.intervals import estimate, per_sample
from avl_reports.findings import Finding, judge
from avl_reports.run import Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import LAYER, curve, layer_head_map, share

QUESTION = "Which heads park their attention on one token?"
RATIO = 2.0
"""A system token must draw at least this many times the attention of an image token to be worth
keeping always.
"""


def section(run: Run) -> Section:
    """Attention on the first token by layer and head, and the share of heads with a sink."""
    sinks = run["sink_rate"]
    first = run.decode("first_token_mass")
    rate = estimate(sinks, ("layer", "sink"))
    curves = (
        curve("first token", rate.at(sink="first"), "layer", 0),
        curve("strongest image token", rate.at(sink="image"), "layer", 1),
    )
    parked = share("attention on the first token")
    figure = Figure(
        "sinks",
        "Attention sinks",
        (
            layer_head_map(estimate(first, ("layer", "head")), parked, "decode steps"),
            Lines(LAYER, share("heads with a sink"), curves, title="prompt rows"),
        ),
        run.caption(
            "Left: attention on the very first token. Right: share of heads that give one token"
            " more than 0.3 of their attention, averaged over the prompt rows that can see it."
        ),
    )
    efficiency = per_sample(run.decode("efficiency"), ("key_modality",))
    # Averaged as a logarithm, so that a ratio and its inverse count alike.
    ratio = np.log(efficiency.sel(key_modality="system") / efficiency.sel(key_modality="image"))
    # One sample with an infinite logarithm would make the mean infinite, without an interval.
    times = estimate(ratio.where(np.isfinite(ratio))).number.exp()
    finding = Finding(
        "System tokens are always kept",
        f"While decoding, one system token draws {times.words('times')} the attention of one image"
        " token.",
        f"at least {RATIO:g} times",
        judge(times, "at least", RATIO),
    )
    return Section(QUESTION, figure, (finding,), "")


if __name__ == "__main__":
    run_script(section)
