"""Intervals over samples: against scipy's bootstrap, worked examples, and exact coverage."""

import math
from itertools import product

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from avl_analysis import intervals
from avl_analysis.intervals import (
    LEAST_POSITIVE,
    LEAST_SAMPLES,
    Estimate,
    auroc,
    crossed,
    estimate,
    mean_interval,
    mean_intervals,
    median_interval,
    medians,
    paired_difference,
    paired_share_difference,
    per_sample,
    share_interval,
    wilson,
)
from tests.benchmarks.interval_coverage import auroc_coverage, coverage

NAN, INF = math.nan, math.inf


def array(values: np.ndarray, *dims: str) -> xr.DataArray:
    return xr.DataArray(values, dims=("sample", *dims))


# -- means -----


@pytest.mark.parametrize("n", [5, 12, 30, 80])
def test_a_mean_has_the_bca_interval_of_scipy_at_levels_widened_for_the_number_of_samples(n):
    values = np.random.default_rng(n).lognormal(size=n)
    z = stats.t.ppf(0.975, n - 1) * math.sqrt(n / (n - 1))
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=40_000,
        confidence_level=1 - 2 * stats.norm.cdf(-z),
        method="BCa",
        rng=np.random.default_rng(5),
    ).confidence_interval
    mine = mean_interval(values)
    width = theirs.high - theirs.low
    # 2,000 resamples say where a quantile far out lies to within a few per cent of the width
    assert mine.low == pytest.approx(theirs.low, abs=0.08 * width)
    assert mine.high == pytest.approx(theirs.high, abs=0.12 * width)


def test_the_widened_quantile_is_student_s():
    for n in (2, 3, 5, 30, 5000):
        expected = stats.t.ppf(0.975, n - 1) * math.sqrt(n / (n - 1))
        assert intervals._widened_quantile(n, 0.95) == expected


def test_intervals_cover_what_the_documentation_says():
    """Percentile intervals cover .84, .92, .80, .77 and .86 here."""
    documented = {
        ("normal", 5): 0.920,
        ("normal", 20): 0.943,
        ("beta(8,1)", 5): 0.889,
        ("beta(.5,5)", 8): 0.905,
        ("lognormal", 20): 0.897,
    }
    for (name, n), share in documented.items():
        # two standard errors of 1,500 repetitions
        margin = 2 * math.sqrt(share * (1 - share) / 1500)
        assert coverage(name, n, 1500, seed=1) >= share - margin
        assert f"{share:.3f}".lstrip("0") in (intervals.__doc__ or "")


def test_fewer_than_five_samples_have_a_mean_but_no_interval():
    for n in range(1, LEAST_SAMPLES):
        found = mean_interval(np.arange(n))
        assert found.mean == (n - 1) / 2
        assert not found.known
        assert found.n == n
    assert mean_interval(np.arange(LEAST_SAMPLES)).known


def test_missing_values_are_left_out_and_infinite_ones_are_not():
    values = [1.0, 2.0, 4.0, 3.0, 9.0, 2.5]
    assert mean_interval([*values, NAN]) == mean_interval(values)
    assert mean_interval([NAN]).n == 0
    assert math.isnan(mean_interval([NAN]).mean)
    found = mean_interval([*values, INF])
    assert (found.mean, found.n) == (INF, 7)
    assert not found.known


def test_equal_samples_have_an_interval_without_width():
    found = mean_interval([0.1] * 7)
    assert found.low == found.high == found.mean == pytest.approx(0.1)


def test_an_interval_is_one_whatever_the_order_and_whoever_asks():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(12, 40))
    values[rng.random(values.shape) < 0.2] = NAN
    many, backwards = mean_intervals(values), mean_intervals(values[::-1])
    for column in range(40):
        one = mean_interval(values[:, column])
        for name in ("mean", "low", "high", "n"):
            expected = pytest.approx(getattr(one, name), rel=1e-12, nan_ok=True)
            assert getattr(many, name)[column] == expected
            assert getattr(backwards, name)[column] == expected


def test_many_columns_are_estimated_like_few():
    values = np.random.default_rng(2).normal(size=(12, 5000))
    whole = estimate(array(values, "head"), ("head",))
    part = estimate(array(values[:, -3:], "head"), ("head",))
    assert np.allclose(whole.low.values[-3:], part.low.values)


def test_paired_differences_are_narrower_than_the_samples_differ():
    hard = np.random.default_rng(0).normal(0, 10, 50)
    found = paired_difference(hard + 1, hard)
    assert found.mean == pytest.approx(1)
    assert found.high - found.low < 1e-9
    assert paired_difference([1.0, NAN], [0.0, 5.0]).n == 1


# -- labelled arrays -----


def test_a_sample_with_many_steps_weighs_as_much_as_one_with_few():
    values = np.full((2, 10), np.nan)
    values[0] = 1.0
    values[1, 0] = 0.0
    assert estimate(array(values, "step")).number.mean == 0.5


