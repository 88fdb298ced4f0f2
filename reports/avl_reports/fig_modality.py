"""How is attention divided between image, text and system tokens, by layer and step?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.figures import Figure, Heat, Lines
from avl_analysis.intervals import estimate, per_sample
from avl_reports.findings import Finding, judge
from avl_reports.run import Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import (
    LAYER,
    STEP,
    least,
    left_out,
    log_share,
    matrix,
    modality_curves,
    reached,
    share,
)

QUESTION = "How is attention divided between picture, text and system tokens?"
RATIO = 2.0
"""Text tokens must draw at least this many times the attention of an image token for the two to
need rules of their own.
"""
PRESENT = 0.10
"""Share of attention below which the picture could as well be gone while decoding."""


def section(run: Run) -> Section:
    """The figure and what it says."""
    mass, efficiency = run.decode("modality_mass"), run.decode("efficiency")
    by_layer = modality_curves(estimate(mass, ("layer", "key_modality")), "layer")
    per_token = modality_curves(estimate(efficiency, ("layer", "key_modality")), "layer")
    figure = Figure(
        "modality",
        "Attention by modality",
        (
            Lines(LAYER, share("attention mass"), by_layer, title="by layer, decode steps"),
            _by_step(run),
            Lines(
                LAYER,
                log_share("attention per token", per_token),
                per_token,
                title="per visible token, decode steps",
            ),
            _by_layer_and_step(run),
        ),
        run.caption(
            "Attention mass on system, image and text keys: mean over heads (and over decode"
            f" steps, where not shown). Step 0 is the last prompt row.{left_out(run, 'Steps')}"
        ),
    )
    return Section(
        QUESTION, figure, findings(mass, efficiency), "The three shares of a row add up to 1."
    )


def findings(mass: xr.DataArray, efficiency: xr.DataArray) -> tuple[Finding, ...]:
    """Whether modalities differ enough to be treated apart.

    And whether the image still matters while decoding.
    """
    tokens = per_sample(efficiency, ("key_modality",))
    # (samples,), text over image within each sample. Averaged as a logarithm, a ratio and its
    # inverse count alike; the mean of the ratios themselves would follow the largest ones.
    ratio = tokens.sel(key_modality="text") / tokens.sel(key_modality="image")
    ratio_interval = estimate(np.log(ratio)).number.exp()
    image = estimate(mass.sel(key_modality="image")).number
    return (
        Finding(
            "Image and text tokens are treated by different rules",
            f"While decoding, one text token draws {ratio_interval.words('times')} the attention of"
            " one image token.",
            f"at least {RATIO:g} times",
            judge(ratio_interval, "at least", RATIO),
        ),
        Finding(
            "Image tokens stay in the cache while decoding",
            f"While decoding, {image.words('%')} of the attention goes to the picture.",
            f"at least {PRESENT:.0%}".replace("%", " %"),
            judge(image, "at least", PRESENT),
        ),
    )


def _by_step(run: Run) -> Lines:
    shares = reached(
        estimate(run["modality_mass"], ("step", "key_modality"), least=least(run)), "step"
    )
    return Lines(
        STEP, share("attention mass"), modality_curves(shares, "step"), title="by step, all layers"
    )


def _by_layer_and_step(run: Run) -> Heat:
    mass = run["modality_mass"].sel(key_modality="image")
    image = reached(estimate(mass, ("layer", "step"), least=least(run)), "step")
    value = share("image mass")
    return matrix(
        image, "layer", "step", STEP, LAYER, value, "mass on the picture, by layer and step"
    )


if __name__ == "__main__":
    run_script(section)
