"""Means over samples with their uncertainty: every bootstrap and every proportion of the project.

Samples are what another run would draw anew, so samples are what is resampled; whatever else an
array averages over (tokens, heads, steps) is averaged within the sample first. NaN means "this
sample has no such number" and is left out. An infinite value is not left out: the mean of such
samples is infinite, and there is no interval. All intervals are two-sided and cover 95 %.

    mean_interval      one number: BCa bootstrap over samples
    mean_intervals     many numbers at once, each as `mean_interval` gives it
    estimate           labelled arrays: averaged within samples, then as `mean_intervals`
    median_interval    the median, for quantities that may be infinite
    share_interval     a share of samples (right or wrong): Wilson's score interval
    paired_difference, paired_share_difference
                       two measurements of the same samples: bootstrap of the differences, or
                       Newcombe's interval where both are right or wrong
    crossed            random draws x questions, both resampled
    auroc              how well a score tells two classes of items apart, samples resampled

The bootstrap interval of a mean is BCa (Efron 1987) at levels widened for small samples as
Hesterberg (2015) does for percentiles: the bootstrap's own normal quantile z is replaced by
t sqrt(n / (n - 1)), t the quantile of Student's distribution, because resampling n values
underestimates the spread of their mean by sqrt((n - 1) / n). Simulated coverage of the nominal
95 % (`python -m tests.benchmarks.interval_coverage`, 4,000 draws each):

    n                          5     8    12    20    30    50   200
    normal                  .920  .939  .945  .943  .944  .951  .950
    shares near 1, beta(8,1) .889  .923  .928  .942  .944  .953  .943
    skewed, beta(.5,5)      .844  .905  .923  .936  .945  .939  .952
    lognormal               .808  .858  .893  .897  .913  .912  .935

A strongly skewed quantity is covered less often than stated even by 50 samples. Below 5 samples
there is no interval, because none of these methods covers what it says there.

The resamples come from one seed and depend on the number of samples alone, and values are sorted
before they are resampled, so that one set of numbers has one interval, in every caller and in
whatever order the samples were recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike
from scipy import special

RESAMPLES = 2000
"""Bootstrap resamples behind an interval."""
CONFIDENCE = 0.95
LEAST_SAMPLES = 5
"""Fewer samples have a mean but no bootstrap interval."""
METHOD = "95 % BCa bootstrap intervals over samples"
"""What captions call the intervals of `mean_interval` and `estimate`."""
_SEED = 0
_BLOCK = 1 << 22  # resampled means held at once

Values = TypeVar("Values")


@dataclass(frozen=True)
class Estimate(Generic[Values]):
    """Means over samples with their 95 % intervals: four numbers, or four arrays of one shape.

    Attributes:
        mean: NaN where nothing was measured.
        low: lower bound of the interval, NaN where there is none.
        high: upper bound.
        n: samples that have a value.
    """

    mean: Values
    low: Values
    high: Values
    n: Any

    def at(self, **labels: Any) -> Estimate[Any]:
        """The part with these coordinate labels; of labelled arrays only."""
        return self.map(lambda part: part.sel(labels))

    def map(self, change: Callable[[Any], Any], *, counts: bool = True) -> Estimate[Any]:
        """`change` applied to mean and bounds, and to the number of samples unless told not to.

        Only for changes that keep the order of numbers, for example selecting or `np.exp`.
        """
        mean, low, high = (change(part) for part in (self.mean, self.low, self.high))
        return Estimate(mean, low, high, change(self.n) if counts else self.n)

    def exp(self) -> Estimate[float]:
        """The estimate of a logarithm as a factor: a geometric mean with its interval."""
        return self.map(lambda bound: float(np.exp(bound)), counts=False)

    @property
    def number(self) -> Estimate[float]:
        """An array of one entry as plain numbers.

        Raises:
            ValueError: there are several entries.
        """
        parts: tuple[Any, Any, Any] = (self.mean, self.low, self.high)
        if np.size(parts[0]) != 1:
            sizes = dict(parts[0].sizes) if isinstance(parts[0], xr.DataArray) else parts[0]
            raise ValueError(f"an estimate over {sizes} is not one number; select first")
        mean, low, high = (float(part) for part in parts)
        return Estimate(mean, low, high, int(self.n))

    @property
    def known(self) -> bool:
        """Whether the mean and both bounds of one number are known."""
        parts: tuple[Any, ...] = (self.mean, self.low, self.high)
        return all(math.isfinite(part) for part in parts)

    @property
    def dataset(self) -> xr.Dataset:
        """Labelled arrays as variables mean, low, high and n."""
        parts = {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}
        return xr.Dataset(parts)

    def words(self, unit: str = "", digits: int = 2) -> str:
        """One number as text: "0.61 [0.58, 0.64]", or "0.61 (no interval)".

        Args:
            unit: written behind the mean; "%" writes shares as percentages, in whole ones from ten
                per cent on.
            digits: decimal places, except of percentages.
        """
        if not math.isfinite(self.mean):  # type: ignore[arg-type]
            return "(not measured)"
        scale, sign = (100.0, " %") if unit == "%" else (1.0, f" {unit}" if unit else "")
        if unit == "%":
            digits = 0 if abs(self.mean) >= 0.1 else 1  # type: ignore[arg-type]
        mean, low, high = (
            _without_minus_zero(f"{scale * part:.{digits}f}")  # type: ignore[operator]
            for part in (self.mean, self.low, self.high)
        )
        return f"{mean}{sign} [{low}, {high}]" if self.known else f"{mean}{sign} (no interval)"


def _without_minus_zero(text: str) -> str:
    """A number that rounds to zero, without its sign: "0.0" for "-0.0"."""
    return text.lstrip("-") if not text.strip("-0.") else text


NOTHING: Estimate[float] = Estimate(math.nan, math.nan, math.nan, 0)
"""The estimate from no samples."""


# -- means -----------------------------------------------------------------------------------------


def mean_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> Estimate[float]:
    """Mean of (samples,) values with its bootstrap interval; see the module.

    Equal values give an interval without width, which says nothing about other samples; fewer than
    `LEAST_SAMPLES` values give none.
    """
    return mean_intervals(np.asarray(values, dtype=float).reshape(-1, 1), confidence).map(
        lambda part: part.item()
    )


def mean_intervals(values: ArrayLike, confidence: float = CONFIDENCE) -> Estimate[np.ndarray]:
    """Means and bootstrap intervals of many numbers.

    Args:
        values: (samples, ...), NaN where a sample has no value.
        confidence: share of repetitions that the interval should cover, in (0, 1).

    Returns:
        Arrays (...), every entry what `mean_interval` gives for its column.
    """
    array = np.asarray(values, dtype=float)
    flat = array.reshape(len(array), -1)
    known = ~np.isnan(flat)
    n = known.sum(0)
    with np.errstate(invalid="ignore"):  # infinities of both signs have no mean
        total = np.where(known, flat, 0.0).sum(0)
    mean = np.divide(total, n, out=np.full(n.shape, np.nan), where=n > 0)
    low, high = (np.full(n.shape, np.nan) for _ in range(2))
    # Columns with equally many values share their resamples. Sorting puts NaN last, so that the
    # values of a column are its first n entries.
    ordered = np.sort(np.where(known, flat, np.nan), axis=0)
    wanted = (n >= LEAST_SAMPLES) & np.isfinite(mean)
    for count in np.unique(n[wanted]).tolist():
        columns = np.flatnonzero(wanted & (n == count))
        for start in range(0, len(columns), max(1, _BLOCK // RESAMPLES)):
            some = columns[start : start + max(1, _BLOCK // RESAMPLES)]
            low[some], high[some] = _bca(ordered[:count, some], mean[some], confidence)
    shape = array.shape[1:]
    return Estimate(*(part.reshape(shape) for part in (mean, low, high, n)))


@lru_cache(maxsize=64)
def _resamples(count: int) -> np.ndarray:
    """(resamples, count): how often a resample holds each of `count` values, over count."""
    rng = np.random.default_rng(_SEED)
    drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return drawn.astype(float) / count


def _bca(values: np.ndarray, mean: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the means of (samples, columns) values without gaps."""
    count = len(values)
    drawn = np.sort((_resamples(count) @ values).T, axis=1)  # (columns, resamples)
    # Bias correction: the quantile at which the mean itself lies among the resampled means. Means
    # that are equal but for rounding count half.
    width = 1e-12 * np.abs(values).max(0, initial=1e-300)
    below = (drawn < (mean - width)[:, None]).sum(1)
    at_mean = (drawn <= (mean + width)[:, None]).sum(1) - below
    share = np.clip((below + at_mean / 2) / RESAMPLES, 1 / RESAMPLES, 1 - 1 / RESAMPLES)
    bias = special.ndtri(share)
    # Acceleration, from the skewness of the jackknife values; those of a mean are the values
    # themselves, mirrored and shrunk.
    away = values - mean
    spread = (away**2).sum(0)
    cubes = (away**3).sum(0)
    acceleration = np.divide(
        cubes, 6 * spread**1.5, out=np.zeros_like(spread), where=spread > width**2
    )
    tail = _widened_quantile(count, confidence)
    bounds = []
    for end in (bias - tail, bias + tail):
        level = special.ndtr(bias + end / (1 - acceleration * end))
        bounds.append(_quantiles(drawn, level))
    # A strong correction may push a bound past the mean, but an interval holds its mean; equal
    # values have no width, not one of rounding.
    same = values[0] == values[-1]
    low, high = np.minimum(bounds[0], mean), np.maximum(bounds[1], mean)
    return np.where(same, mean, low), np.where(same, mean, high)


