"""Do the tokens kept after prefill hold what decoding will look at?"""

from __future__ import annotations

import numpy as np

from avl_analysis.figures import Axis, Figure, Line, Lines, Rule
from avl_analysis.intervals import estimate
from avl_reports.findings import Finding, judge
from avl_reports.policy_numbers import SECONDARY, TARGET
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import LAYER, constant, curve, share

QUESTION = "Do the tokens kept after prefill hold what decoding will look at?"
_KEPT = Axis("image tokens kept (S)", "share", (0.0, 1.0))


def section(run: Run) -> Section:
    """Attention and core tokens that prefill's choice still catches, against S and by layer."""
    # Both by layer and share kept (`secondary`); recall also by size of the decode-time core.
    mass, recall = run["prefill_mass"], run["prefill_recall"]
    if not bool(np.isfinite(mass).any()):
        raise NotMeasured("nothing was decoded, so prefill's choice cannot be held against it")
    rules = (Rule(SECONDARY, "S"),)
    tokens = tuple(
        curve(
            f"decode-time best {100 * c:.0f} %",
            estimate(recall.sel(decode_core=c), ("secondary",)),
            "secondary",
            slot + 1,
        )
        for slot, c in enumerate(recall["decode_core"].values)
    )
    attention = (curve("image attention", estimate(mass, ("secondary",)), "secondary", 1),)
    at = estimate(mass.sel(secondary=SECONDARY), ("layer",))
    figure = Figure(
        "prefill_recall",
        "What the tokens kept after prefill still catch",
        (
            Lines(
                _KEPT,
                share("decode-time attention caught"),
                (*attention, _chance(attention)),
                rules,
                title="attention over the whole answer",
            ),
            Lines(
                _KEPT,
                share("decode-time core caught"),
                (*tokens, _chance(tokens)),
                rules,
                title="tokens",
            ),
            Lines(
                LAYER,
                share("decode-time attention caught"),
                (curve("S = 50 %", at, "layer", 1),),
                (Rule(TARGET, "95 %", "y"),),
                title=f"by layer, S = {100 * SECONDARY:.0f} %",
            ),
        ),
        run.caption(
            "Share of all image attention of the decode steps, and of each step's best image"
            " tokens, that falls on the S best image tokens of the last prompt row; scores are"
            " means over heads, curves means over layers. Keeping tokens at random catches S."
        ),
    )
    caught = estimate(mass.sel(secondary=SECONDARY)).number
    finding = Finding(
        f"S = {100 * SECONDARY:.0f} % of the image tokens, chosen by the last prompt row, are"
        " enough for the answer",
        f"They hold {caught.words('%')} of the image attention while decoding.",
        f"at least {100 * TARGET:.0f} %",
        judge(caught, "at least", TARGET),
    )
    return Section(QUESTION, figure, (finding,), "What is dropped after prefill is gone for good.")


def _chance(lines: tuple[Line, ...]) -> Line:
    # Tokens kept at random catch the share that is kept, which is x itself.
    return constant("random tokens", lines[0].x, lines[0].x)


if __name__ == "__main__":
    run_script(section)
