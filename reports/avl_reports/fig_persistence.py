"""Does the picture keep its attention while text loses it?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from avl_analysis.capture.accumulator import MAX_TRAJECTORY
from avl_analysis.figures import Axis, Figure, Line, Lines, Rule
from avl_analysis.intervals import Estimate, estimate, per_sample
from avl_reports.findings import Finding, Verdict, judge, judge_all, judge_within
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import LAYER, curve, least, left_out, reached

QUESTION = "Does the picture keep its attention while text loses it?"
STEADY = 0.01
"""Relative change per decode step below which image attention counts as steady: one per cent."""
LONG = 8
"""Decode steps an answer must have for its slope to count: over fewer, it says more about which
words came first.
"""
_RELATIVE = Axis("attention per token", "times the mean", log=True)


def section(run: Run) -> Section:
    """Attention on an image token by step against that on a text token by age.

    And the slope by layer.
    """
    slope, measured = _slopes(run)
    image, text = _image(run), _text(run)
    lines = (
        *_with_fit("an image token, by decode step", image, 1, log_x=False),
        *_with_fit("a text token, by its age", text, 2, log_x=True),
    )
    change = curve("image attention", estimate(slope, ("layer",)), "layer", 1)
    # Both curves are relative to their own mean and share one logarithmic axis.
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
            f" (text), least squares on the logarithm.{left_out(run, 'Places')} Right:"
            " least-squares slope of the image mass over the decode steps of an answer, divided by"
            f" its mean ({measured}). The finding is about that slope of all layers together; the"
            " fit on the left is of the curve drawn there, whose later steps only longer answers"
            " reach."
        ),
    )
    total = change_in_all_layers(run, slope)
    return Section(
        QUESTION,
        figure,
        (finding(total, text_decay(run), measured),),
        "A-VL assumes it; later work saw it fall on long outputs.",
    )


def finding(image: xr.DataArray, text: xr.DataArray, measured: str) -> Finding:
    """Whether image attention lasts, and text attention does not.

    Image attention lasts if its change per decode step is not below 0 beyond the interval, and not
    further from 0 than `STEADY`; text attention falls if its power of age is above 0.

    Args:
        image: relative change of the image mass per decode step, (sample,).
        text: fitted power with which a text token's weight falls with its age, (sample,).
        measured: which answers the image part is of, in words.
    """
    change, power = estimate(image).number, estimate(text).number
    # A fall that is certain is a fall, however small: within `STEADY` it would pass as lasting.
    falls = change.known and change.high < 0
    lasts = Verdict.NOT_SUPPORTED if falls else judge_within(change, STEADY)
    return Finding(
        "Image attention lasts while decoding, unlike text attention",
        f"Per decode step the attention on the picture changes by {change.words('%')} ({measured},"
        f" all layers together), and a text token's falls with the power {power.words()} of its"
        " age.",
        f"image: not below 0 and within ±{100 * STEADY:.0f} % per step; text: power above 0",
        judge_all([lasts, judge(power, "at least", 0.0)]),
    )


def change_in_all_layers(run: Run, slope: xr.DataArray) -> xr.DataArray:
    """Relative change per decode step of the image mass of all layers together, (sample,).

    The slopes of the layers' masses add up, so that a layer that hardly looks at the picture does
    not count as much as one that does.

    Args:
        run: the recording.
        slope: relative changes (sample, layer) of the samples that count, as `_slopes` gives them.
    """
    of_mass = run["image_persistence"].sel(slope_of="mass", sample=slope["sample"])
    mass = run.decode("modality_mass").sel(key_modality="image", sample=slope["sample"])
    # slopes are of the first `MAX_TRAJECTORY` steps, so the mean they are relative to is, too
    mean = mass.sel(step=slice(1, MAX_TRAJECTORY - 1)).mean(("head", "step"))
    # (samples, layers). A layer that lacks one of the two must enter neither sum.
    known = np.isfinite(of_mass) & np.isfinite(mean)
    total = mean.where(known).sum("layer")
    return of_mass.where(known).sum("layer") / total.where(total > 0)


def text_decay(run: Run) -> xr.DataArray:
    """Power of age with which a text token's weight falls at decode steps, (sample,).

    Mean over layers; NaN where nothing could be fitted.
    """
    fit = run["text_age_fit"].sel(age_phase="decode", decay="power", decay_parameter="rate")
    return fit.mean("layer")


def _slopes(run: Run) -> tuple[xr.DataArray, str]:
    """Relative change per decode step, (sample, layer), of long answers.

    Where there are two of them, and which they are.
    """
    slope = run["image_persistence"].sel(slope_of="relative")
    if not bool(np.isfinite(slope).any()):
        raise NotMeasured("no answer has the three decode steps that a slope needs")
    # (samples,). `phase` is above 0 at steps after the prompt, -1 behind the end of an answer.
    long = ((run.recording.tokens["phase"] > 0).sum("step") >= LONG).values & np.isfinite(
        slope
    ).any("layer").values
    if long.sum() < 2:
        return slope, f"all answers; fewer than two have {LONG} decode steps or more"
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
    # Age 0 is a token's weight on itself, and weights of 0 have no logarithm.
    keep = np.isfinite(ages.mean.values) & (ages.mean["age"].values > 0) & (ages.mean.values > 0)
    if not keep.any():
        raise NotMeasured("no text token was attended to by a later one while decoding")
    return ages.map(lambda part: part.isel(age=keep)), "age"


def _relative(array: xr.DataArray, along: str) -> xr.DataArray:
    """Sample means over layers and heads along one dimension.

    Divided by the mean of all of them.
    """
    samples = per_sample(array, (along,))
    # One number for all samples, so that only the unit changes and not their spread.
    return samples / float(samples.mean())


def _with_fit(
    name: str, found: tuple[Estimate, str], slot: int, *, log_x: bool
) -> tuple[Line, Line]:
    """A curve and its fit `log y = a + b x`, or `a + b log(1 + x)`."""
    measured = curve(name, *found, slot)
    use = np.isfinite(measured.y) & (measured.y > 0)
    # log(1 + age), as in the statistic `text_age_fit`; the slope is the power of 1 + age.
    x = np.log1p(measured.x) if log_x else measured.x
    b, a = np.polyfit(x[use], np.log(measured.y[use]), 1) if use.sum() > 1 else (0.0, 0.0)
    # Of the image fit, b is a change of the logarithm per step; expm1 makes it a relative change.
    label = f"fit: power {b:.2f}" if log_x else f"fit: {100 * np.expm1(b):+.1f} % per step"
    return measured, Line(label, measured.x, np.exp(a + b * x), slot=slot, role="fit")


if __name__ == "__main__":
    run_script(section)
