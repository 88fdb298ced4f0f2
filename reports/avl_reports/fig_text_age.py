"""Does a text token lose attention as it gets older?"""

from __future__ import annotations

import numpy as np

from avl_analysis.figures import Axis, Figure, Line, Lines
from avl_analysis.intervals import estimate
from avl_analysis.statistics.ages import AGE_STARTS
from avl_analysis.statistics.text_age import decay_fits
from avl_reports.findings import Finding, judge
from avl_reports.run import NotMeasured, Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import LAYER, curve, least, left_out, log_share

QUESTION = "Does a text token lose attention as it gets older?"
_AGE = Axis("age of the text token", "tokens", log=True)


def section(run: Run) -> Section:
    """The age profile with its fits, at decode steps and in the prompt.

    And the fitted decay by layer.
    """
    decode, prompt = _profile(run, "decode"), _profile(run, "prefill")
    figure = Figure(
        "text_age",
        "Text attention by age",
        (
            Lines(_AGE, log_share("mean weight", decode), decode, title="decode steps"),
            Lines(_AGE, log_share("mean weight", prompt), prompt, title="text rows of the prompt"),
            Lines(
                LAYER,
                Axis("decay rate", "power of age"),
                (_rate(run, "power"),),
                title="power law, decode steps",
            ),
            Lines(
                LAYER,
                Axis("decay rate", "per token"),
                (_rate(run, "exponential"),),
                title="exponential, decode steps",
            ),
        ),
        run.caption(
            "Mean weight of a text key for a text query by the number of tokens between them, over"
            " layers, heads and rows. Fits are least squares on the logarithm, weighted by the"
            f" number of weights, from age 1 on.{left_out(run, 'Ages')}"
        ),
    )
    rate = estimate(
        run["text_age_fit"].sel(age_phase="decode", decay="power", decay_parameter="rate")
    ).number
    finding = Finding(
        "Recent text is kept by age (30 % of the text budget)",
        f"While decoding, the weight of a text token falls with the power {rate.words()} of its"
        " age (mean over layers).",
        "power above 0",
        judge(rate, "at least", 0.0),
    )
    return Section(QUESTION, figure, (finding,), "A straight line on these axes is a power law.")


def _profile(run: Run, phase: str) -> tuple[Line, ...]:
    shown = run["text_age_profile"].sel(age_phase=phase)
    ages = np.asarray(shown["age"].values)
    means = estimate(shown, ("age",), least=least(run))
    # Both axes are logarithmic; age 0 is a token's weight on itself and enters no fit either.
    keep = np.isfinite(means.mean.values) & (ages > 0) & (means.mean.values > 0)
    if not keep.any():
        raise NotMeasured(f"no text token was attended to by another one ({phase})")
    cut = means.map(lambda part: part.isel(age=keep))
    return (curve("measured", cut, "age", 2), *_fits(run, phase, ages[keep], cut.mean.values))


def _fits(run: Run, phase: str, ages: np.ndarray, weights: np.ndarray) -> list[Line]:
    """Fits through all weights of the recording.

    The height is set so that the mean logarithm agrees with the curve.
    """
    # Sums of weights and numbers of pairs, (ages,) each: the fit weighs every age by its pairs,
    # which the means over samples no longer show.
    sums = run.recording.data["sums"]
    parts = [
        sums[name].sel(age_phase=phase).sum(("sample", "layer", "head")).values
        for name in ("text_age_profile", "text_age_profile_count")
    ]
    lines = []
    names = (("exponential", ages.astype(float), 1), ("power law", np.log1p(ages), 5))
    for (name, x, slot), (half_life, rate, r2) in zip(
        names, decay_fits(AGE_STARTS, *parts), strict=True
    ):
        if np.isfinite(rate):
            # `decay_fits` gives rates and no height. The curve is a mean over samples, the fit one
            # over weights, so the two heights could differ.
            level = np.exp(np.mean(np.log(weights) + rate * x))
            # Infinite where the fitted weight does not fall.
            decays = np.isfinite(half_life)
            life = f"half-life {half_life:.3g} tokens, " if decays else "no decay, "
            label = f"{name}: {life}R² {r2:.2f}"
            lines.append(
                Line(label, ages.astype(float), level * np.exp(-rate * x), slot=slot, role="fit")
            )
    return lines


def _rate(run: Run, decay: str) -> Line:
    fit = run["text_age_fit"].sel(age_phase="decode", decay=decay, decay_parameter="rate")
    return curve(f"{decay} fit", estimate(fit, ("layer",)), "layer", 2)


if __name__ == "__main__":
    run_script(section)