def test_every_kept_dimension_gets_its_own_interval():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(30, 4, 5)) + np.arange(4)[None, :, None]
    found = estimate(array(values, "layer", "head"), ("layer",))
    alone = estimate(array(values[:, 2], "head"))
    assert found.mean.dims == ("layer",)
    assert float(found.mean[2]) == pytest.approx(float(alone.mean))
    assert float(found.low[2]) == pytest.approx(float(alone.low))
    assert float(found.at(layer=2).mean) == float(found.mean[2])


def test_places_few_samples_reach_are_left_out():
    values = np.array([[1.0, 1.0], [2.0, np.nan], [3.0, np.nan]])
    found = estimate(array(values, "step"), ("step",), least=2)
    assert found.mean.values[0] == 2.0
    assert np.isnan(found.mean.values[1])
    assert found.n.values.tolist() == [3, 1]


def test_a_dimension_the_array_lacks_cannot_be_kept():
    with pytest.raises(ValueError, match="cannot keep layer"):
        per_sample(array(np.zeros((2, 3)), "head"), ("layer",))


def test_several_numbers_are_not_one():
    with pytest.raises(ValueError, match="not one number"):
        _ = estimate(array(np.zeros((2, 3)), "head"), ("head",)).number


def test_an_estimate_in_words_carries_its_ends_and_unit():
    assert Estimate(0.614, 0.58, 0.64, 9).words() == "0.61 [0.58, 0.64]"
    assert Estimate(0.614, 0.58, 0.64, 9).words("%") == "61 % [58, 64]"
    assert Estimate(3.0, 2.5, 3.5, 9).words("times", 1) == "3.0 times [2.5, 3.5]"
    assert Estimate(3.0, NAN, NAN, 1).words("times") == "3.00 times (no interval)"
    assert Estimate(NAN, NAN, NAN, 0).words() == "(not measured)"
    assert Estimate(-1e-9, -0.02, 0.02, 9).words("%") == "0.0 % [-2.0, 2.0]"


# -- medians -----


def test_a_median_counts_infinite_values_and_has_the_interval_of_the_sign_test():
    found = median_interval([3.0, 1.0, INF, 2.0, 5.0, 4.0, INF, NAN])
    assert (found.mean, found.n) == (4.0, 7)
    assert (found.low, found.high) == (1.0, INF)  # of 7 values the first and the last: 0.984
    assert median_interval([1.0, 2.0, INF]).mean == 2.0
    assert median_interval([1.0, INF]).mean == INF
    assert not median_interval(range(5)).known
    assert median_interval([]).n == 0


@pytest.mark.parametrize("n", [6, 9, 10, 25, 60])
def test_the_interval_of_a_median_covers_it_in_at_least_95_per_cent(n):
    found = median_interval(range(n))
    below = int(found.low)  # so many values are smaller than the lower bound
    assert 1 - 2 * stats.binom.cdf(below, n, 0.5) >= 0.95
    assert 1 - 2 * stats.binom.cdf(below + 1, n, 0.5) < 0.95


def test_medians_are_taken_within_samples_first():
    values = np.array([[1.0, 2.0, INF], [4.0, 5.0, 6.0], [INF, INF, 7.0]])
    found = medians(array(values, "layer"))
    assert float(found.mean) == 5.0
    assert medians(array(values, "layer"), ("layer",)).mean.values.tolist() == [4.0, 5.0, 7.0]


# -- shares -----


def test_wilson_intervals_match_worked_values_and_stay_within_zero_and_one():
    # 81 of 263: the worked example of R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872,
    # table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20)[0] == 0.0
    assert wilson(500, 500)[1] == pytest.approx(1.0)
    assert all(math.isnan(bound) for bound in wilson(0, 0))
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)
    found = share_interval([1.0, 0.0, NAN, 1.0])
    assert (found.mean, found.n) == (pytest.approx(2 / 3), 3)
    assert (found.low, found.high) == wilson(2, 3)


def _table(both: int, first: int, second: int, neither: int) -> tuple[list[int], list[int]]:
    rows = [(1, 1)] * both + [(1, 0)] * first + [(0, 1)] * second + [(0, 0)] * neither
    one, other = zip(*rows, strict=True)
    return list(one), list(other)


def test_paired_shares_combine_wilsons_intervals_by_their_correlation():
    # 24 right twice, 12 and 2 once, 12 never: phi = (288 - 24 - 25) / sqrt(36 * 14 * 26 * 24)
    found = paired_share_difference(*_table(24, 12, 2, 12))
    phi = (24 * 12 - 12 * 2 - 25) / math.sqrt(36 * 14 * 26 * 24)
    (p_low, p_high), (q_low, q_high) = wilson(36, 50), wilson(26, 50)
    below, above = 0.72 - p_low, q_high - 0.52
    assert found.mean == pytest.approx(0.20)
    assert found.low == pytest.approx(
        0.20 - math.sqrt(below**2 - 2 * phi * below * above + above**2)
    )
    below, above = p_high - 0.72, 0.52 - q_low
    assert found.high == pytest.approx(
        0.20 + math.sqrt(below**2 - 2 * phi * below * above + above**2)
    )
    mirrored = paired_share_difference(*_table(24, 2, 12, 12))
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_samples_that_never_differ_do_not_exclude_a_small_difference():
    for right in (0, 30, 48):
        found = paired_share_difference(
            [1] * right + [0] * (48 - right), [1] * right + [0] * (48 - right)
        )
        assert found.mean == 0
        assert found.low < -0.03 < 0.03 < found.high
    assert paired_share_difference([1, NAN], [1, 1]).n == 1
    assert paired_share_difference([NAN], [1]).n == 0
    with pytest.raises(ValueError, match="right \\(1\\) or wrong"):
        paired_share_difference([0.5], [1])


