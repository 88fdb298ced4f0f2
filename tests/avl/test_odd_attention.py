"""Attention that is more than causal softmax over all keys: windows, caps, sinks, biases, hybrids,
names read.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Gemma2Config,
    GptOssConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import avl
from avl.attention import AttentionCall, attention_logits, attention_weights
from avl.backends import _Name
from avl.families import describe
from avl.hooks import attached
from avl.tokens import Modality
from avl_analysis.conformance.build import Case
from avl_analysis.conformance.entries import ENTRIES, entry
from avl_analysis.conformance.recording import check_recording
from tests import tiny
from tests.taps import Notes

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": tiny.VOCABULARY,
    "sliding_window": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "layer_types": ["sliding_attention", "full_attention"],
}
TEXTS = {
    "softcap": Gemma2Config(**SMALL, attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
    "sinks": GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}


def llava_over(text):
    """A tiny LLaVA with eager attention over another language model, alternating window and full
    layers.
    """
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=24,
        patch_size=6,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=copy.deepcopy(text),
        image_token_index=tiny.IMAGE,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter, mean=8.0)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = list(range(tiny.IMAGE + 1))
    return model


@pytest.mark.parametrize("kind", TEXTS)
def test_recorded_weights_are_eagers_with_caps_sinks_and_windows(kind):
    model = llava_over(TEXTS[kind])
    batch, calls = tiny.inputs(model, batch=[9, 5]), Notes()
    with torch.no_grad(), attached(model, calls):
        output = model.generate(
            **batch,
            max_new_tokens=5,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    valid = batch["attention_mask"].bool()[:, None, :, None]
    option = {"softcap": "softcap", "sinks": "s_aux"}[kind]
    for step, (returned, seen) in enumerate(zip(output.attentions, calls.passes, strict=True)):
        for layer, weights in enumerate(returned):
            recorded, _, options = seen[layer]
            assert options.get(option) is not None
            rows = valid if step == 0 else torch.ones_like(weights, dtype=torch.bool)[..., :1]
            assert ((recorded - weights).abs() * rows).amax() < 1e-5
    if kind == "sinks":
        assert (
            output.attentions[0][1][0].sum(-1).amin() < 0.5
        )  # the rest of the softmax went to the sinks


@pytest.mark.parametrize("kind", TEXTS)
def test_a_policy_that_keeps_everything_changes_nothing_beside_windows(kind):
    model = llava_over(TEXTS[kind])
    batch = tiny.inputs(model, batch=[9, 5])
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    plain = model.generate(**batch, **options)
    for policy in (avl.FullPolicy(), avl.AdaptivePolicy(secondary=1.0, core=1.0, text=1.0)):
        with avl.adaptive(model, policy) as session:
            kept = model.generate(**batch, **options)
        assert torch.equal(plain.sequences, kept.sequences)
        for one, other in zip(plain.scores, kept.scores, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert session.usage().layers == (1,)  # the window of layer 0 keeps its own cache


def test_keys_of_a_sliding_window_are_the_newest_positions():
    model = llava_over(TEXTS["softcap"])
    batch, calls = tiny.inputs(model, batch=[9]), Notes()
    with torch.no_grad(), attached(model, calls):
        model.generate(**batch, max_new_tokens=4, do_sample=False)
    length = batch["input_ids"].shape[1]
    for step, seen in enumerate(calls.passes[1:]):
        weights, positions, _ = seen[0]
        assert positions.tolist() == list(
            range(length + step + 1 - weights.shape[3], length + step + 1)
        )
        assert weights.shape[3] <= 6
        assert seen[1][1] is None  # the full layer holds key j at position j


def test_gemma3_shows_image_tokens_to_each_other_both_ways():
    case, calls = Case("gemma3"), Notes()
    with torch.no_grad(), attached(case.model, calls) as hooks:
        case.model(**case.inputs)
        layout = hooks.family.layout(case.inputs["input_ids"], None, case.inputs)
    at = layout.mask(Modality.IMAGE)[0].nonzero().flatten()
    weights = calls.passes[0][1][0][0]
    assert (weights[:, at[0], at[-1]] > 0).all()
    text = (layout.modality[0] == Modality.TEXT).nonzero().flatten()
    assert (weights[:, text[0], text[-1]] == 0).all()


def test_paligemma_shows_the_whole_prompt_to_every_token():
    case, calls = Case("paligemma"), Notes()
    with torch.no_grad(), attached(case.model, calls):
        case.model(**case.inputs)
    assert (calls.passes[0][1][0][0, :, 0] > 0).all()


def test_policies_act_on_the_attention_layers_of_a_hybrid_model_only():
    case = Case("qwen3_5")
    kinds = case.model.config.text_config.layer_types
    with torch.no_grad(), avl.adaptive(case.model, avl.AdaptivePolicy()) as session:
        case.model.generate(**case.inputs, max_new_tokens=3, do_sample=False)
    assert session.usage().layers == tuple(
        i for i, kind in enumerate(kinds) if kind == "full_attention"
    )
    assert "linear_attention" in kinds


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("kimi_k25", "compressed keys"),
        ("gemma3n", "share the KV cache of other layers"),
        ("minimax_m3_vl", "choose their keys themselves"),
        ("inkling_mm_model", "no full-attention layer"),
    ],
)
def test_attention_that_policies_cannot_act_on_is_refused_with_its_reason(model_type, reason):
    case = Case(model_type)
    with (
        torch.no_grad(),
        avl.adaptive(case.model, avl.AdaptivePolicy()),
        pytest.raises(avl.UnsupportedModelError, match=reason),
    ):
        case.model.generate(**case.inputs, max_new_tokens=2, do_sample=False)


def _variant(monkeypatch, model_type, **override):
    """A tiny model of a type with other settings than its default configuration has."""
    known = entry(model_type)
    changed = {
        **known.override,
        **{f"text_config.{name}": value for name, value in override.items()},
    }
    monkeypatch.setitem(ENTRIES, model_type, replace(known, override=changed))
    return Case(model_type)


def test_layers_that_share_keys_are_recorded_and_refused_to_policies_where_a_config_asks_for_them(
    monkeypatch,
):
    kinds = ["sliding_attention", "full_attention"] * 2
    case = _variant(
        monkeypatch, "gemma4", num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=2
    )
    assert check_recording(case).layers == 4
    with (
        torch.no_grad(),
        avl.adaptive(case.model, avl.AdaptivePolicy()),
        pytest.raises(avl.UnsupportedModelError, match="layers of gemma4 share the KV cache"),
    ):
        case.model.generate(**case.inputs, max_new_tokens=2, do_sample=False)


def test_layers_of_unequal_heads_are_refused_where_a_config_asks_for_them(monkeypatch):
    case = _variant(monkeypatch, "step3p7", num_sliding_attention_heads=2)
    assert [layer.self_attn.num_heads for layer in case.model.get_decoder().layers] == [4, 2]
    with pytest.raises(
        avl.UnsupportedModelError, match=r"different numbers of query heads \(2, 4\)"
    ):
        describe(case.model)


def _call(**options):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 3, 4, generator=draw) for heads in (2, 1, 1))
    return AttentionCall(
        None, 0, torch.nn.Identity(), query, key, value, None, 0.5, {"is_causal": True, **options}
    )


def test_a_learned_position_bias_is_part_of_the_logits():
    bias = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    plain, biased = attention_logits(_call()), attention_logits(_call(position_bias=bias))
    seen = torch.ones(3, 3).tril().bool().expand_as(plain)
    torch.testing.assert_close(biased[seen], (plain + bias)[seen])
    torch.testing.assert_close(
        attention_logits(_call(position_bias=bias), slice(1, 2)), biased[:, :, 1:2]
    )


def test_sinks_may_depend_on_the_query():
    sinks = torch.randn(1, 2, 3, 1, generator=torch.Generator().manual_seed(1))
    logits = attention_logits(_call())
    expected = torch.softmax(torch.cat([logits, sinks], -1), -1)[..., :-1]
    torch.testing.assert_close(attention_weights(_call(sinks=sinks)), expected)
    torch.testing.assert_close(
        attention_weights(_call(sinks=sinks), slice(2, 3)), expected[:, :, 2:]
    )


def test_the_name_of_a_watched_backend_equals_the_backend_and_is_found_under_its_own():
    name = _Name("sdpa")
    assert name == "sdpa"
    assert name in ("eager", "sdpa")
    assert name == "avl_sdpa"
    assert name != "eager"
    assert (name != "sdpa") is False
    registry = {"sdpa": "theirs", "avl_sdpa": "ours"}
    assert registry[name] == "ours"
    config = AutoConfig.for_model("llama")
    config._attn_implementation_internal = name
    assert copy.deepcopy(config)._attn_implementation == "sdpa"
