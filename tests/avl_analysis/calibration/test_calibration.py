"""Calibration: worked curves give the numbers one reads off by eye, and the whole way runs on a
tiny model.
"""

import json

import numpy as np
import pytest
import xarray as xr

import avl
from avl_analysis.calibration.calibrate import Curves, LayerCurves, calibrate, choose, kept, measure
from avl_analysis.calibration.read_curves import MAX_REFRESH, SHARES
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.errors import InputError
from avl_analysis.intervals import mean_interval, mean_intervals
from avl_analysis.models.loading import VLM
from tests.avl_analysis import shared

NOISE = np.array([-0.01, 0.0, 0.01])  # three samples


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return shared.vlm()


def _curves(secondary=None, core=None, text=None, agreement=None) -> Curves:
    """Three samples around the given curves; what is left out catches everything."""
    shares, ages = np.array(SHARES), np.arange(MAX_REFRESH)
    secondary = np.ones(20) if secondary is None else secondary
    core = np.ones((MAX_REFRESH, 20)) if core is None else core
    text = np.full(20, np.nan) if text is None else text

    def spread(values: np.ndarray) -> np.ndarray:
        return np.stack([np.clip(values + noise, 0, 1) for noise in NOISE])

    labels = {"sample": list("abc")}
    layered = None
    if agreement is not None:
        layered = xr.DataArray(
            spread(agreement),
            dims=("sample", "layer", "p"),
            coords={**labels, "layer": [2, 3], "p": shares},
        )
    return Curves(
        xr.DataArray(
            spread(secondary), dims=("sample", "secondary"), coords={**labels, "secondary": shares}
        ),
        xr.DataArray(
            spread(core),
            dims=("sample", "core_age", "core"),
            coords={**labels, "core_age": ages, "core": shares},
        ),
        xr.DataArray(spread(text), dims=("sample", "share"), coords={**labels, "share": shares}),
        layered,
    )


def _reached(at: float, before: float = 0.5, after: float = 0.98) -> np.ndarray:
    """A curve that jumps at one share."""
    return np.where(np.array(SHARES) >= at - 1e-9, after, before)


def test_secondary_is_the_smallest_share_whose_lower_bound_reaches_the_target() -> None:
    policy, choices = choose(_curves(secondary=_reached(0.4)), 0.95)
    assert policy.secondary == 0.4
    assert choices[0].reason.startswith(
        "secondary = 0.4 is the smallest share that keeps 95% of the image attention"
    )
    assert "at 0.35 it is 0.500" in choices[0].reason
    low = choices[0].curve.low[SHARES.index(0.4)]
    assert 0.95 <= low < 0.98
    stricter, _ = choose(
        _curves(secondary=_reached(0.4)), 0.975
    )  # the mean reaches it, the lower bound does not
    assert stricter.secondary == 1.0


def test_a_mean_above_the_target_is_not_enough() -> None:
    curve = _reached(0.6, before=0.955)
    policy, _ = choose(_curves(secondary=curve), 0.95)  # 0.955 +- 0.01: the lower bound is below
    assert policy.secondary == 0.6


def test_core_and_refresh_are_the_pair_that_reads_fewest_keys() -> None:
    # a core of 0.3 is good for 4 steps, one of 0.2 for 1 step, smaller ones never
    core = np.full((MAX_REFRESH, 20), 0.5)
    core[:5, np.array(SHARES) >= 0.299] = 0.98
    core[:2, np.array(SHARES) >= 0.199] = 0.98
    policy, choices = choose(_curves(secondary=_reached(0.5), core=core), 0.95)
    # 0.3 for K = 5: (0.5 + 4 * 0.3) / 5 = 0.34; 0.2 for K = 2: (0.5 + 0.2) / 2 = 0.35
    assert (policy.core, policy.refresh_every) == (0.3, 5)
    assert "reads 0.34 of the image tokens per step" in choices[1].reason
    assert choices[2].curve.mean[4] == pytest.approx(0.98)
    assert choices[2].curve.mean[5] == pytest.approx(0.5)


def test_without_a_core_that_lasts_one_step_every_step_attends_to_all_held() -> None:
    core = np.full((MAX_REFRESH, 20), 0.5)
    core[0] = 0.98
    policy, choices = choose(_curves(secondary=_reached(0.5), core=core), 0.95)
    assert (policy.core, policy.refresh_every) == (None, 0)
    assert "every step attends to all that is held" in choices[1].reason


def test_a_core_is_never_larger_than_what_is_held() -> None:
    core = np.full((MAX_REFRESH, 20), 0.5)
    core[:, np.array(SHARES) >= 0.799] = 0.98
    policy, _ = choose(_curves(secondary=_reached(0.4), core=core), 0.95)
    assert policy.core is None


