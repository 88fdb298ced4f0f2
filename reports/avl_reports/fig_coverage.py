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
_SET = "One set of image keys for all heads of a layer"
_ONE_SET = 6
"""Colour slot of the curves of one set per layer."""
_TAU = Axis("share of the attention to be held", "share", (0.5, 1.0))


def section(run: Run) -> Section:
    """Coverage curves of image and text keys, and by layer.

    At decode steps and at the last prompt row; image keys also as one set for all heads of a layer.
    """
    decode, last = run.decode("coverage"), run["coverage"].sel(step=0)
    shared, shared_last = run.decode("shared_coverage"), run["shared_coverage"].sel(step=0)
    # Reference lines: at decode steps the policy reads its core (C) and the text it kept (T); the
    # last prompt row is what the held image tokens (S) are chosen by.
    attended = (
        Rule(CORE, f"C = {100 * CORE:.0f} %", "y"),
        Rule(TEXT, f"T = {100 * TEXT:.0f} %", "y"),
    )
    held = (Rule(SECONDARY, f"S = {100 * SECONDARY:.0f} %", "y"),)
    lines = (
        _curves(decode, shared),
        _curves(last, shared_last),
        _by_layer(decode, shared),
        _by_layer(last, shared_last),
    )
    # One axis for all four panels, so that decode steps and the last prompt row can be compared.
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
            " attention on image (text) keys. “Every head”: each head chooses its own keys, means"
            " over heads. “One set”: one set of image keys per layer holds that share of the"
            " attention of all its heads together, as A-VL must. Dashed: the shares A-VL keeps."
        ),
    )
    return Section(
        QUESTION,
        figure,
        findings(decode, shared, shared_last),
        "Lower is sparser; the dotted line is uniform attention.",
    )


def findings(
    decode: xr.DataArray, shared: xr.DataArray, shared_last: xr.DataArray
) -> tuple[Finding, ...]:
    """Whether C, S and T leave room for the target share of attention.

    Image keys are judged by one set per layer, because the policy holds and attends to one; text
    keys head by head, because its text rule chooses them by key/value head.

    Args:
        decode: `coverage` at the decode steps.
        shared: `shared_coverage` at the decode steps.
        shared_last: `shared_coverage` at the last prompt row.
    """
    text = decode.sel(key_modality="text")
    # Choice, who needs the keys, whose attention, modality, statistic, share that the policy keeps.
    checks = (
        (
            "A core of C = 30 % is enough to attend to",
            _SET,
            "a decode step's",
            "image",
            shared,
            CORE,
        ),
        (
            "S = 50 % of the image tokens are worth holding",
            _SET,
            "the last prompt row's",
            "image",
            shared_last,
            SECONDARY,
        ),
        ("T = 70 % of the text is enough", "A head", "a decode step's", "text", text, TEXT),
    )
    found = []
    for choice, who, row, modality, array, limit in checks:
        needed = estimate(array.sel(tau=TARGET)).number
        found.append(
            Finding(
                choice,
                f"{who} needs {needed.words('%')} of the {modality} keys for {100 * TARGET:.0f} %"
                f" of {row} {modality} attention (mean over layers).",
                f"at most {100 * limit:.0f} %",
                judge(needed, "at most", limit),
            )
        )
    return tuple(found)


def _curves(array: xr.DataArray, shared: xr.DataArray) -> tuple[Line, ...]:
    needed = estimate(array, ("key_modality", "tau"))
    lines = [
        curve(f"{name}, every head", needed.at(key_modality=name), "tau", SLOTS[name])
        for name in ("image", "text")
    ]
    # `shared_coverage` has no dimensions head and key_modality: it is of the image keys of a whole
    # layer.
    together = curve("image, one set", estimate(shared, ("tau",)), "tau", _ONE_SET)
    # Uniform attention needs the share tau of the keys to hold tau of the attention.
    return (*lines, together, constant("uniform", *[np.linspace(0.5, 1.0, 11)] * 2))


def _by_layer(array: xr.DataArray, shared: xr.DataArray) -> tuple[Line, ...]:
    needed = estimate(array.sel(tau=TARGET), ("key_modality", "layer"))
    lines = [
        curve(f"{name}, every head", needed.at(key_modality=name), "layer", SLOTS[name])
        for name in ("image", "text")
    ]
    together = estimate(shared.sel(tau=TARGET), ("layer",))
    return (*lines, curve("image, one set", together, "layer", _ONE_SET))


if __name__ == "__main__":
    run_script(section)