def _widened_quantile(count: int, confidence: float) -> float:
    """What replaces the normal quantile of a two-sided interval over `count` samples.

    Student's quantile times sqrt(n / (n - 1)), after Hesterberg (2015); see the module's docstring.
    """
    # `stdtrit` is what scipy.stats computes it with; importing scipy.stats takes half a second.
    student = float(special.stdtrit(count - 1, (1 + confidence) / 2))
    return student * math.sqrt(count / (count - 1))


def _quantiles(ordered: np.ndarray, level: np.ndarray) -> np.ndarray:
    """One quantile per row of ascending (rows, values), between neighbours in proportion."""
    last = ordered.shape[1] - 1
    place = np.clip(level, 0.0, 1.0) * last
    left = np.floor(place).astype(int)
    right = np.minimum(left + 1, last)
    row = np.arange(len(ordered))
    return ordered[row, left] + (place - left) * (ordered[row, right] - ordered[row, left])


def median_interval(values: ArrayLike) -> Estimate[float]:
    """Median of (samples,) values, infinite ones among them, with its distribution-free interval.

    The bounds are the order statistics between which the median lies with at least 95 % probability
    (two-sided sign test); there are none for fewer than six values.
    """
    array = np.asarray(values, dtype=float)
    ordered = np.sort(array[~np.isnan(array)])
    n = ordered.size
    if not n:
        return NOTHING
    middle = (n - 1) // 2, n // 2
    # the two halves may be infinite of one sign, whose mean is infinite too
    median = float(ordered[list(middle)].mean())
    # The most values that may lie below the lower bound: `bdtr` is the binomial distribution, so
    # this is the last k with P(at most k of n below the median) within half of the 5 %.
    within = special.bdtr(np.arange(n), n, 0.5) <= (1 - CONFIDENCE) / 2
    outside = int(within.sum()) - 1
    if outside < 0:
        return Estimate(median, math.nan, math.nan, n)
    return Estimate(median, float(ordered[outside]), float(ordered[n - 1 - outside]), n)


