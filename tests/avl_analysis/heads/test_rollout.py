"""Rollout of answer tokens equals the product of whole attention maps of eager attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avl_analysis import live
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.heads import rollout as module
from avl_analysis.heads.rollout import rollout
from avl_analysis.models.loading import VLM
from tests import tiny

TOKENS = 5


def vlm(kv_heads: int, attn: str) -> VLM:
    model = tiny.llava(kv_heads, attn=attn)
    return VLM("tiny", model, tiny.processor(model), "memory", None, "")


@pytest.fixture(scope="module")
def sample() -> Sample:
    return Sample("one", (tiny.picture(),), "what is the colour?")


def by_hand(model: VLM, sample: Sample, ids: list[int], layer: int) -> np.ndarray:
    """The formula of Abnar and Zuidema with all maps, as a list of matrices."""
    inputs = dict(model.prepare(list(sample.images), sample.prompt))
    prompt = inputs["input_ids"].shape[1]
    # every token but the last is read by the model
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids[:-1]])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        maps = model.model(**inputs, output_attentions=True).attentions
    product = np.eye(inputs["input_ids"].shape[1])
    for weights in maps[: layer + 1]:
        mean = weights[0].double().numpy().mean(0)
        mixed = 0.5 * mean + 0.5 * np.eye(len(mean))
        product = (mixed / mixed.sum(1, keepdims=True)) @ product
    return product[prompt - 1 :]


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("layer", [0, None])
def test_rollout_is_the_product_of_all_maps(
    sample: Sample, kv_heads: int, layer: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 4 * 30 * 7)  # several blocks of rows
    ids = list(live.answer(vlm(kv_heads, "sdpa"), sample, max_new_tokens=TOKENS).ids)
    found = rollout(vlm(kv_heads, "sdpa"), sample, ids, layer)
    wanted = by_hand(vlm(kv_heads, "eager"), sample, ids, found.layer)
    assert found.values.shape == wanted.shape
    np.testing.assert_allclose(found.values, wanted, atol=2e-6)
    np.testing.assert_allclose(found.values.sum(1), 1.0, atol=1e-5)
    assert found.values.std() > 1e-3  # not uniform, or any formula would do


def test_the_model_is_as_it_was(sample: Sample) -> None:
    model = vlm(2, "sdpa")
    before = live.answer(model, sample, max_new_tokens=TOKENS).ids
    rollout(model, sample, before)
    assert live.answer(model, sample, max_new_tokens=TOKENS).ids == before


def test_layers_and_answers_that_are_not_there_are_refused(sample: Sample) -> None:
    model = vlm(2, "sdpa")
    with pytest.raises(InputError, match="there is no layer 9"):
        rollout(model, sample, [5], 9)
    with pytest.raises(InputError, match="no token"):
        rollout(model, sample, [])
