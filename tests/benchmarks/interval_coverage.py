"""How often the intervals of `avl_analysis.intervals` hold the truth, by simulation.

    python -m tests.benchmarks.interval_coverage

Prints, per distribution and number of samples, the share of 4,000 repetitions whose interval holds
the true mean; the docstring of `avl_analysis.intervals` quotes it. Takes half a minute on one
core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from avl_analysis.intervals import mean_intervals

REPETITIONS = 4000
SIZES = (5, 8, 12, 20, 30, 50, 200)

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


def main() -> None:
    print(f"{'n':>12}" + "".join(f"{n:>7}" for n in SIZES))
    for name in DISTRIBUTIONS:
        shares = (coverage(name, n) for n in SIZES)
        print(f"{name:>12}" + "".join(f"{share:7.3f}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
