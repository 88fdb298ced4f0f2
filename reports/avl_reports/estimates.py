"""From numbers per sample to a mean with an interval: the last step before a figure.

Every array in a recording leads with `sample`. An estimate first averages within each sample over
whatever a figure does not show (heads, decode steps, ...), leaving NaN out, and then over samples,
so that a sample with a long answer weighs as much as one with a short answer. The interval is the
percentile bootstrap over samples (Efron 1979): samples are what another run would draw anew; heads
and steps are not.

What surprises: where too few samples reach a place (the thirtieth word of an answer), its mean is
left out rather than drawn, because a curve that silently changes its population looks like a trend.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from avl_analysis.intervals import CONFIDENCE, RESAMPLES
from avl_reports.findings import Interval

INTERVAL = f"{CONFIDENCE:.0%} bootstrap intervals over samples".replace("%", " %")
_SEED = 20250
_BLOCK = 1 << 22


@dataclass(frozen=True, eq=False)
class Estimate:
    """Mean over samples and the ends of its interval, three arrays with the same dimensions; `n`
    samples behind each.
    """

    value: xr.DataArray
    low: xr.DataArray
    high: xr.DataArray
    n: xr.DataArray

    def at(self, **labels: object) -> Estimate:
        """The part of the estimate with these coordinate labels."""
        return Estimate(*(a.sel(labels) for a in (self.value, self.low, self.high, self.n)))

    @property
    def interval(self) -> Interval:
        """As one number; raises ValueError if there are several."""
        if self.value.size != 1:
            raise ValueError(
                f"an estimate over {dict(self.value.sizes)} is not one number; select first"
            )
        return Interval(float(self.value), float(self.low), float(self.high))


def per_sample(array: xr.DataArray, keep: Iterable[str] = ()) -> xr.DataArray:
    """Means within each sample over every dimension but `keep`, leaving NaN out; dims (sample,
    *keep).
    """
    kept = tuple(keep)
    if unknown := set(kept) - set(array.dims):
        raise ValueError(
            f"cannot keep {', '.join(sorted(unknown))} of an array over"
            f" {', '.join(map(str, array.dims))}"
        )
    other = [dim for dim in array.dims if dim != "sample" and dim not in kept]
    return array.mean(other, skipna=True).transpose("sample", *kept)


def estimate(array: xr.DataArray, keep: Iterable[str] = (), *, least: int = 1) -> Estimate:
    """Mean over samples of `per_sample(array, keep)` with its bootstrap interval.

    Args:
        least: places that fewer samples reach are NaN.

    A single sample has a mean but no interval: both ends are NaN.
    """
    samples = per_sample(array, keep)
    values = samples.values.reshape(samples.sizes["sample"], -1).astype(np.float64)
    count = np.isfinite(values).sum(0)
    value, low, high = _bootstrap(values, count)
    value[count < least] = low[count < least] = high[count < least] = np.nan
    like = samples.isel(sample=0, drop=True)
    return Estimate(
        *(
            like.copy(data=a.reshape(like.shape))
            for a in (value, low, high, count.astype(np.float64))
        )
    )


def _bootstrap(values: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper end for each column of (samples, columns) values with gaps.

    A resample is a row of multinomial weights, so all resampled means are one matrix product.
    """
    n, columns = values.shape
    filled, present = np.nan_to_num(values), np.isfinite(values).astype(np.float64)
    mean = np.divide(filled.sum(0), count, out=np.full(columns, np.nan), where=count > 0)
    low, high = np.full(columns, np.nan), np.full(columns, np.nan)
    weights = (
        np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)
    )
    tail = (1 - CONFIDENCE) / 2
    for start in range(0, columns, max(1, _BLOCK // RESAMPLES)):
        at = slice(start, start + max(1, _BLOCK // RESAMPLES))
        total = weights @ present[:, at]
        means = np.divide(
            weights @ filled[:, at], total, out=np.full(total.shape, np.nan), where=total > 0
        )
        enough = count[at] > 1
        if enough.any():
            ends = np.nanquantile(means[:, enough], [tail, 1 - tail], axis=0)
            low[at][enough], high[at][enough] = (
                np.minimum(ends[0], mean[at][enough]),
                np.maximum(ends[1], mean[at][enough]),
            )
    return mean, low, high
