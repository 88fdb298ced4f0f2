"""The logit lens of a layer is what the model's own head makes of the hidden states behind it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from avl.families import UnsupportedModelError
from avl_analysis import live
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.heads.lens import logit_lens
from avl_analysis.models.loading import VLM
from tests import tiny

TOKENS = 4


@pytest.fixture
def vlm() -> VLM:
    model = tiny.llava(2, attn="sdpa")
    return VLM("tiny", model, tiny.processor(model), "memory", None, "")


@pytest.fixture(scope="module")
def sample() -> Sample:
    return Sample("one", (tiny.picture(),), "what is the colour?")


def test_every_layer_is_read_with_the_models_own_head(vlm: VLM, sample: Sample) -> None:
    ids = list(live.answer(vlm, sample, max_new_tokens=TOKENS).ids)
    found = logit_lens(vlm, sample, ids)
    inputs = dict(vlm.prepare(list(sample.images), sample.prompt))
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids[:-1]])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        out = vlm.model(**inputs, output_hidden_states=True)
        norm = vlm.model.model.language_model.norm
        for layer in range(found.share.shape[1]):
            # the last of transformers' hidden states has been through the norm already
            state = out.hidden_states[layer + 1][0, prompt - 1 :]
            last = layer == found.share.shape[1] - 1
            shares = vlm.model.lm_head(state if last else norm(state)).softmax(-1)
            for token in range(TOKENS):
                best = shares[token].max(0)
                assert found.likeliest[token, layer] == int(best.indices)
                assert found.share[token, layer] == pytest.approx(float(best.values), abs=1e-5)
                assert found.written[token, layer] == pytest.approx(
                    float(shares[token, ids[token]]), abs=1e-5
                )
    assert np.ptp(found.written, axis=1).max() > 1e-3  # layers differ


def test_a_model_whose_head_does_more_is_refused(
    vlm: VLM, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubled(nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(states)

    own = vlm.model.lm_head
    doubled = Doubled(own.in_features, own.out_features, bias=False)
    doubled.weight = own.weight
    monkeypatch.setattr(vlm.model, "get_output_embeddings", lambda: doubled)
    with pytest.raises(UnsupportedModelError, match="something else"):
        logit_lens(vlm, sample, [7, 8])
    with pytest.raises(InputError, match="no token"):
        logit_lens(vlm, sample, [])
