"""How often the intervals of `avl_analysis.intervals` hold the truth, by simulation.

    python -m tests.benchmarks.interval_coverage

Prints, per distribution and number of samples, the share of 4,000 repetitions whose interval holds
the true mean; the docstring of `avl_analysis.intervals` quotes it. Takes half a minute on one
core. Then the same of `auroc` by the number of samples with a positive item, of 200 samples with 1
to 19 items each, 400 repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from avl_analysis import intervals
from avl_analysis.intervals import auroc, mean_intervals

REPETITIONS = 4000
SIZES = (5, 8, 12, 20, 30, 50, 200)
POSITIVE = (5, 8, 12, 20, 40)

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
DISTRIBUTIONS: Mapping[str, tuple[Draw, float]] = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "beta(8,1)": (lambda rng, shape: rng.beta(8, 1, shape), 8 / 9),
    "beta(.5,5)": (lambda rng, shape: rng.beta(0.5, 5, shape), 0.5 / 5.5),
    "lognormal": (lambda rng, shape: rng.lognormal(size=shape), math.exp(0.5)),
}
"""Name -> how to draw (samples, repetitions) values, and their true mean."""


def coverage(name: str, n: int, repetitions: int = REPETITIONS, seed: int = 0) -> float:
    """Share of repetitions in which the interval of `n` samples' mean holds the true mean.

    Args:
        name: one of `DISTRIBUTIONS`.
        n: samples behind each interval.
        repetitions: how many intervals.
        seed: of the draws.
    """
    draw, truth = DISTRIBUTIONS[name]
    found = mean_intervals(draw(np.random.default_rng([seed, n]), (n, repetitions)))
    return float(((found.low <= truth) & (truth <= found.high)).mean())


def auroc_coverage(
    positive: int, separation: float, repetitions: int = 400, samples: int = 200
) -> float:
    """Share of repetitions in which the interval of `auroc` holds the true area.

    Scores are normal, half of their variance common to all items of a sample; positive items are
    higher by `separation`.

    Args:
        positive: samples with one to three positive items, on average.
        separation: in standard deviations.
        repetitions: how many intervals.
        samples: in each.
    """
    rng = np.random.default_rng([positive, int(10 * separation)])
    truth = 0.5 * (1 + math.erf(separation / 2))
    held = []
    for _ in range(repetitions):
        sample = np.repeat(np.arange(samples), rng.integers(1, 20, samples))
        chosen = rng.random(samples) < positive / samples
        rank = rng.permutation(sample.size)
        is_positive = np.zeros(sample.size, bool)
        for one in np.flatnonzero(chosen):
            items = np.flatnonzero(sample == one)
            is_positive[items[np.argsort(rank[items])[: rng.integers(1, 4)]]] = True
        noise = rng.normal(size=samples)[sample] + rng.normal(size=sample.size)
        found = auroc(noise / math.sqrt(2) + separation * is_positive, is_positive, sample)
        if found.known:
            held.append(found.low <= truth <= found.high)
    return float(np.mean(held))


def main() -> None:
    print(f"{'n':>12}" + "".join(f"{n:>7}" for n in SIZES))
    for name in DISTRIBUTIONS:
        shares = (coverage(name, n) for n in SIZES)
        print(f"{name:>12}" + "".join(f"{share:7.3f}" for share in shares), flush=True)
    print(f"{'positive':>12}" + "".join(f"{n:>7}" for n in POSITIVE))
    intervals.LEAST_POSITIVE = 2  # to see below it, too
    for separation in (0.0, 1.0):
        shares = (auroc_coverage(n, separation) for n in POSITIVE)
        name = f"auroc, d={separation:g}"
        print(f"{name:>12}" + "".join(f"{share:7.3f}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
