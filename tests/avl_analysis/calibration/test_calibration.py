"""Calibration: worked curves give the numbers one reads off by eye, and the whole way runs on a
tiny model.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

import avl
from avl_analysis.calibration import calibrate as calibrating
from avl_analysis.calibration.calibrate import (
    Curves,
    Evidence,
    LayerCurves,
    calibrate,
    choose,
    kept,
    measure,
)
from avl_analysis.calibration.read_curves import MAX_REFRESH, SHARES
from avl_analysis.capture.raw_slices import BYTES
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.errors import InputError
from avl_analysis.models.loading import VLM
from tests.avl_analysis import shared

NOISE = np.array([-0.01, -0.005, 0.0, 0.005, 0.01])  # five samples
NAMES = list("abcde")


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return shared.vlm()


def _spread(values: np.ndarray) -> np.ndarray:
    """Five samples around some values, (samples, ...)."""
    return np.stack([np.clip(values + noise, 0, 1) for noise in NOISE])


def _for_every_held(core: np.ndarray) -> np.ndarray:
    """The same core curves, (..., ages, cores), whatever is held: (..., ages, held, cores)."""
    return np.repeat(core[..., None, :], len(SHARES), -2)


def _curves(secondary=None, core=None, text=None, agreement=None) -> Curves:
    """Five samples around the given curves; what is left out catches everything. `core`:
    (ages, cores), or (ages, held, cores).
    """
    shares, ages = np.array(SHARES), np.arange(MAX_REFRESH)
    secondary = np.ones(20) if secondary is None else secondary
    core = np.ones((MAX_REFRESH, 20)) if core is None else core
    core = core if core.ndim == 3 else _for_every_held(core)
    text = np.full(20, np.nan) if text is None else text
    labels = {"sample": NAMES}
    layered = None
    if agreement is not None:
        layered = xr.DataArray(
            _spread(agreement),
            dims=("sample", "layer", "p"),
            coords={**labels, "layer": [2, 3], "p": shares},
        )
    return Curves(
        xr.DataArray(
            _spread(secondary), dims=("sample", "secondary"), coords={**labels, "secondary": shares}
        ),
        xr.DataArray(
            _spread(core),
            dims=("sample", "core_age", "secondary", "core"),
            coords={**labels, "core_age": ages, "secondary": shares, "core": shares},
        ),
        xr.DataArray(_spread(text), dims=("sample", "share"), coords={**labels, "share": shares}),
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


def test_a_core_is_read_from_the_curve_of_what_is_held() -> None:
    """Chosen among all tokens a core of 0.2 would do; among the half that is held none does."""
    core = np.full((MAX_REFRESH, 20, 20), 0.5)
    core[:, SHARES.index(0.8) :, SHARES.index(0.2) :] = 0.98
    policy, _ = choose(_curves(secondary=_reached(0.5), core=core), 0.95)
    assert (policy.secondary, policy.core, policy.refresh_every) == (0.5, None, 0)
    policy, _ = choose(_curves(secondary=_reached(0.8), core=core), 0.95)
    assert (policy.secondary, policy.core, policy.refresh_every) == (0.8, 0.2, MAX_REFRESH)


def _layered(secondary: list[np.ndarray], core: list[np.ndarray], weight: list[float]) -> Curves:
    """Curves of several layers around the given ones, and of all of them together."""
    labels = {"sample": NAMES, "layer": list(range(len(secondary)))}
    layers = LayerCurves(
        xr.DataArray(
            _spread(np.stack(secondary)),
            dims=("sample", "layer", "secondary"),
            coords={**labels, "secondary": list(SHARES)},
        ),
        xr.DataArray(
            _spread(_for_every_held(np.stack(core))),
            dims=("sample", "layer", "core_age", "secondary", "core"),
            coords={
                **labels,
                "core_age": range(MAX_REFRESH),
                "secondary": list(SHARES),
                "core": list(SHARES),
            },
        ),
        xr.DataArray(np.tile(weight, (5, 1)), dims=("sample", "layer"), coords=labels),
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
    shared_share = avl.AdaptivePolicy(secondary=0.5, core=(0.1, 0.1), refresh_every=5, text=None)
    assert kept(curves, shared_share)["core"] == kept(curves, lopsided)["core"]


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


def _calibrated(vlm: VLM, *arguments, **options):
    """Six questions to choose by and three to verify with, which is few."""
    with pytest.warns(UserWarning, match="only 6 samples tell about decoding: with fewer than 16"):
        return calibrate(vlm, shared.questions(9), *arguments, **options)


def test_a_model_is_calibrated_layer_by_layer(vlm: VLM) -> None:
    policy, evidence = _calibrated(vlm, 0.8, max_new_tokens=5, per_layer=True)
    assert isinstance(policy.secondary, tuple)
    assert len(policy.secondary) == 2
    assert [c.setting for c in evidence.choices] == ["secondary"] * 2 + ["core"] * 2 + [
        "refresh_every",
        "text",
    ]
    assert evidence.kept["secondary"]["n"] == 3
    assert evidence.measured["kv_filled_share"]["mean"] <= 1


def test_text_is_read_from_its_curve_and_stays_off_where_nothing_is_known() -> None:
    growing = _reached(0.6) - np.linspace(0.001, 0, 20)
    assert choose(_curves(text=growing), 0.95)[0].text == 0.6
    policy, choices = choose(_curves(), 0.95)
    assert policy.text is None
    assert "texts were too short" in choices[3].reason
    policy, choices = choose(_curves(text=np.full(20, 0.8)), 0.95)
    assert policy.text is None
    assert "less than 95%" in choices[3].reason


def test_of_shares_that_short_texts_cannot_tell_apart_the_largest_is_taken() -> None:
    """Twenty keys are always held, so on short texts shares up to 0.3 are one policy."""
    curve = np.where(np.array(SHARES) <= 0.3, 0.96, 0.99)
    policy, choices = choose(_curves(text=curve), 0.95)
    assert policy.text == 0.3
    assert "the largest share that keeps as much as 0.05 in every sample" in choices[3].reason


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
    policy, evidence = _calibrated(
        vlm,
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
    assert evidence.holds is None  # three held-out questions have no interval
    assert evidence.questions == "chosen by 6 questions; verified with 3 questions"
    assert len(evidence.warnings) == 1
    assert 0 <= evidence.measured["agreement"]["mean"] <= 1
    assert evidence.measured["kv_filled_share"]["mean"] <= 1
    assert json.loads(json.dumps(evidence.to_dict(), allow_nan=False))["target"] == 0.8
    assert {line.split()[0] for line in told} == {"calibrating", "verifying", "comparing"}


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ([(0.96, 0.99), (0.95, 0.97)], True),
        ([(0.96, 0.99), (0.94, 0.97)], None),  # the mean may well be above
        ([(0.96, 0.99), (0.90, 0.94)], False),
        ([(0.96, 0.99), (None, None)], None),
        ([], None),
    ],
)
def test_a_target_holds_by_the_bounds_of_intervals_not_by_means(bounds, verdict) -> None:
    kept_ = {
        str(i): {"mean": 0.96, "low": low, "high": high, "n": 9}
        for i, (low, high) in enumerate(bounds)
    }
    assert Evidence(0.95, "m", ("a",), ("b",), (), kept_).holds is verdict


def test_held_out_questions_that_were_calibrated_on_are_refused(vlm: VLM) -> None:
    samples = shared.questions(8)
    with pytest.raises(InputError, match="8 question\\(s\\) are to be calibrated on and verified"):
        calibrate(vlm, samples, held_out=samples)
    renamed = [replace(samples[3], id="another name")]
    with pytest.raises(InputError, match="for example q3"):
        calibrate(vlm, samples, held_out=renamed)


def test_the_highest_target_keeps_everything(vlm: VLM) -> None:
    policy, evidence = _calibrated(vlm, 0.9999999, max_new_tokens=4)
    assert policy.secondary == 1.0
    assert evidence.measured["agreement"]["mean"] > 0.9


@pytest.mark.parametrize(
    ("samples", "arguments", "message"),
    [
        (shared.questions(9), {"target": 1.0}, "between 0 and 1"),
        (shared.questions(6), {}, "4 samples to calibrate on and 2 to verify with"),
        (shared.questions(9), {"max_new_tokens": 1}, "at least two tokens"),
        (
            [Sample(f"n{i}", (), "what is red?" + i * " red") for i in range(9)],
            {"max_new_tokens": 3},
            "0 of the samples have a picture",
        ),
        (shared.questions(9), {"prefill": True, "prefill_layer": 2}, "choose 1 to 1"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(vlm: VLM, samples, arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(vlm, samples, **arguments)


def test_batches_whose_weights_take_too_much_memory_are_halved_and_give_the_same_curves(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = shared.questions(3)
    whole = measure(vlm, samples, 3, batch_size=3)
    layers, heads, keys = 2, 4, 40
    one = layers * heads * keys * BYTES * 3  # the rows of one sample, which has fewer keys
    batches: list[int] = []

    def limited(*arguments, **options):  # type: ignore[no-untyped-def]
        batches.append(options["batch_size"])
        return record_samples(*arguments, **options, limit=limit[0])

    limit = [one]
    monkeypatch.setattr(calibrating, "record_samples", limited)
    halved = measure(vlm, samples, 3, batch_size=3)
    assert batches[0] == 3
    assert batches[-1] == 1
    for name in ("secondary", "core", "text"):
        np.testing.assert_allclose(
            getattr(halved, name).values, getattr(whole, name).values, atol=1e-6
        )
    limit[0] = 100
    with pytest.raises(InputError, match="choose a smaller max_new_tokens"):
        measure(vlm, samples, 3, batch_size=3)
