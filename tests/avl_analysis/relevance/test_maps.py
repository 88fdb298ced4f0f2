"""Relevance maps of an answer's tokens: those of the sequence that `generate` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avl_analysis import Sample, live, load_model
from avl_analysis.errors import InputError
from avl_analysis.models.loading import VLM
from avl_analysis.relevance.maps import GENERIC, METHODS, Relevance, relevance, with_answer
from tests import tiny
from tests.avl_analysis import shared
from tests.avl_analysis.models import folders
from tests.avl_analysis.relevance.slow_maps import slow_gradients

TWO = (tiny.picture(), tiny.picture(seed=1))


def eager_rows(vlm: VLM, sample: Sample, answer: list[int]) -> torch.Tensor:
    """(layers, heads, keys) weights of the row that produces the token after `answer`."""
    inputs = with_answer(vlm.prepare(list(sample.images), sample.prompt), answer)
    vlm.model.set_attn_implementation("eager")
    try:
        output = vlm.model(**inputs, output_attentions=True)
    finally:
        vlm.model.set_attn_implementation("sdpa")
    return torch.stack([weights[0, :, -1] for weights in output.attentions]).detach()


def slow_value_lengths(vlm: VLM, inputs: dict[str, Any]) -> torch.Tensor:
    """(layers, heads, keys) lengths of value vectors, from what each layer's projection returns."""
    layers = vlm.model.get_decoder().layers
    config = vlm.model.config.get_text_config()
    returned: list[torch.Tensor] = []
    handles = [
        layer.self_attn.v_proj.register_forward_hook(lambda *call: returned.append(call[-1][0]))
        for layer in layers
    ]
    with torch.no_grad():
        vlm.model(**inputs)
    for handle in handles:
        handle.remove()
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = returned[0].shape[1] // groups
    lengths = torch.zeros(len(layers), heads, len(returned[0]))
    for layer, values in enumerate(returned):
        for head in range(heads):
            own = head * groups // heads
            for key, value in enumerate(values[:, own * width : (own + 1) * width]):
                lengths[layer, head, key] = sum(float(part) ** 2 for part in value) ** 0.5
    return lengths


@pytest.mark.parametrize("step", [0, 3])
def test_a_weight_counts_as_much_as_the_value_is_long_that_its_head_reads(step: int) -> None:
    vlm = shared.vlm(kv_heads=2)  # four query heads: two read one value
    sample = Sample("two", TWO, "what is red")
    ids = live.answer(vlm, sample, max_new_tokens=5).ids
    found = relevance(vlm, sample, ids, step)
    inputs = with_answer(vlm.prepare(list(TWO), sample.prompt), list(ids[:step]))
    rows = eager_rows(vlm, sample, list(ids[:step])) * slow_value_lengths(vlm, inputs)
    image = vlm.model.config.image_token_id
    places = (inputs["input_ids"][0] == image).nonzero().flatten()
    assert np.ptp(found.value_norm[0, :, 0]) > 0  # heads of different groups read different values
    for layer, head in ((None, None), (1, None), (0, 2), (0, 0)):
        chosen = [slice(None) if one is None else slice(one, one + 1) for one in (layer, head)]
        mean = rows[chosen[0], chosen[1]][..., places].mean((0, 1))
        np.testing.assert_allclose(found.of("value", layer, head), mean, rtol=1e-3)


def test_maps_continue_a_conversation() -> None:
    vlm = shared.vlm()
    sample = Sample("one", TWO[:1], "what is red", history=(("where is it?", "left"),))
    seen = live.observe(vlm, sample, max_new_tokens=3)
    found = relevance(vlm, sample, seen.answer.ids, 1)
    watched = seen.weights[1][..., : found.raw.shape[-1]].astype(np.float32)
    np.testing.assert_allclose(found.raw, watched, atol=1e-3)
    plain = live.observe(vlm, Sample("one", TWO[:1], "what is red"), max_new_tokens=3)
    assert seen.prompt > plain.prompt


