"""Means over samples, their intervals, and what is left out."""

import numpy as np
import pytest
import xarray as xr

from avl_analysis.intervals import mean_interval
from avl_reports.estimates import estimate, per_sample


def array(values: np.ndarray, *dims: str) -> xr.DataArray:
    return xr.DataArray(values, dims=("sample", *dims))


def test_an_estimate_is_that_of_the_toolkit_for_one_number():
    values = np.random.default_rng(0).normal(3, 2, 40)
    mine, theirs = estimate(array(values)).interval, mean_interval(values)
    assert mine.value == pytest.approx(theirs.mean)
    assert mine.low == pytest.approx(theirs.low, abs=0.06)
    assert mine.high == pytest.approx(theirs.high, abs=0.06)


def test_a_sample_with_many_steps_weighs_as_much_as_one_with_few():
    values = np.full((2, 10), np.nan)
    values[0] = 1.0
    values[1, 0] = 0.0
    assert estimate(array(values, "step")).interval.value == 0.5


def test_every_kept_dimension_gets_its_own_interval():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(30, 4, 5)) + np.arange(4)[None, :, None]
    found = estimate(array(values, "layer", "head"), ("layer",))
    alone = estimate(array(values[:, 2], "head"))
    assert found.value.dims == ("layer",)
    assert float(found.value[2]) == pytest.approx(float(alone.value))
    assert float(found.low[2]) == pytest.approx(float(alone.low))


def test_places_few_samples_reach_are_left_out():
    values = np.array([[1.0, 1.0], [2.0, np.nan], [3.0, np.nan]])
    found = estimate(array(values, "step"), ("step",), least=2)
    assert found.value.values[0] == 2.0
    assert np.isnan(found.value.values[1])
    assert found.n.values.tolist() == [3, 1]


def test_one_sample_has_a_mean_but_no_interval():
    found = estimate(array(np.array([2.0]))).interval
    assert found.value == 2.0
    assert not found.known


def test_equal_samples_have_an_interval_without_width():
    found = estimate(array(np.full(5, 0.25))).interval
    assert found.low == found.value == found.high == 0.25


def test_many_columns_are_estimated_like_few():
    values = np.random.default_rng(2).normal(size=(12, 5000))
    whole = estimate(array(values, "head"), ("head",))
    part = estimate(array(values[:, -3:], "head"), ("head",))
    assert np.allclose(whole.low.values[-3:], part.low.values)


def test_a_dimension_the_array_lacks_cannot_be_kept():
    with pytest.raises(ValueError, match="cannot keep layer"):
        per_sample(array(np.zeros((2, 3)), "head"), ("layer",))


def test_several_numbers_are_not_one_interval():
    with pytest.raises(ValueError, match="not one number"):
        _ = estimate(array(np.zeros((2, 3)), "head"), ("head",)).interval
