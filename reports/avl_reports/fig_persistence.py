"""Does the picture keep its attention while text loses it?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.figures import Axis, Figure, Line, Lines, Rule
from avl_analysis.intervals import Estimate, estimate, per_sample
from avl_reports.findings import Finding, judge_within
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import LAYER, curve, least, reached

QUESTION = "Does the picture keep its attention while text loses it?"
STEADY = 0.01
"""Relative change per decode step below which image attention counts as steady: one per cent."""
LONG = 8
"""Decode steps an answer must have for its slope to count: over fewer, it says more about which
words came first.
"""
_RELATIVE = Axis("attention per token", "times the mean", log=True)


def section(run: Run) -> Section:
    """Attention on an image token by decode step against attention on a text token by age, and the
    slope by layer.
    """
    slope, measured = _slopes(run)
    image, text = _image(run), _text(run)
    lines = (
        *_with_fit("an image token, by decode step", image, 1, log_x=False),
        *_with_fit("a text token, by its age", text, 2, log_x=True),
    )
    change = curve("image attention", estimate(slope, ("layer",)), "layer", 1)
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    scale = Axis(
        _RELATIVE.label,
        _RELATIVE.unit,
        (float(values.min()) / 1.5, float(values.max()) * 1.5),
        log=True,
    )
    figure = Figure(
        "persistence",
        "Image persistence against text decay",
        (
            Lines(
                Axis("decode step, or age", "tokens"),
                scale,
                lines,
                title="how attention on one token changes",
            ),
            Lines(
                LAYER,
                Axis("change of image attention", "share per decode step"),
                (change,),
                (Rule(0.0, "steady", "y"),),
                title="slope by layer",
            ),
        ),
        run.caption(
            "Left: mean attention on one image token at each decode step, and on one text token at"
            " each age, both divided by their own mean; dashed: exponential fit (image), power law"
            f" (text), least squares on the logarithm. Places that fewer than {least(run)} samples"
            " reach are left out. Right: least-squares slope of the image mass over the decode"
            f" steps of an answer, divided by its mean ({measured})."
        ),
    )
    fades = estimate(slope).number
    finding = Finding(
        "Image attention lasts while decoding, unlike text attention",
        f"Per decode step the attention on the picture changes by {fades.words('%')} ({measured}).",
        f"between -{100 * STEADY:.0f} % and +{100 * STEADY:.0f} %",
        judge_within(fades, STEADY),
    )
    return Section(
        QUESTION, figure, (finding,), "A-VL assumes it; later work saw it fall on long outputs."
    )


def _slopes(run: Run) -> tuple[xr.DataArray, str]:
    """Relative change per decode step, (sample, layer), of long answers where there are two, and
    which they are.
    """
    slope = run["image_persistence"].sel(slope_of="relative")
    if not bool(np.isfinite(slope).any()):
        raise NotMeasured("no answer has the three decode steps that a slope needs")
    long = ((run.recording.tokens["phase"] > 0).sum("step") >= LONG).values & np.isfinite(
        slope
    ).any("layer").values
    if long.sum() < 2:
        return slope, f"all answers, none of {LONG} decode steps or more"
    return (
        slope.isel(sample=np.flatnonzero(long)),
        f"{long.sum()} answers of at least {LONG} decode steps",
    )


def _image(run: Run) -> tuple[Estimate, str]:
    per_token = run.decode("efficiency").sel(key_modality="image")
    return (
        reached(estimate(_relative(per_token, "step"), ("step",), least=least(run)), "step"),
        "step",
    )


def _text(run: Run) -> tuple[Estimate, str]:
    profile = run["text_age_profile"].sel(age_phase="decode")
    ages = estimate(_relative(profile, "age"), ("age",), least=least(run))
    keep = np.isfinite(ages.mean.values) & (ages.mean["age"].values > 0) & (ages.mean.values > 0)
    if not keep.any():
        raise NotMeasured("no text token was attended to by a later one while decoding")
    return ages.map(lambda part: part.isel(age=keep)), "age"


def _relative(array: xr.DataArray, along: str) -> xr.DataArray:
    """Sample means over layers and heads along one dimension, divided by the mean of
    all of them."""
    samples = per_sample(array, (along,))
    return samples / float(samples.mean())


def _with_fit(
    name: str, found: tuple[Estimate, str], slot: int, *, log_x: bool
) -> tuple[Line, Line]:
    """A curve and its fit `log y = a + b x`, or `a + b log(1 + x)`."""
    measured = curve(name, *found, slot)
    use = np.isfinite(measured.y) & (measured.y > 0)
    x = np.log1p(measured.x) if log_x else measured.x
    b, a = np.polyfit(x[use], np.log(measured.y[use]), 1) if use.sum() > 1 else (0.0, 0.0)
    label = f"fit: power {b:.2f}" if log_x else f"fit: {100 * np.expm1(b):+.1f} % per step"
    return measured, Line(label, measured.x, np.exp(a + b * x), slot=slot, role="fit")


if __name__ == "__main__":
    run_script(section)
