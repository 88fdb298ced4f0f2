"""Text age profile: how the attention on a text token falls as it gets older, and how fast.

Speaks about T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from avl_analysis.statistics.ages import AGE_STARTS
from avl_analysis.statistics.base import Axes, KeyScores, KeyStatistic, Result

PHASES = ("prefill", "decode")
"""Where the query rows come from: text rows of the prompt, or decode steps."""


@dataclass(frozen=True)
class TextAgeProfile(KeyStatistic):
    """Mean weight `A[q,k]` of a text key for a text query by its age `q - k`.

    Bins: `AGE_STARTS`.
    """

    name = "text_age_profile"
    title = "mean weight of a text token of this age"
    source = "Zhang et al., A-VL (AAAI 2025)"
    justifies = "T"
    needs_ages: ClassVar[bool] = True
    axes: ClassVar[Axes] = {"age_phase": PHASES, "age": AGE_STARTS.tolist()}

    def value(self, scores: KeyScores) -> Result:
        assert scores.by_age is not None
        return scores.by_age, scores.pairs


@dataclass(frozen=True)
class TextAgeFit(KeyStatistic):
    """Decay of the profile, mean over heads.

    `a exp(-b age)` and `a (1 + age)^-b`, fitted to its logarithm by least squares, every bin
    weighted with the number of weights in it; age 0, a token's attention to itself, is left out.
    Ages from 128 on share bins, which enter with their smallest age (at most 8 % below the
    largest).

    half_life: age at which the fitted weight is half that of age 0, in tokens, infinite without
    decay. r2: share of the variance of the log weight that the fit explains. NaN with fewer than
    `least` bins.
    """

    name = "text_age_fit"
    title = "decay of text attention with age"
    source = "least squares on the logarithm"
    justifies = "T"
    dims: ClassVar[tuple[str, ...]] = ("layer",)
    needs_ages: ClassVar[bool] = True
    axes: ClassVar[Axes] = {
        "age_phase": PHASES,
        "decay": ("exponential", "power"),
        "decay_parameter": ("half_life", "rate", "r2"),
    }

    least: int = 4

    def value(self, scores: KeyScores) -> Result:
        assert scores.by_age is not None
        assert scores.pairs is not None
        total, pairs = scores.by_age.sum(1), scores.pairs.sum(1)  # (layers, phases, ages)
        fits = np.full((*total.shape[:2], 2, 3), np.nan)
        for place in np.ndindex(total.shape[:2]):
            fits[place] = decay_fits(AGE_STARTS, total[place], pairs[place], self.least)
        return fits, None


def decay_fits(
    ages: np.ndarray, total: np.ndarray, pairs: np.ndarray, least: int = 4
) -> np.ndarray:
    """Half-life, rate and R^2, (2, 3), of two fits through total / pairs at `ages`.

    An exponential and a power law.
    """
    use = (ages > 0) & (pairs > 0) & (total > 0)
    if use.sum() < least:
        return np.full((2, 3), np.nan)
    weight, log = pairs[use], np.log(total[use] / pairs[use])
    fits = []
    for x, half_life in (
        (ages[use], lambda b: np.log(2) / b),
        (np.log1p(ages[use]), lambda b: 2 ** (1 / b) - 1),
    ):
        # Weighted least squares of log(mean weight) on x: the age itself gives the exponential law,
        # log(1 + age) the power law; the slope is minus the rate.
        x_mean, y_mean = np.average(x, weights=weight), np.average(log, weights=weight)
        slope = (weight * (x - x_mean) * (log - y_mean)).sum() / (weight * (x - x_mean) ** 2).sum()
        rest = (weight * (log - y_mean - slope * (x - x_mean)) ** 2).sum()
        spread = (weight * (log - y_mean) ** 2).sum()
        with np.errstate(over="ignore"):
            fits.append(
                [
                    half_life(-slope) if slope < 0 else np.inf,
                    -slope,
                    1 - rest / spread if spread > 0 else np.nan,
                ]
            )
    return np.array(fits)
