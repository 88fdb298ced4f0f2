"""How few keys hold nearly all of the attention?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.figures import Axis, Figure, Line, Lines, Rule
from avl_analysis.intervals import estimate
from avl_reports.findings import Finding, judge
from avl_reports.policy_numbers import CORE, SECONDARY, TARGET, TEXT
from avl_reports.run import Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import LAYER, SLOTS, constant, curve

QUESTION = "How few keys hold nearly all of the attention?"
_TAU = Axis("share of the attention to be held", "share", (0.5, 1.0))


def section(run: Run) -> Section:
    """Coverage curves of image and text keys at decode steps and at the last prompt row, and by
    layer.
    """
    decode, last = run.decode("coverage"), run["coverage"].sel(step=0)
    attended = (
        Rule(CORE, f"C = {100 * CORE:.0f} %", "y"),
        Rule(TEXT, f"T = {100 * TEXT:.0f} %", "y"),
    )
    held = (Rule(SECONDARY, f"S = {100 * SECONDARY:.0f} %", "y"),)
    lines = _curves(decode), _curves(last), _by_layer(decode), _by_layer(last)
    low = min(float(np.nanmin(line.y)) for group in lines for line in group)
    keys = Axis("keys needed", "share", (low / 2, 1.1), log=True)
    figure = Figure(
        "coverage",
        "Keys needed to hold a share of the attention",
        (
            Lines(_TAU, keys, lines[0], attended, title="decode steps"),
            Lines(_TAU, keys, lines[1], held, title="last prompt row"),
            Lines(LAYER, keys, lines[2], attended, title=f"for {100 * TARGET:.0f} %, decode steps"),
            Lines(LAYER, keys, lines[3], held, title=f"for {100 * TARGET:.0f} %, last prompt row"),
        ),
        run.caption(
            "Smallest share of the image (text) keys that together hold a given share of a row's"
            " attention on image (text) keys; every head chooses its own keys, means over heads."
            " Dashed: the shares A-VL keeps."
        ),
    )
    return Section(
        QUESTION,
        figure,
        findings(decode, last),
        "Lower is sparser; the dotted line is uniform attention.",
    )


def findings(decode: xr.DataArray, last: xr.DataArray) -> tuple[Finding, ...]:
    """Whether C, S and T leave room for the target share of attention, head by head."""
    checks = (
        (
            "A core of C = 30 % is enough to attend to",
            "a decode step's image attention",
            decode,
            "image",
            CORE,
        ),
        (
            "S = 50 % of the image tokens are worth holding",
            "the last prompt row's image attention",
            last,
            "image",
            SECONDARY,
        ),
        ("T = 70 % of the text is enough", "a decode step's text attention", decode, "text", TEXT),
    )
    found = []
    for choice, what, array, modality, limit in checks:
        needed = estimate(array.sel(key_modality=modality).sel(tau=TARGET)).number
        found.append(
            Finding(
                choice,
                f"A head needs {needed.words('%')} of the {modality} keys for {100 * TARGET:.0f} %"
                f" of {what}.",
                f"at most {100 * limit:.0f} %",
                judge(needed, "at most", limit),
            )
        )
    return tuple(found)


def _curves(array: xr.DataArray) -> tuple[Line, ...]:
    needed = estimate(array, ("key_modality", "tau"))
    lines = [
        curve(name, needed.at(key_modality=name), "tau", SLOTS[name]) for name in ("image", "text")
    ]
    return (*lines, constant("uniform", *[np.linspace(0.5, 1.0, 11)] * 2))


def _by_layer(array: xr.DataArray) -> tuple[Line, ...]:
    needed = estimate(array.sel(tau=TARGET), ("key_modality", "layer"))
    return tuple(
        curve(name, needed.at(key_modality=name), "layer", SLOTS[name])
        for name in ("image", "text")
    )


if __name__ == "__main__":
    run_script(section)
