"""Statistics of weights whose answer one can check by eye."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from avl_analysis.errors import InputError
from avl_analysis.statistics import ALL, select
from avl_analysis.statistics.ages import AGE_STARTS
from avl_analysis.statistics.base import KeyScores, Trajectory
from avl_analysis.statistics.concentration import EffectiveCount, Entropy, Gini
from avl_analysis.statistics.core_hits import CoreHitRate, HeldCoreMass
from avl_analysis.statistics.coverage import Coverage
from avl_analysis.statistics.distance import PatchDistance, TextDistance
from avl_analysis.statistics.frames import FrameCoreOverlap, FrameMass, TimeDistance
from avl_analysis.statistics.inputs import QueryRows
from avl_analysis.statistics.layer_agreement import LayerAgreement
from avl_analysis.statistics.modality_mass import Efficiency, FirstTokenMass, ModalityMass
from avl_analysis.statistics.persistence import ImagePersistence
from avl_analysis.statistics.position_bias import raster_fit
from avl_analysis.statistics.ppci import PPCIContinuity, PPCIHeterogeneity, PPCIPrefill
from avl_analysis.statistics.prefill_recall import PrefillMass, PrefillRecall
from avl_analysis.statistics.recent_text import RecentTextMass
from avl_analysis.statistics.shared_keys import SharedCoverage, SharedSparsity
from avl_analysis.statistics.sinks import SinkRate
from avl_analysis.statistics.sparsity import ThresholdSparsity
from avl_analysis.statistics.spatial_entropy import SpatialEntropy, entropy_of_places
from avl_analysis.statistics.text_age import decay_fits
from avl_analysis.statistics.top_sets import top
from tests import reference
from tests.worked import last_row, one_hot, tokens, uniform

SYSTEM, IMAGE, TEXT = range(3)
KINDS = "s" + 10 * "i" + "t"


def only_image(weights: list[float]) -> list[list[float]]:
    """One row with these weights on the ten image tokens of KINDS."""
    return [[0.0, *weights, 0.0]]


def trajectory(scores: np.ndarray) -> Trajectory:
    """From (steps, layers, image tokens)."""
    none = np.full(scores.shape[-1], -1)
    last = np.repeat(scores[0][:, None], 2, axis=1)
    return Trajectory(
        scores.astype(np.float32), last, none, none, none, none, tuple(range(scores.shape[1]))
    )


def test_uniform_attention_has_entropy_ln_n_effective_count_n_and_gini_zero():
    rows = only_image(uniform(10))
    assert last_row(Entropy(), rows, KINDS)[IMAGE] == pytest.approx(math.log(10))
    assert last_row(EffectiveCount(), rows, KINDS)[IMAGE] == pytest.approx(10)
    assert last_row(Gini(), rows, KINDS)[IMAGE] == pytest.approx(0, abs=1e-6)


def test_coverage_of_uniform_attention_is_tau_n_rounded_up():
    found = last_row(Coverage(), only_image(uniform(10)), KINDS)[IMAGE]
    assert found == pytest.approx([0.5, 0.8, 0.9, 1.0, 1.0])


def test_one_hot_attention_has_entropy_zero_coverage_one_nth_and_the_largest_gini():
    rows = only_image(one_hot(10, 3))
    assert last_row(Entropy(), rows, KINDS)[IMAGE] == pytest.approx(0, abs=1e-6)
    assert last_row(EffectiveCount(), rows, KINDS)[IMAGE] == pytest.approx(1)
    assert last_row(Gini(), rows, KINDS)[IMAGE] == pytest.approx(0.9)
    assert last_row(Coverage(), rows, KINDS)[IMAGE] == pytest.approx([0.1] * 5)


def test_a_modality_without_mass_is_undefined_not_zero():
    for statistic in (Coverage(), Entropy(), Gini(), EffectiveCount()):
        found = last_row(statistic, only_image(uniform(10)), KINDS)
        assert np.isnan(found[SYSTEM]).all(), statistic.name
        assert not np.isnan(found[IMAGE]).any(), statistic.name
    assert np.isnan(last_row(Efficiency(), [uniform(2)], "tt")[:2]).all()


def test_mass_is_the_sum_over_a_modality_and_efficiency_its_mean():
    rows = [[0.4, 0.1, 0.3, 0.2]]
    assert last_row(ModalityMass(), rows, "siit") == pytest.approx([0.4, 0.4, 0.2])
    assert last_row(Efficiency(), rows, "siit") == pytest.approx([0.4, 0.2, 0.2])
    assert last_row(FirstTokenMass(), rows, "siit") == pytest.approx(0.4)


def test_threshold_sparsity_is_the_share_below_a_hundredth_of_the_largest():
    assert last_row(ThresholdSparsity(), [[0.9, 0.0089, 0.0091, 0.082]], "siit") == pytest.approx(
        0.25
    )
    assert last_row(
        ThresholdSparsity(threshold=0.5), [[0.9, 0.0089, 0.0091, 0.082]], "siit"
    ) == pytest.approx(0.75)
    assert last_row(ThresholdSparsity(), [uniform(4)], "siit") == 0


def test_distance_counts_tokens_over_text_and_patches_over_the_picture():
    assert last_row(TextDistance(), [[0.5, 0.2, 0.2, 0.1]], "sttt") == pytest.approx(
        (0.2 * 2 + 0.2 * 1) / 0.5
    )
    four = [
        [0.0, 0.5, 0.0, 0.0, 0.5]
    ]  # from the last patch of a 2 x 2 picture to the first and to itself
    assert last_row(PatchDistance(), four, "siiii", columns=2) == pytest.approx(math.sqrt(2) / 2)
    assert np.isnan(
        last_row(PatchDistance(), [[0.0, 0.5, 0.0, 0.0, 0.25, 0.25]], "siiiit", columns=2)
    )


def test_recent_text_mass_counts_the_rows_own_token_as_recent():
    found = last_row(RecentTextMass(windows=(1, 2, 3)), [[0.2, 0.4, 0.3, 0.1]], "sttt")
    assert found == pytest.approx([0.1 / 0.8, 0.4 / 0.8, 1.0])


def test_exactly_exponential_attention_has_its_half_life_and_fits_perfectly():
    ages = np.arange(64)
    exponential, power = decay_fits(ages, 3 * np.exp(-0.1 * ages), np.ones(64))
    assert exponential == pytest.approx([np.log(2) / 0.1, 0.1, 1.0])
    assert power[2] < 1
    _, power = decay_fits(ages, 3 * (1.0 + ages) ** -2, np.ones(64))
    assert power == pytest.approx([np.sqrt(2) - 1, 2.0, 1.0])


def test_attention_that_does_not_fall_has_an_infinite_half_life():
    fits = decay_fits(np.arange(10), np.exp(0.1 * np.arange(10)), np.ones(10))
    assert np.isinf(fits[:, 0]).all()
    assert np.isnan(decay_fits(np.arange(3), np.ones(3), np.ones(3))).all()


def test_age_bins_are_exact_first_and_then_grow_and_never_repeat():
    assert AGE_STARTS[:4].tolist() == [0, 1, 2, 3]
    assert np.all(np.diff(AGE_STARTS) > 0)
    assert AGE_STARTS[-1] == 1 << 20


def test_raster_fit_finds_the_trend_it_was_given():
    i = np.arange(20)
    assert raster_fit(0.3 * np.exp(1.5 * i / 20), np.ones(20)) == pytest.approx([0.3, 1.5, 1.0])


def test_a_head_with_a_third_of_every_row_on_the_first_token_has_a_sink():
    received, queries = np.zeros((1, 2, 3, 4)), np.ones((1, 2, 3, 4)) * [4, 3, 2, 1]
    received[0, 0, 0, 0], received[0, 1, 0, 2] = (
        1.3,
        0.7,
    )  # 0.325 of four rows; 0.35 of two rows, an image token
    scores = KeyScores(received, queries, np.array([0, 1, 1, 2]), 4)
    found, _ = SinkRate().value(scores)
    assert found[0].tolist() == [[1, 0], [0, 1]]


def test_top_sets_have_the_truncated_size_and_prefer_earlier_tokens_on_ties():
    assert top(np.array([1.0, 3.0, 3.0, 3.0]), 0.5).tolist() == [0, 1, 1, 0]
    assert top(np.array([0.1] * 10), 0.3).sum() == 3  # 0.3 * 10 is 2.9999999999999996
    assert np.isnan(top(np.array([1.0, 2.0]), 0.1)).all()
    assert np.isnan(top(np.array([1.0, np.nan, 2.0]), 0.5)).all()


def test_a_layer_that_does_not_see_the_picture_has_no_best_tokens():
    """All its scores are 0 at the last prompt row; the first tokens would be as good as any."""
    scores = np.random.default_rng(4).random((5, 3, 10))
    scores[0, 1] = 0.0  # a window too short for the picture
    scores[1:, 1] = np.nan  # and later the tokens are no longer in the cache
    seen = trajectory(scores)
    assert np.isnan(top(scores[0, 1], 0.3)).all()
    total, count = PPCIHeterogeneity().value(seen)
    assert count[0, 2, 0] == 5
    assert count[0, 1].tolist() == count[1, 1].tolist() == [0, 0, 0]
    assert not total[0, 1].any()
    assert np.isnan(LayerAgreement(prefill_layer=1).value(seen)[0][1]).all()
    assert np.isfinite(LayerAgreement(prefill_layer=1).value(seen)[0][2]).all()
    assert np.isnan(PrefillMass().value(seen)[0][1]).all()
    _, count = PrefillRecall().value(seen)
    assert not count[1].any()
    assert count[[0, 2], 1:].all()  # one twentieth of ten tokens is none


def test_a_set_larger_than_the_tokens_attended_to_is_undefined_unless_it_is_all_of_them():
    scores = np.array([0.0, 0.4, 0.0, 0.1])
    assert top(scores, 0.5).tolist() == [0, 1, 0, 1]
    assert np.isnan(top(scores, 0.75)).all()
    assert top(scores, 1.0).tolist() == [1, 1, 1, 1]
    assert np.isnan(top(np.zeros(4), 1.0)).all()


def test_one_set_for_all_heads_needs_more_tokens_than_every_head_alone():
    """Two heads look at one token each, so a layer needs two of ten."""
    heads = np.stack([one_hot(10, 2), one_hot(10, 7)])
    for head in heads:
        assert last_row(Coverage(), only_image(head.tolist()), KINDS)[IMAGE][3] == pytest.approx(
            0.1
        )
    scores = np.tile(heads.mean(0), (4, 1, 1))
    found = SharedCoverage().value(trajectory(scores))[0]
    assert found[0, 0] == pytest.approx([0.1, 0.2, 0.2, 0.2, 0.2])
    assert SharedSparsity().value(trajectory(scores))[0] == pytest.approx([0.8])


def test_a_token_is_dispensable_only_if_no_step_needs_it():
    scores = np.zeros((11, 1, 10))
    for step in range(1, 11):
        scores[step, 0, step - 1] = 1.0  # every step looks at one token, each at another
    assert SharedSparsity().value(trajectory(scores[:6]))[0] == pytest.approx([0.5])
    assert SharedSparsity().value(trajectory(scores))[0] == pytest.approx([0.0])
    assert np.isnan(SharedSparsity().value(trajectory(scores[:1]))[0]).all()


def test_a_core_is_chosen_among_the_tokens_that_are_held():
    secondaries, fractions = (0.3, 0.5, 1.0), (0.1, 0.3, 0.6)
    scores = np.random.default_rng(5).random((7, 2, 20)) ** 4
    scores[:, 1] = scores[::-1, 0]
    statistic = HeldCoreMass(secondaries, fractions, ages=4)
    total, count = statistic.value(trajectory(scores))
    slow = reference.held_core_mass(scores, secondaries, fractions, 4)
    assert total / count == pytest.approx(slow, rel=1e-5)
    # with all tokens held it is the core of `core_hit_rate`
    free, counted = CoreHitRate(fractions=fractions, ages=4).value(trajectory(scores))
    assert (total / count)[:, :, 2] == pytest.approx((free / counted)[..., 1], rel=1e-5)
    assert ((total / count)[:, 0, 0] < (total / count)[:, 0, 2]).all()
    blind = scores.copy()
    blind[0, 1] = 0.0
    _, count = statistic.value(trajectory(blind))
    assert not count[1].any()
    assert (count[0] > 0).all()


def test_overlap_of_independent_random_sets_is_p():
    scores = np.random.default_rng(0).random((40, 2, 300))
    for statistic in (PPCIContinuity(), PPCIHeterogeneity()):
        total, count = statistic.value(trajectory(scores))
        other = (
            np.arange(2) != np.arange(2)[:, None]
            if statistic.name == "ppci_heterogeneity"
            else slice(None)
        )
        mean = total[other].reshape(-1, 3).sum(0) / count[other].reshape(-1, 3).sum(0)
        assert mean == pytest.approx([0.1, 0.3, 0.5], abs=0.02), statistic.name


def test_a_picture_looked_at_always_in_the_same_way_overlaps_fully():
    scores = np.broadcast_to(np.arange(10.0), (6, 2, 10))
    total, count = PPCIContinuity().value(trajectory(scores))
    assert total[:, :4] == pytest.approx(count[:, :4])
    assert count[0, :, 0].tolist()[:6] == [4, 3, 2, 1, 0, 0]
    prefill, _ = PPCIPrefill().value(trajectory(scores))
    assert np.isnan(prefill[:, 0]).all()
    assert (prefill[:, 1:] == 1).all()


def test_a_core_of_age_zero_is_the_true_core_and_catches_all_it_can():
    scores = np.random.default_rng(1).random((12, 1, 20))
    total, count = CoreHitRate().value(trajectory(scores))
    mean = total[:, 0] / count[:, 0]
    assert mean[0, :, 0] == pytest.approx([1, 1, 1])
    assert np.all(mean[0, :, 1] >= (total[:, 1:5] / count[:, 1:5])[0, :, :, 1])


def test_keeping_every_token_recalls_everything():
    scores = np.random.default_rng(2).random((8, 3, 20))
    total, count = PrefillRecall().value(trajectory(scores))
    assert (total / count)[:, -1] == pytest.approx(np.ones((3, 2)))
    assert PrefillMass().value(trajectory(scores))[0][:, -1] == pytest.approx(np.ones(3))


def test_persistence_is_the_slope_of_the_image_mass():
    scores = np.ones((6, 1, 4)) * (0.2 - 0.01 * np.arange(-1, 5))[:, None, None]
    slope, per_token, relative = ImagePersistence().value(trajectory(scores))[0][0]
    assert slope == pytest.approx(-0.04)
    assert per_token == pytest.approx(-0.01)
    assert relative == pytest.approx(-0.04 / scores[1:].sum(-1).mean())


def test_steps_that_did_not_see_every_image_token_have_no_top_set():
    scores = np.random.default_rng(3).random((6, 1, 10))
    scores[3, 0, 2] = np.nan
    _, count = PPCIContinuity().value(trajectory(scores))
    assert count[0, 0, 0] == 2  # of the pairs 1-2, 2-3, 3-4, 4-5


def test_spatial_entropy_counts_places():
    picture = np.zeros((6, 6))
    picture[1, 1] = picture[1, 2] = 1.0
    assert entropy_of_places(picture) == pytest.approx(0)
    picture[4, 4] = picture[5, 5] = 1.0  # touching corners are one place
    assert entropy_of_places(picture) == pytest.approx(math.log(2))
    assert math.isnan(entropy_of_places(np.zeros((4, 4))))


def test_spatial_entropy_goes_by_rows_and_columns_not_by_the_order_of_tokens():
    """Two tiles of 2 x 2 side by side, a newline token, then a coarse view of the whole image."""
    row = np.array([0, 0, 1, 1, 0, 0, 1, 1, -1, -1, -1])
    column = np.array([0, 1, 0, 1, 2, 3, 2, 3, -1, -1, -1])
    weights = np.zeros((1, 1, 11), np.float32)
    weights[0, 0, [1, 4, 8, 9]] = 0.25  # neighbours across the border of the tiles: one place
    image, frame = np.zeros(11, int), np.full(11, -1)
    scores = weights.transpose(1, 0, 2)
    seen = Trajectory(scores, weights, image, row, column, frame, (0,))
    entropy, _ = SpatialEntropy().value(seen)
    assert entropy == pytest.approx(0)
    weights[0, 0, 1], weights[0, 0, 0] = 0.0, 0.25  # columns 0 and 2: two places
    entropy, _ = SpatialEntropy().value(seen)
    assert entropy == pytest.approx(math.log(2))


def test_every_statistic_says_what_it_is():
    for statistic in ALL:
        assert statistic.title, statistic.name
        assert statistic.source, statistic.name
        assert statistic.justifies, statistic.name
        assert type(statistic).__doc__, statistic.name
        names = {type(statistic).__name__: type(statistic)}
        assert eval(repr(statistic), names) == statistic  # noqa: S307


def test_an_unknown_statistic_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"no statistic 'mass'.*modality_mass"):
        select(["mass"])


def test_statistics_are_chosen_by_name_or_given_with_other_settings():
    chosen = select(["entropy", ThresholdSparsity(threshold=0.1)])
    assert [statistic.name for statistic in chosen] == ["entropy", "threshold_sparsity"]
    assert select(None) == ALL


def seen_frames(scores: np.ndarray, frame: list[int], image: list[int] | None = None) -> Trajectory:
    """From (steps, layers, image tokens) and the frame of each token."""
    none = np.full(scores.shape[-1], -1)
    last = np.repeat(scores[0][:, None], 2, axis=1)
    numbers = np.zeros(scores.shape[-1], int) if image is None else np.array(image)
    layers = tuple(range(scores.shape[1]))
    return Trajectory(scores.astype(np.float32), last, numbers, none, none, np.array(frame), layers)


def test_frame_mass_sums_each_frame_and_leaves_out_what_belongs_to_none():
    scores = np.array([[[0.1, 0.2, 0.3, 0.05, 0.15]]])
    mass, _ = FrameMass().value(seen_frames(scores, [0, 0, 1, 1, -1]))
    assert mass[0, 0] == pytest.approx([0.3, 0.35])
    gone = np.array([[[0.1, 0.2, np.nan, np.nan, 0.15]]])
    mass, _ = FrameMass().value(seen_frames(gone, [0, 0, 1, 1, -1]))
    assert mass[0, 0] == pytest.approx([0.3, 0.0])
    mass, _ = FrameMass().value(seen_frames(np.full((1, 1, 2), np.nan), [0, 1]))
    assert np.isnan(mass).all()


def test_frame_cores_overlap_by_place_and_only_within_one_video():
    frames = [[4.0, 3, 2, 1], [4.0, 1, 3, 2], [1.0, 2, 3, 4]]  # best two: {0, 1}, {0, 2}, {2, 3}
    scores = np.concatenate(frames)[None, None]
    frame = np.repeat([0, 1, 2], 4).tolist()
    statistic = FrameCoreOverlap(lags=(1, 2, 3), fractions=(0.5,))
    sums, counts = statistic.value(seen_frames(scores, frame))
    assert sums[0, :, 0].tolist() == [1.0, 0.0, 0.0]  # 1/2 and 1/2; nothing; no such pair
    assert counts[0, :, 0].tolist() == [2, 1, 0]
    _, counts = statistic.value(seen_frames(scores, [0, 0, 0, 0] * 3, np.repeat([0, 1, 2], 4)))
    assert not counts.any()


def test_time_distance_counts_frames_back_within_the_video():
    kinds = "siiiit"
    info = tokens(kinds)
    info.frame[1:5] = torch.tensor([0, 0, 1, 2], dtype=torch.int16)
    weights = torch.zeros(1, 6, 6)
    weights[0, 4] = torch.tensor([0.4, 0.1, 0.1, 0.2, 0.2, 0.0])
    rows = QueryRows(
        info,
        info.map(lambda t: t[None]),
        torch.zeros(1, 6, 3),
        torch.zeros(1, 6, 0),
        (),
        {},
        given=weights,
    )
    value = TimeDistance().value(rows)[0]
    assert float(value[4]) == pytest.approx((0.2 * 2 + 0.2 * 1) / 0.6)
    assert value[[0, 5]].isnan().all()