def _layered(secondary: list[np.ndarray], core: list[np.ndarray], weight: list[float]) -> Curves:
    """Curves of several layers around the given ones, and of all of them together."""
    labels = {"sample": list("abc"), "layer": list(range(len(secondary)))}

    def spread(values: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.clip(np.stack(values) + noise, 0, 1) for noise in NOISE])

    layers = LayerCurves(
        xr.DataArray(
            spread(secondary),
            dims=("sample", "layer", "secondary"),
            coords={**labels, "secondary": list(SHARES)},
        ),
        xr.DataArray(
            spread(core),
            dims=("sample", "layer", "core_age", "core"),
            coords={**labels, "core_age": range(MAX_REFRESH), "core": list(SHARES)},
        ),
        xr.DataArray(np.tile(weight, (3, 1)), dims=("sample", "layer"), coords=labels),
    )
    together = _curves()
    together.layers = layers
    return together


def _lasting(share: float, steps: int) -> np.ndarray:
    """Cores of this size and larger are good until they are `steps` old."""
    core = np.full((MAX_REFRESH, 20), 0.5)
    core[: steps + 1, np.array(SHARES) >= share - 1e-9] = 0.98
    return core


def test_every_layer_gets_the_share_and_core_it_needs() -> None:
    curves = _layered(
        [_reached(0.3), _reached(0.8)], [_lasting(0.1, 9), _lasting(0.4, 4)], [1.0, 3.0]
    )
    policy, choices = choose(curves, 0.95, per_layer=True)
    assert policy.secondary == (0.3, 0.8)
    # K = 5: (0.55 + 4 * 0.25) / 5 = 0.31; K = 10 with the second layer whole: (0.55 + 9 * 0.45) /
    # 10 = 0.46
    assert (policy.core, policy.refresh_every) == ((0.1, 0.4), 5)
    assert [(c.setting, c.place) for c in choices[:4]] == [
        ("secondary", "layer 0"),
        ("secondary", "layer 1"),
        ("core", "layer 0"),
        ("core", "layer 1"),
    ]
    assert "reads 0.31 of the image tokens" in choices[4].reason
    found = kept(curves, policy)
    assert found["secondary"]["mean"] == pytest.approx(0.98, abs=0.011)
    lopsided = avl.AdaptivePolicy(secondary=(0.3, 0.5), core=(0.1, 0.1), refresh_every=5, text=None)
    assert kept(curves, lopsided)["secondary"]["mean"] == pytest.approx(
        (0.98 + 3 * 0.5) / 4, abs=0.01
    )
    assert kept(curves, lopsided)["core"]["mean"] == pytest.approx((0.98 + 3 * 0.5) / 4, abs=0.01)


def test_a_layer_whose_cores_age_too_fast_attends_to_all_it_holds() -> None:
    curves = _layered(
        [_reached(0.5), _reached(0.5)], [_lasting(0.1, 31), _lasting(0.5, 0)], [1.0, 1.0]
    )
    policy, choices = choose(curves, 0.95, per_layer=True)
    assert policy.core == (0.1, 0.5)
    assert policy.refresh_every == MAX_REFRESH
    assert "attends to all it holds" in choices[3].reason
    neither = _layered([_reached(0.5)] * 2, [_lasting(0.5, 0)] * 2, [1.0, 1.0])
    assert (
        choose(neither, 0.95, per_layer=True)[0].core,
        choose(neither, 0.95, per_layer=True)[0].refresh_every,
    ) == (None, 0)
    with pytest.raises(InputError, match="of all layers together"):
        choose(_curves(), 0.95, per_layer=True)


def test_a_model_is_calibrated_layer_by_layer(vlm: VLM) -> None:
    policy, evidence = calibrate(vlm, shared.questions(9), 0.8, max_new_tokens=5, per_layer=True)
    assert isinstance(policy.secondary, tuple)
    assert len(policy.secondary) == 2
    assert [c.setting for c in evidence.choices] == ["secondary"] * 2 + ["core"] * 2 + [
        "refresh_every",
        "text",
    ]
    assert evidence.kept["secondary"]["n"] == 3
    assert evidence.measured["kv_filled_share"]["mean"] <= 1


def test_text_is_read_from_its_curve_and_stays_off_where_nothing_is_known() -> None:
    assert choose(_curves(text=_reached(0.6)), 0.95)[0].text == 0.6
    policy, choices = choose(_curves(), 0.95)
    assert policy.text is None
    assert "texts were too short" in choices[3].reason
    policy, choices = choose(_curves(text=np.full(20, 0.8)), 0.95)
    assert policy.text is None
    assert "less than 95%" in choices[3].reason