def per_sample(
    array: xr.DataArray, keep: Iterable[str] = (), *, median: bool = False
) -> xr.DataArray:
    """Means (or medians) within each sample over every dimension but `keep`, leaving NaN out.

    Returns:
        Dimensions (sample, *keep).

    Raises:
        ValueError: a dimension to keep that the array does not have.
    """
    kept = tuple(keep)
    if unknown := set(kept) - set(map(str, array.dims)):
        raise ValueError(
            f"cannot keep {', '.join(sorted(unknown))} of an array over"
            f" {', '.join(map(str, array.dims))}"
        )
    other = [dim for dim in array.dims if dim != "sample" and dim not in kept]
    within = array.median(other, skipna=True) if median else array.mean(other, skipna=True)
    return within.transpose("sample", *kept)


def estimate(
    array: xr.DataArray,
    keep: Iterable[str] = (),
    *,
    least: int = 1,
    confidence: float = CONFIDENCE,
) -> Estimate[xr.DataArray]:
    """Means over samples of `per_sample(array, keep)` with their intervals.

    A sample with a long answer weighs as much as one with a short answer.

    Args:
        array: leads with the dimension `sample`.
        keep: dimensions of the result; none gives one number.
        least: places that fewer samples reach are NaN, because a curve that changes its population
            on the way looks like a trend.
        confidence: of the intervals, in (0, 1).

    Raises:
        ValueError: a dimension to keep that the array does not have.
    """
    samples = per_sample(array, keep)
    like = samples.isel(sample=0, drop=True)
    found = mean_intervals(samples.values, confidence)
    few = found.n < least
    parts = [np.where(few, np.nan, part) for part in (found.mean, found.low, found.high)]
    return Estimate(*(like.copy(data=part) for part in (*parts, found.n)))