@pytest.mark.parametrize("step", [0, 3])
def test_maps_equal_the_formulas_with_two_pictures(step: int) -> None:
    vlm = shared.vlm()
    sample = Sample("two", TWO, "what is red")
    ids = live.answer(vlm, sample, max_new_tokens=5).ids
    found = relevance(vlm, sample, ids, step)
    rows = eager_rows(vlm, sample, list(ids[:step]))
    generic = eager_rows(vlm, Sample("g", TWO, GENERIC), [])
    image = vlm.model.config.image_token_id
    places = (vlm.prepare(list(TWO), sample.prompt)["input_ids"][0] == image).nonzero().flatten()
    usual = (vlm.prepare(list(TWO), GENERIC)["input_ids"][0] == image).nonzero().flatten()
    torch.testing.assert_close(torch.from_numpy(found.raw), rows, atol=1e-5, rtol=1e-4)
    for layer, head in ((None, None), (1, None), (0, 2)):
        chosen = [slice(None) if one is None else slice(one, one + 1) for one in (layer, head)]
        mean = rows[chosen[0], chosen[1]][..., places].mean((0, 1))
        base = generic[chosen[0], chosen[1]][..., usual].mean((0, 1))
        np.testing.assert_allclose(found.of("raw", layer, head), mean, rtol=1e-3)
        np.testing.assert_allclose(found.of("relative", layer, head), mean / base, rtol=1e-3)
    vlm.model.set_attn_implementation("eager")
    inputs = with_answer(vlm.prepare(list(TWO), sample.prompt), list(ids[:step]))
    _, weighted, propagated, log_prob = slow_gradients(vlm.model, inputs, torch.tensor([ids[step]]))
    expected = weighted[0, 1, 2][places].numpy()
    np.testing.assert_allclose(found.of("gradient", 1, 2), expected, atol=1e-5 * expected.max())
    np.testing.assert_allclose(found.of("chefer"), propagated[0][places], rtol=1e-3)
    assert found.probability == pytest.approx(float(log_prob.exp()), rel=1e-4)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "internvl"])
def test_maps_are_of_the_row_that_generate_computed(model_type: str, tmp_path: Path) -> None:
    vlm = load_model(folders.save_folder(tmp_path, model_type))
    sample = Sample("two", TWO, "what is red")
    seen = live.observe(vlm, sample, max_new_tokens=4)
    for step in (0, 2):
        found = relevance(vlm, sample, seen.answer.ids, step)
        watched = seen.weights[step][..., : found.raw.shape[-1]].astype(np.float32)
        np.testing.assert_allclose(found.raw, watched, atol=1e-3)
        assert [len(image.token) for image in found.images] == [
            len(image.token) for image in seen.images
        ]
        for method in METHODS:
            drawn = found.patches(method, image=1)
            np.testing.assert_array_equal(drawn.boxes, seen.images[1].boxes)
            assert float(np.nanmax(drawn.values)) > 0


def test_the_embedded_model_is_asked_a_generic_question_in_words_it_knows() -> None:
    vlm = load_model("scenes")
    from avl_analysis import scene_samples

    (sample,) = scene_samples(1, ["colour"], split="recording")
    seen = live.observe(vlm, sample)
    found = relevance(vlm, sample, seen.answer.ids)
    assert found.instruction == "Describe the picture."
    assert found.word.strip() in seen.answer.text
    own = relevance(vlm, Sample("d", sample.images, found.instruction), seen.answer.ids[:1])
    np.testing.assert_allclose(own.of("relative"), 1.0, rtol=1e-4)


@pytest.fixture(scope="module")
def found() -> Relevance:
    vlm = shared.vlm()
    sample = Sample("one", TWO[:1], "what is red")
    return relevance(vlm, sample, live.answer(vlm, sample, max_new_tokens=2).ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other",), "choose one of raw, value, relative, gradient, chefer"),
        (("raw", 7), "layer 7 is not there: layers 0 to 1"),
        (("raw", 0, 9), "head 9 is not there: this model has 0 to 3"),
        (("raw", None, None, 3), "image 3 has no tokens with a known place.*: 0"),
    ],
)
def test_a_map_that_is_not_there_is_refused(
    found: Relevance, arguments: tuple, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        found.patches(*arguments)


def test_questions_without_image_and_tokens_beyond_the_answer_are_refused() -> None:
    vlm = shared.vlm()
    with pytest.raises(InputError, match="without an image"):
        relevance(vlm, Sample("none", (), "what"), [70])
    with pytest.raises(InputError, match="the answer has tokens 0 to 1"):
        relevance(vlm, Sample("one", TWO[:1], "what"), [70, 71], 2)


def test_a_weight_of_zero_under_the_instruction_leaves_the_ratio_unknown(found: Relevance) -> None:
    from dataclasses import replace

    generic = found.generic.copy()
    generic[..., 3] = 0.0
    ratio = replace(found, generic=generic).of("relative")
    assert np.isnan(ratio[3])
    assert np.isfinite(np.delete(ratio, 3)).all()