def test_the_prefill_filter_needs_every_later_layer_to_agree() -> None:
    agree = np.stack([_reached(0.5), _reached(0.7)])
    policy, _ = choose(_curves(secondary=_reached(0.4), agreement=agree), 0.95, prefill_layer=2)
    assert policy.prefill == 0.7
    policy, choices = choose(
        _curves(secondary=_reached(0.4), agreement=np.full((2, 20), 0.6)), 0.95, prefill_layer=2
    )
    assert policy.prefill is None
    assert "the filter stays off" in choices[4].reason
    above = choose(_curves(secondary=_reached(0.9), agreement=agree), 0.95, prefill_layer=2)[0]
    assert above.prefill == 0.9  # never less than what is held later


def test_what_a_policy_keeps_is_read_at_its_own_numbers() -> None:
    core = np.linspace(1, 0.5, MAX_REFRESH)[:, None] * np.ones(20)
    curves = _curves(secondary=np.array(SHARES), core=core, text=np.array(SHARES))
    found = kept(curves, avl.AdaptivePolicy(secondary=0.4, core=0.3, refresh_every=4, text=0.8))
    assert found["secondary"]["mean"] == pytest.approx(0.4)
    assert found["core"]["mean"] == pytest.approx(core[3, 0], abs=0.01)
    assert found["text"]["mean"] == pytest.approx(0.8)
    assert "core" not in kept(
        curves, avl.AdaptivePolicy(secondary=0.4, core=None, refresh_every=0, text=None)
    )


def test_layers_count_with_their_image_attention(vlm: VLM) -> None:
    samples = shared.questions(3)
    curves = measure(vlm, samples, max_new_tokens=5)
    from avl_analysis.statistics.prefill_recall import PrefillMass

    recording = record_samples(
        vlm, samples, max_new_tokens=5, statistics=["modality_mass", PrefillMass(SHARES)]
    )
    scores = recording["image_score"].isel(step=slice(1, None))
    first = recording["image_score"].isel(step=0)
    for i in range(3):
        at, now = first.isel(sample=i), scores.isel(sample=i).sum("step")
        best = {
            layer: np.argsort(-at.sel(layer=layer).values)[:8] for layer in (0, 1)
        }  # half of 16
        caught = sum(float(now.sel(layer=layer)[best[layer]].sum()) for layer in (0, 1))
        np.testing.assert_allclose(
            curves.secondary.isel(sample=i).sel(secondary=0.5), caught / float(now.sum()), rtol=1e-4
        )


def test_a_model_is_calibrated_verified_and_explained(vlm: VLM) -> None:
    told: list[str] = []
    samples = shared.questions(9)
    policy, evidence = calibrate(
        vlm,
        samples,
        0.8,
        max_new_tokens=5,
        progress=lambda what, done, total: told.append(f"{what} {done}/{total}"),
    )
    assert isinstance(policy, avl.AdaptivePolicy)
    assert [choice.setting for choice in evidence.choices] == [
        "secondary",
        "core",
        "refresh_every",
        "text",
    ]
    assert all(choice.reason for choice in evidence.choices)
    assert evidence.held_out == ("q2", "q5", "q8")
    assert not set(evidence.samples) & set(evidence.held_out)
    assert evidence.kept["secondary"]["n"] == 3
    assert evidence.holds in (True, False)
    assert 0 <= evidence.measured["agreement"]["mean"] <= 1
    assert evidence.measured["kv_filled_share"]["mean"] <= 1
    assert json.loads(json.dumps(evidence.to_dict(), allow_nan=False))["target"] == 0.8
    assert {line.split()[0] for line in told} == {"calibrating", "verifying", "comparing"}


def test_the_highest_target_keeps_everything(vlm: VLM) -> None:
    policy, evidence = calibrate(vlm, shared.questions(6), 0.9999999, max_new_tokens=4)
    assert policy.secondary == 1.0
    assert evidence.measured["agreement"]["mean"] > 0.9


@pytest.mark.parametrize(
    ("samples", "arguments", "message"),
    [
        (shared.questions(6), {"target": 1.0}, "between 0 and 1"),
        (shared.questions(2), {}, "verification one"),
        (shared.questions(6), {"max_new_tokens": 1}, "at least two tokens"),
        (
            [Sample(f"n{i}", (), "what is red?") for i in range(6)],
            {"max_new_tokens": 3},
            "0 of the samples have a picture",
        ),
        (shared.questions(6), {"prefill": True, "prefill_layer": 2}, "choose 1 to 1"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(vlm: VLM, samples, arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(vlm, samples, **arguments)


def test_many_intervals_at_once_are_those_taken_one_by_one() -> None:
    values = np.random.default_rng(0).normal(0, 1, (30, 4, 2))
    values[:10, 1, 1] = np.nan
    values[:, 3, 0] = np.nan
    mean, low, high, n = mean_intervals(values)
    for i in range(4):
        for j in range(2):
            one = mean_interval(values[:, i, j])
            assert n[i, j] == one.n
            np.testing.assert_allclose(
                [mean[i, j], low[i, j], high[i, j]], [one.mean, one.low, one.high], atol=0.05
            )
