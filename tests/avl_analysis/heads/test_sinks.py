"""Signatures of sinks, exchanged embeddings and hidden tokens, against eager attention by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from avl.families import describe
from avl.hooks import attached
from avl_analysis import load_model, scene_samples, scenes
from avl_analysis.cli.main import main
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.heads.hidden_tokens import exchanged_embeddings, hidden_tokens
from avl_analysis.heads.object_tokens import object_tokens
from avl_analysis.heads.sink_signatures import HiddenStates, SinkObserver, layer_inputs
from avl_analysis.heads.sink_study import find_dimensions, study_sinks
from avl_analysis.heads.sinks import (
    CONDITIONS,
    SIGNATURES,
    Thresholds,
    flags,
    load_sinks,
    mass_on_sinks,
    save_sinks,
)
from avl_analysis.models.loading import VLM
from tests import tiny
from tests.avl_analysis import shared
from tests.avl_analysis.models.folders import save_folder
from tests.avl_analysis.recorded import CASES

STEPS = 3


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        **options,
    )


def kinds_of(model: Any, inputs: dict[str, Tensor], row: int) -> list[str]:
    """What every position of a row is, answer included, spelled out."""
    kinds, seen = [], False
    for token, real in zip(
        inputs["input_ids"][row].tolist(), inputs["attention_mask"][row].tolist(), strict=True
    ):
        is_image = token == model.config.image_token_id
        seen = seen or is_image
        kind = "image" if is_image else "text" if seen else "system"
        kinds.append(kind if real else "padding")
    return kinds + ["text"] * (STEPS - 1)


@pytest.mark.parametrize("case", ["one picture", "left-padded batch", "several pictures"])
def test_signatures_equal_sums_over_eager_attention_values_and_hidden_states(case: str) -> None:
    model = tiny.llava(kv_heads=2, attn="eager")
    inputs = tiny.inputs(model, **CASES[case])
    watch, held = SinkObserver(2), []
    dimensions = [3, 5]

    def keep(layer: int, hidden: Tensor) -> None:
        if not held:
            held.append(HiddenStates(2, watch.first_places, dimensions))
        held[0].keep(layer, hidden)

    with attached(model, watch), layer_inputs(model, keep) as found:
        output = generated(
            model, inputs, output_attentions=True, output_hidden_states=True, use_cache=True
        )
    assert found
    states = held[0]
    for row in range(len(inputs["input_ids"])):
        kinds = kinds_of(model, inputs, row)
        places = [place for place, kind in enumerate(kinds) if kind == "image"]
        first = next(place for place, kind in enumerate(kinds) if kind != "padding")
        for layer in range(2):
            received, to_first, rows = np.zeros(len(places)), 0.0, 0
            for step in range(STEPS):
                weights = output.attentions[step][layer][row].double().numpy()  # heads, rows, keys
                start = 0 if step == 0 else len(kinds) - STEPS + step
                for query in range(weights.shape[1]):
                    if kinds[start + query] == "text":
                        rows += 1
                        for number, key in enumerate(places):
                            received[number] += weights[:, query, key].mean()
                        to_first += weights[:, query, first].mean()
            np.testing.assert_allclose(watch.received[row][layer], received, atol=1e-5)
            assert watch.first[layer, row] == pytest.approx(to_first, abs=1e-5)
            assert watch.rows[row] == rows
            values = output.past_key_values.layers[layer].values[row].double()
            norms = [float(values[:, key].norm(dim=-1).mean()) for key in places]
            np.testing.assert_allclose(watch.value_norm[row][layer], norms, rtol=1e-5)
            hidden = output.hidden_states[0][layer][row].double().numpy()
            for key in places:
                root = np.sqrt((hidden[key] ** 2).mean())
                largest = np.abs(hidden[key]).max() / root
                assert states.largest[layer][row, key] == pytest.approx(largest, rel=1e-4)
                chosen = max(abs(hidden[key][d]) for d in dimensions) / root
                assert states.chosen[layer][row, key] == pytest.approx(chosen, rel=1e-4)
                assert states.norm[layer][row, key] == pytest.approx(
                    np.linalg.norm(hidden[key]), rel=1e-4
                )
            np.testing.assert_allclose(
                states.first[layer][row],
                np.abs(hidden[first]) / np.sqrt((hidden[first] ** 2).mean()),
                rtol=1e-4,
            )


def test_watching_changes_no_bit_and_leaves_no_hook() -> None:
    model = tiny.llava(kv_heads=2)
    inputs = tiny.inputs(model, **CASES["one picture"])
    plain = torch.stack(generated(model, inputs, output_logits=True).logits)
    with attached(model, SinkObserver(2)), layer_inputs(model, lambda layer, hidden: None):
        watched = torch.stack(generated(model, inputs, output_logits=True).logits)
    assert torch.equal(plain, watched)
    assert not any(module._forward_pre_hooks for module in describe(model).decoder.modules())


@pytest.mark.parametrize("case", ["left-padded batch", "several pictures"])
def test_hiding_tokens_equals_adding_to_the_mask_one_pair_at_a_time(case: str) -> None:
    sdpa, eager = tiny.llava(kv_heads=2), tiny.llava(kv_heads=2, attn="eager")
    inputs = tiny.inputs(sdpa, **CASES[case])
    batch = len(inputs["input_ids"])
    kinds = [kinds_of(sdpa, inputs, row) for row in range(batch)]
    places = [[p for p, kind in enumerate(row) if kind == "image"] for row in kinds]
    rng = np.random.default_rng(0)
    hidden = [rng.random((2, len(row))) < 0.5 for row in places]

    def change(layer: int) -> Any:
        def hook(module: Any, arguments: Any, options: dict[str, Any]) -> Any:
            states = options["hidden_states"] if "hidden_states" in options else arguments[0]
            start = options["past_key_values"].get_seq_length(module.layer_idx)
            rows = states.shape[1]
            mask = options["attention_mask"]
            mask = torch.zeros(batch, 1, rows, start + rows) if mask is None else mask
            mask = mask.expand(batch, 1, rows, start + rows).clone()
            for row in range(batch):
                for query in range(rows):
                    if kinds[row][start + query] != "text":
                        continue
                    for number, key in enumerate(places[row]):
                        if hidden[row][layer, number]:
                            mask[row, 0, query, key] = torch.finfo(states.dtype).min
            return arguments, {**options, "attention_mask": mask}

        return hook

    handles = [
        eager.get_decoder()
        .layers[layer]
        .self_attn.register_forward_pre_hook(change(layer), with_kwargs=True)
        for layer in range(2)
    ]
    expected = torch.stack(generated(eager, inputs, output_logits=True).logits)
    for handle in handles:
        handle.remove()
    plain = torch.stack(generated(eager, inputs, output_logits=True).logits)
    for model in (sdpa, eager):
        with hidden_tokens(model, hidden):
            found = torch.stack(generated(model, inputs, output_logits=True).logits)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(expected, plain, atol=1e-3)
    with hidden_tokens(sdpa, [np.zeros((2, len(row)), bool) for row in places]):
        nothing = torch.stack(generated(sdpa, inputs, output_logits=True).logits)
    assert torch.equal(nothing, torch.stack(generated(sdpa, inputs, output_logits=True).logits))


def test_exchanged_embeddings_enter_the_decoder_in_each_others_place() -> None:
    model = tiny.llava(kv_heads=2)
    inputs = tiny.inputs(model, **CASES["left-padded batch"])
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states[0]
        with exchanged_embeddings(model, [[(0, 3)], [(1, 2), (4, 5)]]):
            changed = model(**inputs, output_hidden_states=True).hidden_states[0]
        again = model(**inputs, output_hidden_states=True).hidden_states[0]
    assert torch.equal(again, plain)
    for row, pairs in enumerate([[(0, 3)], [(1, 2), (4, 5)]]):
        kinds = kinds_of(model, inputs, row)
        places = [place for place, kind in enumerate(kinds) if kind == "image"]
        order = list(range(plain.shape[1]))
        for one, other in pairs:
            order[places[one]], order[places[other]] = places[other], places[one]
        assert torch.equal(changed[row], plain[row, order])


def test_the_threshold_of_a_small_model_is_one_it_can_reach() -> None:
    assert Thresholds.of_width(4096).massive == 20.0
    assert Thresholds.of_width(192).massive == pytest.approx(192**0.5 / 2)


def test_dimensions_are_found_from_the_first_token() -> None:
    vlm = shared.vlm()
    sample = Sample("a", (tiny.picture(),), "what is this?", ("red",))
    assert find_dimensions(vlm, [sample])[0] == []
    first = int(vlm.prepare(list(sample.images), sample.prompt)["input_ids"][0, 0])
    with torch.no_grad():
        vlm.model.get_input_embeddings().weight[first, 5] += 1000.0
    assert find_dimensions(vlm, [sample])[0] == [5]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load_model("scenes")


@pytest.fixture(scope="module")
def study(vlm: VLM) -> xr.Dataset:
    samples = scene_samples(2, ["colour", "ocr", "where"])
    return study_sinks(vlm, samples, draws=2, max_new_tokens=8, batch_size=4)


def test_a_study_holds_what_its_parts_give(vlm: VLM, study: xr.Dataset) -> None:
    """Attention over its mean; sinks, and their mass, by one loop per token."""
    np.testing.assert_allclose(study["attention"].mean("token"), 1.0, atol=1e-6)
    np.testing.assert_allclose(study["value_norm"].median("token"), 1.0, atol=1e-6)
    sample = scene_samples(1, ["where"])[0]
    alone = study_sinks(vlm, [sample], draws=2, max_new_tokens=8)
    for name in ("attention", "value_norm", "image_mass", "input_norm"):
        np.testing.assert_allclose(
            alone[name].values[0], study[name].sel(sample=sample.id).values, rtol=2e-3, atol=1e-4
        )
    for signature, holds in (
        ("concentration", lambda one: one["attention"] >= 5.0),
        ("value drain", lambda one: one["value_norm"] <= 0.5),
    ):
        found, mass = flags(study, signature), mass_on_sinks(study, signature)
        for row, layer in np.ndindex(study.sizes["sample"], study.sizes["layer"]):
            part = study.isel(sample=row, layer=layer)
            total = 0.0
            for token in range(144):
                one = {key: float(part[key][token]) for key in ("attention", "value_norm")}
                assert bool(found[row, layer, token]) == holds(one)
                total += one["attention"] / 144 * float(part["image_mass"]) * holds(one)
            assert float(mass[row, layer]) == pytest.approx(total, abs=1e-9)
        assert bool(found.any())
    assert not bool(flags(study, "massive activation").any())
    with pytest.raises(InputError, match="choose from concentration"):
        flags(study, "sinking")


def test_hiding_is_measured_where_there_are_sinks_and_only_sinks_shown_hides_most(
    study: xr.Dataset,
) -> None:
    has = flags(study, "concentration").any(("layer", "token")).values
    hidden = study["hidden_attention"]
    assert list(study["condition"].values) == list(CONDITIONS)
    for condition in CONDITIONS:
        assert (np.isfinite(study["log_prob_change"].sel(condition=condition)) == has).all()
        assert (np.isfinite(hidden.sel(condition=condition)) == has).all()
    known = hidden.isel(sample=np.flatnonzero(has))
    sinks = known.sel(condition="sinks hidden")
    np.testing.assert_allclose(1 - sinks, known.sel(condition="only sinks shown"), atol=1e-6)
    assert bool((known.sel(condition="as many others hidden") < sinks).all())
    as_much = known.sel(condition="others with as much attention hidden")
    assert bool((as_much > 0.9 * sinks).all())  # less where sinks hold over half of a layer's


def test_where_objects_lie_is_known_of_scenes_and_of_nothing_else(vlm: VLM) -> None:
    sample = scene_samples(1, ["colour"])[0]
    assert sample.scene is not None
    scene = scenes.generate(sample.scene["seed"], sample.scene["index"], "colour").scene
    (found,) = object_tokens(vlm, [sample])
    assert set(np.flatnonzero(found == 0)) == set(scene.background)
    own = Sample("own", (tiny.picture(),), "What?")
    assert np.isnan(object_tokens(vlm, [own])[0]).all()


def test_the_command_prints_a_table_and_its_file_is_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.nc"
    arguments = ["sinks", "--scenes", "1", "--task", "colour", "--draws", "1", "--out", str(out)]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert not done.value.code
    said = capsys.readouterr().out
    assert all(name in said for name in (*SIGNATURES, *CONDITIONS, "sink dimensions"))
    study = load_sinks(out)
    xr.testing.assert_identical(load_sinks(save_sinks(study, tmp_path / "again.nc")), study)
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--force", "--by", "size"])
    assert done.value.code == 2
    assert "unknown signature 'size'" in capsys.readouterr().err


def test_what_cannot_be_studied_is_refused(vlm: VLM) -> None:
    with pytest.raises(InputError, match="0 questions"):
        study_sinks(vlm, [])
    with pytest.raises(InputError, match="has no image"):
        study_sinks(vlm, [Sample("a", (), "What?")])


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
def test_a_tiny_qwen_folder_is_studied(tmp_path: Path, model_type: str) -> None:
    vlm = load_model(save_folder(tmp_path / "qwen", model_type))
    study = study_sinks(
        vlm, scene_samples(1, ["colour", "ocr"]), signature="value drain", draws=1, max_new_tokens=3
    )
    assert bool(np.isfinite(study["image_mass"]).all())
    assert bool(np.isfinite(study["first_largest"]).all())
    assert bool(np.isfinite(study["input_norm"]).any())