def medians(array: xr.DataArray, keep: Iterable[str] = ()) -> Estimate[xr.DataArray]:
    """Medians within samples over every dimension but `keep`, and of these over samples.

    Args:
        array: leads with the dimension `sample`.
        keep: dimensions of the result; none gives one number.

    Raises:
        ValueError: a dimension to keep that the array does not have.
    """
    samples = per_sample(array, keep, median=True)
    like = samples.isel(sample=0, drop=True)
    columns = samples.values.reshape(samples.sizes["sample"], -1).T
    found = [median_interval(column) for column in columns]
    parts = ([getattr(one, name) for one in found] for name in ("mean", "low", "high", "n"))
    return Estimate(*(like.copy(data=np.reshape(part, like.shape)) for part in parts))


def paired_difference(values: ArrayLike, baseline: ArrayLike) -> Estimate[float]:
    """Mean of `values - baseline` over the samples that have both, with the interval of that mean.

    Much narrower than the two intervals taken apart, because what makes one sample harder than
    another cancels. For right and wrong answers take `paired_share_difference`.
    """
    return mean_interval(np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float))


# -- shares of samples -----------------------------------------------------------------------------


def share_interval(values: ArrayLike) -> Estimate[float]:
    """Share of ones among (samples,) values of 1, 0 and NaN, with Wilson's interval."""
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not known.size:
        return NOTHING
    return Estimate(float(known.mean()), *wilson(int(known.sum()), known.size), known.size)


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927); (NaN, NaN) without a single trial.

    Raises:
        ValueError: counts that are no proportion.
    """
    if not 0 <= right <= asked:
        raise ValueError(f"{right} of {asked}: need 0 <= right <= asked")
    if asked == 0:
        return math.nan, math.nan
    z = _normal_quantile()
    p, z2 = right / asked, z**2
    centre = (p + z2 / (2 * asked)) / (1 + z2 / asked)
    half = z / (1 + z2 / asked) * math.sqrt(p * (1 - p) / asked + z2 / (4 * asked**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _normal_quantile() -> float:
    return float(special.ndtri((1 + CONFIDENCE) / 2))


def paired_share_difference(values: ArrayLike, baseline: ArrayLike) -> Estimate[float]:
    """Share of ones in `values` minus that in `baseline`, over the samples that have both.

    The interval is Newcombe's for paired proportions (Newcombe 1998, method 10, with the continuity
    correction of the correlation). It keeps its width where no sample differs: none of 48 samples
    is compatible with a few points more or less.

    Args:
        values: (samples,) of 1, 0 and NaN.
        baseline: the same samples under what is compared with.

    Raises:
        ValueError: numbers that are neither 0 nor 1.
    """
    one, other = (np.asarray(part, dtype=float) for part in (values, baseline))
    both = np.isfinite(one) & np.isfinite(other)
    one, other = one[both], other[both]
    if not set(np.unique([one, other]).tolist()) <= {0.0, 1.0}:
        raise ValueError("shares are of samples that are right (1) or wrong (0); got other numbers")
    if not one.size:
        return NOTHING
    n = one.size
    low, high = _newcombe(
        int((one * other).sum()),
        int((one * (1 - other)).sum()),
        int(((1 - one) * other).sum()),
        int(((1 - one) * (1 - other)).sum()),
    )
    return Estimate(float((one - other).mean()), low, high, n)


def _newcombe(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """Interval of the difference of two paired proportions from the counts of the 2 x 2 table."""
    n = both + first + second + neither
    p, q = (both + first) / n, (both + second) / n
    p_low, p_high = wilson(both + first, n)
    q_low, q_high = wilson(both + second, n)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    product: float = both * neither - first * second
    if product > 0:
        product = max(product - n / 2, 0)
    phi = product / math.sqrt(margins) if margins else 0.0

    def distance(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))

    below, above = distance(p - p_low, q_high - q), distance(p_high - p, q - q_low)
    return max(-1.0, p - q - below), min(1.0, p - q + above)


# -- draws and questions ---------------------------------------------------------------------------


def crossed(values: np.ndarray) -> Estimate[float]:
    """Mean of (draws, questions) values with the percentile bootstrap that resamples both.

    Another run would draw both anew. With a single draw the interval is of the questions alone and
    says nothing about other draws. Questions that failed under any draw are left out; fewer than
    `LEAST_SAMPLES` questions have no interval.
    """
    known = values[:, np.isfinite(values).all(0)]
    draws, count = known.shape
    if not count:
        return NOTHING
    mean = float(known.mean())
    if count < LEAST_SAMPLES:
        return Estimate(mean, math.nan, math.nan, count)
    rng = np.random.default_rng([_SEED, 1])  # a stream apart from that of the questions
    of_draws = rng.multinomial(draws, np.full(draws, 1 / draws), RESAMPLES) / draws
    means = ((of_draws @ known) * _resamples(count)).sum(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), count)


# -- telling two classes apart ---------------------------------------------------------------------

LEAST_POSITIVE = 8
"""Samples that must hold an item of either class before `auroc` gives an interval. By simulation
(`python -m tests.benchmarks.interval_coverage`) five cover less than nine times in ten.
"""


def auroc(
    scores: ArrayLike, positive: ArrayLike, samples: ArrayLike, strata: ArrayLike | None = None
) -> Estimate[float]:
    """Area under the ROC curve of items that come in samples, with its bootstrap interval.

    The probability that an item of the positive class has the larger score than one of the other
    class, ties counted half (Mann and Whitney 1947; Hanley and McNeil 1982). Items of one sample
    are not independent, so whole samples are resampled (Field and Welsh 2007), and both numerator
    and denominator are counted anew. Percentiles are widened for few samples as those of
    `mean_interval`, by the number of samples that hold the rarer class.

    Args:
        scores: (items,) numbers, NaN where there is none: such items are left out.
        positive: (items,) 1 for the class that should score high, 0 for the other.
        samples: (items,) labels of the sample that each item belongs to.
        strata: (items,) labels; only items of one stratum are compared. None: all are.

    Returns:
        `n` is the number of samples with a positive item. NaN without a pair to compare; no bounds
        where fewer than `LEAST_POSITIVE` samples hold items of either class.

    Raises:
        ValueError: arrays of different lengths.
    """
    score = np.asarray(scores, dtype=float)
    is_positive = np.asarray(positive).astype(bool)
    sample = np.unique(np.asarray(samples), return_inverse=True)[1]
    stratum = np.zeros(score.size, int)
    if strata is not None:
        stratum = np.unique(np.asarray(strata), return_inverse=True)[1]
    if not score.shape == is_positive.shape == sample.shape == stratum.shape:
        raise ValueError(
            f"{score.size} scores, {is_positive.size} classes, {sample.size} samples and"
            f" {stratum.size} strata: one of each per item is needed"
        )
    known = np.isfinite(score)
    score, is_positive, sample, stratum = (
        part[known] for part in (score, is_positive, sample, stratum)
    )
    count = int(sample.max(initial=-1)) + 1
    won, pairs = np.zeros((count, count)), np.zeros((count, count))
    for label in np.unique(stratum):
        inside = stratum == label
        high, low = inside & is_positive, inside & ~is_positive
        of_low = np.zeros((int(low.sum()), count))
        of_low[np.arange(len(of_low)), sample[low]] = 1
        above = np.sign(score[high][:, None] - score[low]) / 2 + 0.5
        np.add.at(won, sample[high], above @ of_low)
        np.add.at(pairs, sample[high], np.broadcast_to(of_low.sum(0), (int(high.sum()), count)))
    with_either = [int((pairs > 0).any(axis).sum()) for axis in (1, 0)]
    if not pairs.sum():
        return Estimate(math.nan, math.nan, math.nan, 0)
    value = float(won.sum() / pairs.sum())
    rarer = min(with_either)
    if rarer < LEAST_POSITIVE:
        return Estimate(value, math.nan, math.nan, with_either[0])
    drawn = _resamples(count)
    compared = ((drawn @ pairs) * drawn).sum(1)
    areas = ((drawn @ won) * drawn).sum(1)[compared > 0] / compared[compared > 0]
    tail = _widened_quantile(rarer, CONFIDENCE)
    low_end, high_end = np.quantile(areas, [special.ndtr(-tail), special.ndtr(tail)])
    return Estimate(value, min(float(low_end), value), max(float(high_end), value), with_either[0])
