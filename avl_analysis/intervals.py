"""Means over samples with their uncertainty: bootstrap intervals, paired differences, proportions.

Samples are what is drawn at random, so they are what is resampled; whatever else an array averages
over (tokens, heads) has been averaged within the sample before. NaN means "this sample has no such
number" and is left out.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap

RESAMPLES = 2000
"""Bootstrap resamples behind an interval."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` samples with the bounds of its 95 % interval; NaN where
    nothing was measured."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: ArrayLike) -> Estimate:
    """Mean and percentile-bootstrap interval over samples.

    Args:
        values: (samples,), NaN where a sample has no value.

    Returns:

        An interval without width where all values are equal, and NaN bounds where there is
        only one value: one sample says nothing about others.
    """
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if known.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(known.mean())
    if known.size == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    if np.ptp(known) == 0:
        return Estimate(mean, mean, mean, known.size)
    found = bootstrap(
        (known,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        batch=max(1, 10_000_000 // known.size),
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), known.size)


def paired_difference(values: ArrayLike, baseline: ArrayLike) -> Estimate:
    """Mean of `values - baseline` over the samples that have both, with the interval of that mean.

    Far narrower than the two intervals taken apart, because what makes one sample harder than
    another cancels.
    """
    return mean_interval(np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float))


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (E. B. Wilson, 1927); (NaN, NaN) without a single
    trial.
    """
    if asked == 0:
        return math.nan, math.nan
    z2, p = 1.959963984540054**2, right / asked
    centre = (p + z2 / (2 * asked)) / (1 + z2 / asked)
    half = math.sqrt(z2) / (1 + z2 / asked) * math.sqrt(p * (1 - p) / asked + z2 / (4 * asked**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_intervals(values: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means and percentile-bootstrap intervals of many numbers at once, the samples resampled
    together.

    Args:
        values: (samples, ...), NaN where a sample has no value.

    Returns:

        Mean, lower and upper bound and number of samples, each (...), as `mean_interval` gives
        them one by one (up to the draw of the resamples).
    """
    array = np.asarray(values, dtype=float)
    count = len(array)
    flat = array.reshape(count, -1)
    known = np.isfinite(flat)
    n = known.sum(0)
    flat = np.where(known, flat, 0.0)
    weights = (
        np.random.default_rng(0)
        .multinomial(count, np.full(count, 1 / max(count, 1)), RESAMPLES)
        .astype(float)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, drawn = flat.sum(0) / n, (weights @ flat) / (weights @ known)
    drawn = np.where(n > 1, drawn, np.nan)
    tail = (1 - CONFIDENCE) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # columns without a single value
        low, high = np.nanquantile(drawn, [tail, 1 - tail], axis=0)
    shape = array.shape[1:]
    return mean.reshape(shape), low.reshape(shape), high.reshape(shape), n.reshape(shape)
