"""Gradients of attention, block by block, equal those of eager attention that returns all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from avl import AdaptivePolicy, adaptive
from avl.families import UnsupportedModelError
from avl.hooks import HookError
from avl_analysis.conformance.build import Case, model_types
from avl_analysis.errors import InputError
from avl_analysis.relevance import gradients
from avl_analysis.relevance.gradients import attention_gradients, last_row_weights
from tests import tiny
from tests.avl.test_odd_attention import TEXTS, llava_over
from tests.avl_analysis.relevance.slow_maps import slow_gradients

CASES: dict[str, dict[str, Any]] = {
    "one picture": {"batch": [9]},
    "several pictures": {"batch": [6], "images": [2], "between": 4},
    "rows of equal length": {"batch": [7, 7]},
    "no picture": {"batch": [7], "images": 0},
}
FAMILIES = ("qwen2_vl", "qwen3_5", "gemma3", "paligemma", "gemma3n", "llama4", "lfm2_vl")
"""Three-part rotary positions, linear layers, sliding windows, prefix attention, shared keys,
chunks, short convolutions.
"""


def compare(found: gradients.AttentionGradients, expected: Any, tolerance: float = 1e-4) -> None:
    parts = (found.raw, found.weighted, found.propagated, found.log_prob)
    for one, other in zip(parts, expected, strict=True):
        assert float(other.abs().max()) > 0
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("block", [1 << 24, 300])
def test_every_map_equals_eager_attention_with_gradients(
    case: str, kv_heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "BLOCK", block)  # all rows at once, and a few at a time
    sdpa, eager = tiny.llava(kv_heads, layers=3), tiny.llava(kv_heads, layers=3, attn="eager")
    inputs = tiny.inputs(sdpa, **CASES[case])
    targets = torch.arange(77, 77 + len(inputs["input_ids"]))
    expected = slow_gradients(eager, inputs, targets)
    for model in (sdpa, eager):
        compare(attention_gradients(model, inputs, targets), expected)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name in model_types()])
def test_other_families_equal_eager_attention_too(model_type: str) -> None:
    case = Case(model_type)
    if case.defect:
        pytest.skip(case.defect)
    targets = torch.tensor([150])
    inputs = case.inputs
    found = attention_gradients(case.model, inputs, targets)
    compare(found, slow_gradients(case.eager, inputs, targets))


@pytest.mark.parametrize("kind", ["softcap", "sinks"])
def test_capped_products_and_learned_sinks_are_differentiated_too(kind: str) -> None:
    model = llava_over(TEXTS[kind])  # eager, with layers of a sliding window in between
    inputs = tiny.inputs(model, [9])
    targets = torch.tensor([77])
    compare(attention_gradients(model, inputs, targets), slow_gradients(model, inputs, targets))


def test_a_nearly_certain_word_keeps_its_gradient_in_half_precision() -> None:
    model = tiny.llava(2)
    inputs = tiny.inputs(model, [9])
    target = int(model(**inputs).logits[0, -1].argmax())
    head = model.lm_head.weight
    with torch.no_grad():
        head *= 64  # sharpens the prediction
    found = attention_gradients(model, inputs, torch.tensor([target]))
    assert float(found.log_prob.exp()) > 0.9999
    half = tiny.llava(2).to(torch.float16)
    with torch.no_grad():
        half.lm_head.weight *= 64
    pixels = {**inputs, "pixel_values": inputs["pixel_values"].half()}
    coarse = attention_gradients(half, pixels, torch.tensor([target]))
    assert float(coarse.weighted.max()) > 0
    ours, others = coarse.weighted.flatten(), found.weighted.flatten()
    # float16 rounds 1 - p itself, so only the pattern can be compared
    assert float(torch.corrcoef(torch.stack([ours, others]))[0, 1]) > 0.98


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.llava(2)
    inputs = tiny.inputs(model, [5])
    before = model(**inputs).logits
    wanted = [one.requires_grad for one in model.parameters()]
    attention_gradients(model, inputs, torch.tensor([70]))
    assert [one.requires_grad for one in model.parameters()] == wanted
    assert all(one.grad is None for one in model.parameters())
    assert torch.equal(model(**inputs).logits, before)


def test_rows_of_a_prompt_without_gradients_are_the_same() -> None:
    model = tiny.llava(2)
    inputs = tiny.inputs(model, [5])
    layers, raw, layout = last_row_weights(model, inputs)
    found = attention_gradients(model, inputs, torch.tensor([70]))
    assert layers == found.layers
    torch.testing.assert_close(raw, found.raw)
    assert torch.equal(layout.modality, found.layout.modality)


def test_padded_rows_a_policy_and_attention_that_reads_its_input_are_refused() -> None:
    model = tiny.llava(2)
    with pytest.raises(InputError, match="some rows of the batch are padded"):
        attention_gradients(model, tiny.inputs(model, [5, 3]), torch.tensor([70, 70]))
    with (
        adaptive(model, AdaptivePolicy()),
        pytest.raises(HookError, match="a policy"),
    ):
        attention_gradients(model, tiny.inputs(model, [5]), torch.tensor([70]))
    if "inkling_mm_model" in model_types():
        case = Case("inkling_mm_model")
        with pytest.raises(UnsupportedModelError, match="from its input"):
            attention_gradients(case.model, case.inputs, torch.tensor([150]))
