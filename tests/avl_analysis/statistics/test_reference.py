"""Every statistic equals its slow NumPy version, on the weights that eager attention itself
returns.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from avl_analysis.statistics import ALL
from avl_analysis.statistics.ages import AGE_STARTS
from tests import reference
from tests.avl_analysis.recorded import CASES, FRAMES, case_inputs, close, model, run


@pytest.fixture(scope="module", params=["multi-head", "grouped-query"])
def recorded_model(request):
    # a grid of 6 gives 36 image tokens: more than the 32 rows that statistics of sorted weights
    # look at
    return (
        model(kv_heads=2, heads=2, grid=6)
        if request.param == "multi-head"
        else model(kv_heads=2, heads=4, grid=3)
    )


@pytest.fixture(scope="module", params=CASES)
def case(request, recorded_model):
    recording, samples = run(recorded_model, case_inputs(recorded_model, request.param))
    return recording, samples


def test_row_statistics_equal_the_reference(case):
    recording, samples = case
    formulas = [(f, False) for f in reference.EVERY_ROW.values()] + [
        (f, True) for f in reference.SAMPLED_ROWS.values()
    ]
    for formula, sampled in formulas:
        name = formula.__name__
        for b, seen in enumerate(samples):
            prefill, produced = reference.of_rows(seen, formula, sampled)
            close(recording[f"{name}_prefill"][b], prefill, 1e-4)
            close(recording[name][b], produced, 1e-4)


def test_coverage_equals_the_reference_up_to_rounding_of_a_cumulative_share_at_tau(case):
    recording, samples = case
    for b, seen in enumerate(samples):
        few, many = (
            reference.of_rows(seen, partial(reference.coverage, slack=s), True) for s in (2e-6, 0.0)
        )
        for found, low, high in zip(("coverage_prefill", "coverage"), few, many, strict=True):
            values = recording[found][b].values
            assert np.array_equal(np.isnan(values), np.isnan(low))
            assert np.all((values >= low - 1e-6) & (values <= high + 1e-6) | np.isnan(low))


def test_attention_received_equals_the_reference(case):
    recording, samples = case
    for b, seen in enumerate(samples):
        raw, count = reference.accumulated_score(seen)
        used = slice(0, raw.shape[-1])
        close(recording.total("accumulated_score")[b][..., used], raw)
        expected = np.divide(raw, count, out=np.full_like(raw, np.nan), where=count > 0)
        close(recording["accumulated_score"][b][..., used], expected)
        close(recording["sink_rate"][b], reference.sink_rate(seen))
        close(recording["position_bias"][b], reference.position_bias(seen), 1e-3)


def test_text_age_profile_equals_the_reference(case):
    recording, samples = case
    for b, seen in enumerate(samples):
        total, pairs = reference.text_age_profile(seen, AGE_STARTS)
        close(recording.total("text_age_profile")[b], total)
        close(recording.data["sums"]["text_age_profile_count"][b], pairs)
        found, slow = recording["text_age_fit"][b].values, reference.text_age_fit(seen, AGE_STARTS)
        close(found[..., 1:], slow[..., 1:], 1e-3)
        close(
            np.log(found[..., 0]), np.log(slow[..., 0]), 1e-2
        )  # 2 ** (1 / rate): huge where there is no decay


def test_statistics_over_steps_equal_the_reference(case):
    recording, samples = case
    for b, seen in enumerate(samples):
        scores = seen.image_scores()
        for name, slow in reference.OVER_STEPS.items():
            found = recording[name][b]
            if scores.shape[-1]:
                close(found, slow(scores), 1e-4)
            else:
                assert bool(np.isnan(found).all()), name
        close(recording["spatial_entropy"][b], reference.spatial_entropy(seen), 1e-3)


def test_statistics_of_time_equal_the_reference(case):
    recording, samples = case
    for b, seen in enumerate(samples):
        frames = max(1, sum(len(set(seen.frame[seen.image == i]) - {-1}) for i in range(4)))
        mass = recording["frame_mass"][b]
        close(mass[..., :frames], reference.frame_mass(seen), 1e-4)
        assert bool(np.isnan(mass[..., frames:]).all())
        close(recording["frame_core_overlap"][b], reference.frame_core_overlap(seen), 1e-4)


def test_the_cases_have_videos_of_different_lengths():
    counts = [count for row in FRAMES.values() for shown in row for count in shown]
    assert {2, 3} <= set(counts)


def test_key_redundancy_equals_the_mean_cosine_over_all_pairs(case):
    recording, samples = case
    for b, seen in enumerate(samples):
        close(recording["key_redundancy"][b], reference.key_redundancy(seen), 1e-4)


def test_every_statistic_has_a_slow_version():
    covered = {"coverage", *reference.EVERY_ROW, *reference.SAMPLED_ROWS, *reference.OVER_STEPS}
    covered |= {
        "accumulated_score",
        "sink_rate",
        "position_bias",
        "text_age_profile",
        "text_age_fit",
    }
    covered |= {"key_redundancy", "spatial_entropy", "frame_mass", "frame_core_overlap"}
    assert {statistic.name for statistic in ALL} == covered
