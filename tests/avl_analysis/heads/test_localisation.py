"""Attention on regions: by eye, and over a recording against loops."""

from __future__ import annotations

import numpy as np
import pytest

from avl_analysis.capture.recorder import record
from avl_analysis.corpus.regions import tokens_in_boxes
from avl_analysis.errors import InputError
from avl_analysis.heads.localisation import in_region, localise, region_lift
from tests import tiny
from tests.avl_analysis.recorded import close, model


@pytest.fixture(scope="module")
def recording():
    llava = model(kv_heads=2)
    with record(llava, statistics=[], maps="heads") as recording:
        llava.generate(
            **tiny.inputs(llava, [5, 3], images=[1, 2]), max_new_tokens=4, do_sample=False
        )
    return recording


def test_uniform_attention_has_a_lift_of_one_everywhere():
    assert region_lift(np.full((2, 10), 0.03), [0, 3, 7]) == pytest.approx([1, 1])


def test_attention_only_on_the_region_has_the_largest_lift_there_is():
    weights = np.array([0.0, 0.2, 0.0, 0.1, 0.0, np.nan, 0.0, 0.0, 0.0, 0.0])
    assert region_lift(weights, [1, 3]) == pytest.approx(5)
    assert region_lift(weights, [0, 2]) == 0
    assert np.isnan(region_lift(np.zeros(4), [1]))


def test_a_head_that_does_not_look_at_the_picture_has_no_lift():
    """In float16 these weights would partly vanish, and the lift be that of what is left."""
    weights = np.array([[2e-8, 3e-8, 9e-8, 1e-8], [0.02, 0.03, 0.09, 0.01]])
    faint, clear = region_lift(weights, [2])
    assert np.isnan(faint)
    assert clear == pytest.approx(0.09 / 0.15 * 4)


def test_maps_of_heads_are_kept_as_precise_as_maps_of_layers(recording):
    heads, mean = recording["image_score_heads"], recording["image_score"]
    assert heads.dtype == np.float32
    close(heads.mean("head"), mean, 1e-6)


def test_a_hit_is_the_most_attended_token_inside():
    weights = np.array([[0.1, 0.5, np.nan], [0.4, 0.2, np.nan]])
    assert in_region(weights, [1]).tolist() == [1, 0]


def test_tokens_count_as_inside_by_the_share_of_their_area_under_a_box():
    places = np.array([[x, y, x + 10, y + 10] for y in (0, 10) for x in (0, 10)], float)
    places = np.vstack([places, [[np.nan] * 4]])
    assert tokens_in_boxes(places, [[0, 0, 15, 10]]) == [0, 1]
    assert tokens_in_boxes(places, [[0, 0, 14, 10]]) == [0]
    assert tokens_in_boxes(places, [[0, 0, 10, 10, "cat"], [12, 12, 20, 20]]) == [0, 3]
    assert tokens_in_boxes(places, []) == []


def test_localisation_of_a_recording_is_the_mean_over_the_words_with_a_region(recording):
    regions = {"000000": {0: [1, 2], 2: [5]}, "000001": {1: [20, 21, 30], 3: []}}
    found = localise(recording, regions)
    maps = recording["image_score_heads"].values.astype(float)
    for b, (tokens, rows) in enumerate(((16, regions["000000"]), (32, {1: [20, 21, 30]}))):
        for layer, head in np.ndindex(3, 4):
            lift, hits = [], []
            for step, inside in rows.items():
                a = maps[b, step, layer, head, :tokens]
                lift.append(sum(a[i] for i in inside) / a.sum() / (len(inside) / tokens))
                hits.append(max(range(tokens), key=lambda i, a=a: a[i]) in inside)
            close(found["lift"][b, layer, head], np.mean(lift), 1e-4)
            close(found["visual_head_score"][b, layer, head], np.mean(hits))
    assert found["rows"].values.tolist() == [2, 1]


def test_samples_without_a_region_are_undefined(recording):
    found = localise(recording, {"000000": {0: [1]}})
    assert np.isnan(found["lift"][1]).all()
    assert found["rows"].values.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({"nobody": {0: [1]}}, "not recorded: nobody"),
        ({"000000": {9: [1]}}, r"steps 0 to 3 and image tokens 0 to 15, got a region at step 9"),
        ({"000000": {0: [16]}}, "tokens 16 to 16"),
    ],
)
def test_regions_that_do_not_exist_are_refused(recording, regions, message):
    with pytest.raises(InputError, match=message):
        localise(recording, regions)


def test_localisation_says_which_maps_it_needs():
    llava = model(kv_heads=2)
    with record(llava, statistics=[]) as recording:
        llava(**tiny.inputs(llava, [5]))
    with pytest.raises(InputError, match="maps='heads'"):
        localise(recording, {})