@pytest.mark.parametrize(("n", "lost", "gained"), [(12, 0.1, 0.1), (20, 0.03, 0.0), (30, 0.3, 0.1)])
def test_intervals_of_paired_shares_cover_the_truth_in_exact_enumeration(n, lost, gained):
    covered = total = 0.0
    agree = 1 - lost - gained
    chances = (0.8 * agree, lost, gained, 0.2 * agree)
    for first, second in product(range(n + 1), repeat=2):
        for both in range(n + 1 - first - second):
            counts = (both, first, second, n - both - first - second)
            chance = float(stats.multinomial.pmf(counts, n, chances))
            if chance < 1e-6:
                continue
            found = paired_share_difference(*_table(*counts))
            covered += chance * (found.low <= lost - gained <= found.high)
            total += chance
    assert total > 0.995
    assert covered / total >= 0.945


# -- draws and questions -----


def test_crossed_draws_resample_questions_and_draws():
    rng = np.random.default_rng(3)
    questions = rng.normal(size=(1, 40))
    draws = rng.normal(size=(6, 1))
    wide, of_questions, of_draws = (
        crossed(values)
        for values in (questions + draws, np.repeat(questions, 6, 0), np.repeat(draws, 40, 1))
    )
    widths = [one.high - one.low for one in (wide, of_questions, of_draws)]
    # independent parts add as squares; resamples shared by both would make them add as they are
    assert widths[0] == pytest.approx(math.hypot(widths[1], widths[2]), rel=0.1)
    assert crossed(np.zeros((3, 4))).n == 4
    assert not crossed(np.zeros((3, 4))).known


# -- telling two classes apart -----


def slow_area(scores, positive, samples, strata):
    """One comparison at a time."""
    won = pairs = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if positive[i] and not positive[j] and strata[i] == strata[j]:
                pairs += 1
                won += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    return won / pairs


def items(seed, count=120, samples=30):
    rng = np.random.default_rng(seed)
    positive = rng.random(count) < 0.4
    scores = np.round(rng.normal(size=count) + positive, 1)  # with ties
    return scores, positive, rng.integers(samples, size=count), rng.integers(3, size=count)


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    scores, positive, samples, strata = items(0)
    assert auroc(scores, positive, samples).mean == pytest.approx(
        slow_area(scores, positive, samples, np.zeros(len(scores)))
    )
    within = auroc(scores, positive, samples, strata)
    assert within.mean == pytest.approx(slow_area(scores, positive, samples, strata))
    assert within.low < within.mean < within.high
    gaps = scores.copy()
    gaps[::7] = NAN
    known = np.isfinite(gaps)
    assert auroc(gaps, positive, samples).mean == pytest.approx(
        auroc(scores[known], positive[known], samples[known]).mean
    )


def test_the_areas_interval_is_that_of_resampling_whole_samples_one_by_one():
    scores, positive, samples, strata = items(1)
    found = auroc(scores, positive, samples, strata)
    rng = np.random.default_rng(3)
    labels = np.unique(samples)
    areas = []
    for _ in range(400):
        at = np.concatenate(
            [np.flatnonzero(samples == one) for one in rng.choice(labels, labels.size)]
        )
        areas.append(slow_area(scores[at], positive[at], samples[at], strata[at]))
    z = stats.t.ppf(0.975, found.n - 1) * math.sqrt(found.n / (found.n - 1))
    low, high = np.quantile(areas, [stats.norm.cdf(-z), stats.norm.cdf(z)])
    width = high - low
    assert found.low == pytest.approx(low, abs=0.15 * width)
    assert found.high == pytest.approx(high, abs=0.15 * width)


def test_few_samples_with_a_class_have_an_area_and_no_interval():
    scores = np.arange(40.0)
    samples = np.arange(40)
    few = auroc(scores, samples >= 40 - (LEAST_POSITIVE - 1), samples)
    assert (few.mean, few.n, few.known) == (1.0, LEAST_POSITIVE - 1, False)
    assert auroc(scores, samples >= 40 - LEAST_POSITIVE, samples).known
    nothing = auroc(scores, np.zeros(40), samples)
    assert math.isnan(nothing.mean)
    assert not nothing.known
    with pytest.raises(ValueError, match="one of each per item"):
        auroc(scores, samples[:5], samples)


@pytest.mark.slow
def test_the_areas_interval_covers_the_truth_from_the_least_number_of_samples_on():
    for separation in (0.0, 1.0):
        assert auroc_coverage(LEAST_POSITIVE, separation, 200) > 0.88
