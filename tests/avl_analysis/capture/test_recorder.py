"""Recording watches and never touches: same logits, same weights as eager attention, every sample
apart.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import avl
from avl.attention import AttentionCall, attention_weights
from avl.buffer import KeyBuffer
from avl.decode_step import DecodeStep
from avl.hooks import HookError, Observer, attached
from avl.kernels import backend, prompt_rows
from avl_analysis.capture import reduce_prompt, softmax
from avl_analysis.capture.recorder import record
from avl_analysis.capture.replay import replay
from avl_analysis.errors import InputError
from avl_analysis.recordings.recording import merge
from avl_analysis.recordings.schema import RecordingError
from tests import tiny
from tests.avl_analysis.recorded import CASES, case_inputs, close, model, run


@pytest.fixture(scope="module")
def sdpa():
    return model(kv_heads=2, attn="sdpa")


@pytest.fixture(scope="module")
def eager():
    return model(kv_heads=2)


def generate(llava, batch, steps=4, **options):
    return llava.generate(**batch, max_new_tokens=steps + 1, do_sample=False, **options)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["left-padded batch", "several pictures", "no picture"])
def test_logits_with_recording_are_bit_identical_to_logits_without(case, attn):
    llava = model(kv_heads=2, attn=attn)
    batch = tiny.inputs(llava, **CASES[case])
    options = {"return_dict_in_generate": True, "output_logits": True}
    plain = generate(llava, batch, **options)
    with record(llava, keep="attention") as recording:
        prompt = llava(**batch).logits
        watched = generate(llava, batch, **options)
    assert torch.equal(prompt, llava(**batch).logits)
    assert torch.equal(plain.sequences, watched.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, watched.logits, strict=True))
    assert len(recording) == 2 * len(batch["input_ids"])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_raw_slices_equal_what_eager_attention_returns(kv_heads, case):
    llava = model(kv_heads=kv_heads)
    batch = case_inputs(llava, case)
    recording, samples = run(llava, batch, statistics=["modality_mass"], keep="attention")
    for b, sample in enumerate(samples):
        kept, n = recording["attention"][b].values, sample.n
        assert np.abs(kept[:, :, :n, :n] - sample.prompt).max() < 1e-5
        for t, row in enumerate(sample.steps):
            assert np.abs(kept[:, :, n + t, : n + t + 1] - row).max() < 1e-5
        visible = recording.data["attention"]["visible"][b].values[:, :, : n + len(sample.steps)]
        assert (visible == np.tril(np.ones(visible.shape[-2:]))[None, None]).all()


def test_chosen_layers_heads_and_queries_are_the_same_numbers_as_in_the_whole(eager):
    batch = tiny.inputs(eager, [7, 4])
    with record(eager, statistics=[], keep="attention") as whole:
        generate(eager, batch)
    for queries, wanted in {
        "last": lambda n, steps: [n - 1],
        "steps": lambda n, steps: range(n - 1, n + steps),
        "decode": lambda n, steps: range(n, n + steps),
        "prompt": lambda n, steps: range(n),
        (3, 5): lambda n, steps: [3, 5],
    }.items():
        with record(
            eager, statistics=[], keep="attention", layers=[2, 1], heads=[3, 0], queries=queries
        ) as part:
            generate(eager, batch)
        assert part["attention"]["layer"].values.tolist() == [1, 2]
        assert part["attention"]["head"].values.tolist() == [0, 3]
        for b in range(2):
            n = int(whole.tokens["prompt_length"][b])
            expected = (
                whole["attention"][b]
                .sel(layer=[1, 2], head=[0, 3])
                .values[:, :, list(wanted(n, 4))]
            )
            found = part["attention"][b].values[:, :, : expected.shape[2]]
            assert np.array_equal(found, expected, equal_nan=True)


def test_recording_under_sdpa_gives_the_same_statistics_as_under_eager_attention(sdpa, eager):
    batch = tiny.inputs(sdpa, [9, 4])
    sdpa.load_state_dict(eager.state_dict())
    recordings = []
    for llava in (sdpa, eager):
        with record(llava) as recording:
            generate(llava, batch)
        recordings.append(recording)
    for name in (
        "modality_mass",
        "accumulated_score",
        "threshold_sparsity",
        "text_age_profile",
        "entropy_prefill",
    ):
        close(recordings[0][name], recordings[1][name], 1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_in_a_padded_batch_has_the_numbers_it_has_alone(eager, side):
    batch = tiny.inputs(eager, [9, 4, 6], images=[1, 2, 0])
    if side == "right":
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.stack(
                [
                    torch.cat([row[m.bool()], row[~m.bool()]])
                    for row, m in zip(batch[name], batch["attention_mask"], strict=True)
                ]
            )
    with record(eager, keep="attention") as together:
        eager(**batch)
    pictures = iter(batch["pixel_values"].split([1, 2]))
    for b, images in enumerate((1, 2, 0)):
        alone_batch = {
            "input_ids": batch["input_ids"][b][batch["attention_mask"][b].bool()][None],
            "attention_mask": torch.ones(
                1, int(batch["attention_mask"][b].sum()), dtype=torch.long
            ),
        }
        if images:
            alone_batch["pixel_values"] = next(pictures)
        with record(eager, keep="attention") as alone:
            eager(**alone_batch)
        for name in alone.names:
            if name in ("text_age_fit", "image_score_last", "image_score"):
                continue  # the fit amplifies rounding; padded along the image tokens
            one, other = alone[name][0].values, together[name][b].values
            close(other[tuple(slice(size) for size in one.shape)], one, 1e-4)


def test_blocks_and_heads_split_in_any_way_give_the_same_numbers(eager, monkeypatch):
    batch = tiny.inputs(eager, [9, 30], images=[1, 2])
    with record(eager, keep="attention") as whole:
        generate(eager, batch, steps=1)
    for size in (4 * 200, 4 * 2000):
        monkeypatch.setattr(softmax, "BLOCK_BYTES", (size, size))
        monkeypatch.setattr(softmax, "COMPILED_BLOCK_BYTES", size)
        monkeypatch.setattr(reduce_prompt, "COPIED_BYTES", (size, size))
        with record(eager, keep="attention") as split:
            generate(eager, batch, steps=1)
        for name in whole.names:
            close(split[name], whole[name], 1e-3 if name == "text_age_fit" else 1e-5)


@pytest.mark.skipif(not backend.compiled_available(), reason="numba is not installed")
@pytest.mark.parametrize("case", CASES)
def test_both_versions_of_the_kernels_record_the_same_on_any_number_of_threads(
    case, eager, monkeypatch
):
    batch = tiny.inputs(eager, **CASES[case])
    with record(eager, keep="attention") as compiled:
        generate(eager, batch, steps=2)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with record(eager, keep="attention") as threads:
            generate(eager, batch, steps=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for module in (prompt_rows, softmax, reduce_prompt):
        monkeypatch.setattr(module, "backend_for", lambda device: "torch")
    with record(eager, keep="attention") as plain:
        generate(eager, batch, steps=2)
    for name in plain.names:
        close(threads[name], compiled[name], 1e-6)
        close(plain[name], compiled[name], 1e-3 if name == "text_age_fit" else 1e-5)


def test_statistics_replayed_from_raw_slices_equal_the_live_ones(eager):
    batch = tiny.inputs(eager, [9, 4, 3], images=[1, 2, 0])
    with record(eager, keep="attention") as live:
        generate(eager, batch, steps=6)
    again = replay(live)
    missing = {"key_redundancy", "value_weighted_mass", "value_weighted_mass_prefill"}
    assert set(live.names) == set(again.names) | missing
    for name in again.names:
        close(again[name], live[name], 1e-4 if name == "text_age_fit" else 1e-6)
    with pytest.raises(InputError, match="keys and values"):
        replay(live, ["key_redundancy"])
    with record(eager, keep="attention", heads=[0]) as part:
        generate(eager, batch)
    with pytest.raises(InputError, match="all heads"):
        replay(part)
    with record(eager, keep="attention", queries="last") as part:
        generate(eager, batch)
    with pytest.raises(InputError, match="all queries"):
        replay(part)


def test_statistics_can_be_recorded_in_bfloat16_close_to_float32(sdpa):
    batch = tiny.inputs(sdpa, [9])
    half = model(kv_heads=2, attn="sdpa").to(torch.bfloat16)
    half.load_state_dict(sdpa.state_dict())
    with record(half, keep="attention") as low:
        half(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()})
    with record(sdpa, keep="attention") as full:
        sdpa(**batch)
    first_layer = low["attention"].isel(layer=0).values
    wanted = full["attention"].isel(layer=0).values
    assert first_layer.dtype == np.float32
    assert np.allclose(np.asarray(first_layer).sum(-1), 1, atol=1e-5)  # not rounded to 8 bits
    assert np.isfinite(wanted).any()
    assert np.nanmax(np.abs(first_layer - wanted)) < 0.05
    assert np.nanmax(np.abs(first_layer[:, ::-1] - wanted)) > 0.1  # another head's are not close


def test_the_model_is_restored_after_an_exception(sdpa):
    batch = tiny.inputs(sdpa, [5])
    before = sdpa(**batch).logits
    with pytest.raises(ZeroDivisionError), record(sdpa) as recording:  # noqa: PT012
        generate(sdpa, batch)
        1 / 0  # noqa: B018
    assert sdpa.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(sdpa(**batch).logits, before)
    assert len(recording) == 1  # what was recorded before stays


def test_a_pass_that_raises_leaves_no_half_sample(sdpa, monkeypatch):
    batch = tiny.inputs(sdpa, [5])
    with record(sdpa) as recording:
        generate(sdpa, batch)
        layer = sdpa.model.language_model.layers[1].mlp
        with monkeypatch.context() as patch:
            patch.setattr(
                layer, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("broken layer"))
            )
            with pytest.raises(RuntimeError, match="broken layer"):
                generate(sdpa, batch)
        generate(sdpa, batch)
    assert recording.samples == ["000000", "000001"]
    close(recording["modality_mass"][0], recording["modality_mass"][1])


def test_nan_weights_are_an_error_that_names_layer_and_step(sdpa):
    broken = model(kv_heads=2, attn="sdpa")
    with torch.no_grad():
        broken.model.language_model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not numbers in layer 1, prefill step 0"), record(broken):
        broken(**tiny.inputs(broken, [5]))
    assert broken.config.text_config._attn_implementation == "sdpa"


def test_finished_rows_of_a_batch_are_not_counted_on():
    llava = model(kv_heads=2)
    batch = tiny.inputs(llava, [9, 4])
    free = generate(llava, batch, steps=6)[:, -7:]
    stop = int(free[0, 2])  # row 0 ends after its third token; row 1 goes on
    assert stop not in free[1]
    with record(llava, stop=[stop]) as recording:
        llava.generate(**batch, max_new_tokens=7, do_sample=False, eos_token_id=stop)
    steps = (recording.tokens["phase"] >= 0).sum("step").values
    assert steps.tolist() == [
        3,
        7,
    ]  # the rows that produced its three tokens; later ones are padding
    assert np.isnan(recording["modality_mass"][0].values[:, :, 3:]).all()


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_sampling_is_recorded_like_greedy_search(sdpa, options):
    with record(sdpa) as recording:
        sdpa.generate(**tiny.inputs(sdpa, [5, 3]), max_new_tokens=4, **options)
    assert len(recording) == 2 * options.get("num_return_sequences", 1)
    assert np.allclose(recording["modality_mass"].sum("key_modality"), 1)


def test_beam_search_is_refused_because_it_exchanges_rows(sdpa):
    with pytest.raises(HookError, match="num_beams=1"), record(sdpa):
        sdpa.generate(**tiny.inputs(sdpa, [5]), max_new_tokens=4, num_beams=2)
    assert sdpa.config.text_config._attn_implementation == "sdpa"


def test_a_later_turn_on_the_same_cache_belongs_to_the_same_sample(eager):
    batch = tiny.inputs(eager, [6], seed=1)
    ids = batch["input_ids"]
    with record(eager, keep="attention") as turns:
        output = eager.generate(
            **batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
        more = torch.cat([output.sequences, torch.tensor([[20, 21, 22]])], 1)
        eager.generate(
            input_ids=more,
            attention_mask=torch.ones_like(more),
            past_key_values=output.past_key_values,
            max_new_tokens=2,
            do_sample=False,
        )
    assert len(turns) == 1
    assert turns.tokens["phase"][0].values.tolist() == [0, 1, 1, 2, 1]
    sequence = torch.from_numpy(turns.tokens["token_id"].values)
    assert sequence[0, : more.shape[1]].tolist() == more[0].tolist()
    with record(eager, keep="attention", statistics=[]) as whole:
        eager(
            input_ids=sequence,
            attention_mask=torch.ones_like(sequence),
            pixel_values=batch["pixel_values"],
        )
    close(turns["attention"], whole["attention"], 1e-4)
    assert ids.shape[1] < more.shape[1]


def test_every_prefill_begins_new_samples_and_they_keep_their_numbers(sdpa):
    batch = tiny.inputs(sdpa, [9, 4])
    with record(sdpa, first_sample=7) as recording:
        generate(sdpa, batch)
        first = recording["modality_mass"].copy()
        generate(sdpa, batch, steps=2)
    assert recording.samples == ["000007", "000008", "000009", "000010"]
    close(recording["modality_mass"][:2], first)
    close(recording["modality_mass"][2:, :, :, :3], first[:, :, :, :3])


def test_a_recording_can_be_read_while_the_model_runs(sdpa):
    with record(sdpa) as recording:
        assert len(recording) == 0
        sdpa(**tiny.inputs(sdpa, [5]))
        assert recording["modality_mass"].sizes["sample"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, r"layers \[3\] are out of range; this model has layers 0 to 2"),
        ({"layers": []}, "layers"),
        (
            {"keep": "attention", "heads": [9]},
            r"heads \[9\] are out of range; this model has heads 0 to 3",
        ),
        ({"keep": "everything"}, "keep='everything'"),
        ({"heads": [0]}, "keep='attention' only"),
        ({"keep": "attention", "queries": "first"}, "queries 'first' is not one of all, prompt"),
        ({"statistics": ["masses"]}, "there is no statistic 'masses'"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_anything_runs(sdpa, options, message):
    with pytest.raises(InputError, match=message), record(sdpa, **options):
        pytest.fail("entered the block")
    assert sdpa.config.text_config._attn_implementation == "sdpa"


def test_raw_slices_beyond_the_limit_are_refused_with_the_size_and_the_way_out(sdpa):
    with (
        pytest.raises(InputError, match=r"would take .* GiB.*queries='last'"),
        record(sdpa, keep="attention", limit=10_000),
    ):
        sdpa(**tiny.inputs(sdpa, [9]))
    with record(sdpa, keep="attention", queries="last", limit=10_000) as recording:
        sdpa(**tiny.inputs(sdpa, [9]))
    assert recording["attention"].nbytes <= 10_000


def test_a_prompt_without_a_picture_is_refused_only_when_one_is_required(sdpa):
    batch = tiny.inputs(sdpa, [5, 4], images=[1, 0])
    with (
        pytest.raises(InputError, match="row 1 of the batch has no image tokens"),
        record(sdpa, require_image=True),
    ):
        sdpa(**batch)
    with record(sdpa) as recording:
        sdpa(**batch)
    assert np.isnan(recording["coverage"].sel(key_modality="image")[1]).all()
    assert (
        recording.data["sums"]["coverage_prefill_count"].sel(key_modality="image")[1] == 0
    ).all()


def test_only_the_layers_asked_for_are_recorded(sdpa):
    batch = tiny.inputs(sdpa, [5])
    with record(sdpa) as every:
        sdpa(**batch)
    with record(sdpa, layers=[2, 0]) as some:
        sdpa(**batch)
    for name in ("modality_mass", "accumulated_score", "image_score"):
        close(some[name], every[name].sel(layer=[0, 2]))


def test_statistics_over_rows_look_at_evenly_spaced_rows():
    assert reduce_prompt.evenly_spaced(5, 32).tolist() == [0, 1, 2, 3, 4]
    assert reduce_prompt.evenly_spaced(1, 32).tolist() == [0]
    assert reduce_prompt.evenly_spaced(0, 32).tolist() == []
    picked = reduce_prompt.evenly_spaced(100, 4).tolist()
    assert picked == [12, 37, 62, 87]  # the middle of every quarter
    for count in (33, 64, 100, 144, 576):
        rows = reduce_prompt.evenly_spaced(count, 32)
        assert len(set(rows.tolist())) == 32
        assert abs(float(rows.double().mean()) - (count - 1) / 2) <= 0.5  # neither end is favoured


class Watch(Observer):
    """Weights of every call as one map over the sequence, computed all at
    once by `avl.attention`."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], list[torch.Tensor]] = {}

    def observe(self, call: AttentionCall, output: torch.Tensor) -> None:
        with torch.no_grad():
            found = attention_weights(call)
        batch, heads, rows, keys = found.shape
        total = call.forward.start + call.forward.tokens
        at = torch.arange(keys) if call.key_positions is None else call.key_positions
        at = at.expand(batch, -1)[:, None] if at.dim() <= 2 else at
        at = torch.where(at < 0, total, at).repeat_interleave(heads // at.shape[1], 1)
        full = torch.zeros(batch, heads, rows, total + 1)
        full.scatter_(3, at[:, :, None].expand(-1, -1, rows, -1), found)
        self.rows.setdefault((call.forward.step, call.layer), []).append(full[..., :total])


def test_a_recording_holds_the_weights_with_which_keys_in_few_bits_were_attended(sdpa, monkeypatch):
    batch, taken = tiny.inputs(sdpa, [12]), []
    prepare, attend = KeyBuffer.slot_attention, DecodeStep._attend_at_once

    def with_weights(buffer, *arguments, **options):
        return prepare(buffer, *arguments, **{**options, "weights_wanted": True})

    def watched(step, call, layer):
        output, weights = attend(step, call, layer)
        positions = call.key_positions[0].long()
        taken.append(torch.zeros(4, int(positions.max()) + 1))
        taken[-1][:, positions] = weights[0].flatten(0, 1)
        return output, weights

    monkeypatch.setattr(KeyBuffer, "slot_attention", with_weights)
    monkeypatch.setattr(DecodeStep, "_attend_at_once", watched)
    policy = avl.AdaptivePolicy.with_cold_tier()
    with avl.adaptive(sdpa, policy), record(sdpa, keep="attention", queries="decode") as recording:
        generate(sdpa, batch, steps=3)
    assert len(taken) == 3 * 3
    for step in range(3):
        for layer in range(3):
            row = taken[3 * step + layer]
            found = recording["attention"][0].isel(layer=layer, query=step).values
            close(found[:, : row.shape[1]], row, 1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        avl.AdaptivePolicy(secondary=0.5, core=0.3, refresh_every=3, text=None),
        avl.AdaptivePolicy(
            secondary=0.6, core=0.3, refresh_every=2, text=0.5, prefill=0.7, prefill_layer=1
        ),
        avl.FullPolicy(),
    ],
    ids=["core", "filter and text", "full"],
)
def test_an_adapted_model_is_recorded_by_what_its_keys_are_not_by_where_they_lie(sdpa, policy):
    batch = tiny.inputs(sdpa, [40, 33])
    with avl.adaptive(sdpa, policy), record(sdpa, keep="attention", queries="steps") as recording:
        generate(sdpa, batch, steps=6)
    watch = Watch()
    with avl.adaptive(sdpa, policy), attached(sdpa, watch):
        generate(sdpa, batch, steps=6)
    for b, padding in enumerate((0, 7)):
        for layer in range(3):
            for step in range(7):
                row = watch.rows[step, layer][0][b, :, -1, padding:]
                kept = (
                    recording["attention"][b]
                    .isel(layer=layer, query=step)
                    .values[:, : row.shape[-1]]
                )
                close(kept, row, 1e-5)
    assert np.allclose(recording["modality_mass"].sum("key_modality"), 1, atol=1e-5)
    if policy != avl.FullPolicy():
        dropped = recording["image_score"].isel(step=slice(1, None)).isnull()
        assert 0.2 < float(dropped.mean()) < 0.9  # not attended is not the same as a weight of zero
        assert float(recording.data["sums"]["ppci_continuity_count"].sum()) == 0
    else:
        with record(sdpa, keep="attention", queries="steps") as plain:
            generate(sdpa, batch, steps=6)
        for name in recording.names:
            if name != "text_age_fit":
                close(recording[name], plain[name], 1e-4)


def test_a_recording_says_which_policy_was_on_the_model() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, **CASES["one picture"])
    policy = avl.RandomPolicy(budget=0.5)
    with record(model) as plain:
        generate(model, inputs, steps=1)
    with avl.adaptive(model, policy), record(model, first_sample=5) as inside:
        generate(model, inputs, steps=1)
    with record(model, first_sample=9) as outside, avl.adaptive(model, policy):
        generate(model, inputs, steps=1)
    assert plain.attrs["policy"] == "full cache"
    assert inside.attrs["policy"] == outside.attrs["policy"] == repr(policy)
    assert len(merge([inside, outside])) == 2
    with pytest.raises(RecordingError, match="differ in policy: RandomPolicy"):
        merge([plain, inside])
