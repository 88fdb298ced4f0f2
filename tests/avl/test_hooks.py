"""Hooks observe without touching, follow the sequence, and leave nothing behind."""

from __future__ import annotations

import threading

import pytest
import torch

from avl.attention import attention_weights
from avl.families import UnsupportedModelError
from avl.hooks import HookError, Intervention, Observer, attach, attached
from tests import tiny


class Notes(Observer):
    """Keeps what it is told."""

    def __init__(self):
        self.begun, self.ended, self.weights = [], [], []

    def begin(self, forward):
        self.begun.append(
            (forward.kind, forward.step, forward.start, forward.tokens, forward.layout.length)
        )

    def observe(self, call, output):
        self.weights.append((call.forward.step, call.layer, attention_weights(call)))

    def end(self, forward):
        self.ended.append(forward.step)


CASES = {
    "MHA": ({"kv_heads": 4, "heads": 4}, {"batch": [9], "images": 1}),
    "GQA, left-padded batch": ({"kv_heads": 2, "heads": 4}, {"batch": [9, 5], "images": 1}),
    "two images, text between": (
        {"kv_heads": 2, "heads": 4},
        {"batch": [7], "images": 2, "between": 3},
    ),
    "no image": ({"kv_heads": 4, "heads": 4}, {"batch": [9, 4], "images": 0}),
    "a picture in one row only": ({"kv_heads": 4, "heads": 4}, {"batch": [9, 4], "images": [1, 0]}),
}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_logits_with_an_observer_are_bit_identical(case, attn):
    model_options, input_options = CASES[case]
    model, batch = (
        tiny.llava(attn=attn, **model_options),
        tiny.inputs(tiny.llava(**model_options), **input_options),
    )
    with torch.no_grad():
        before = model(**batch).logits
        with attached(model, Notes()):
            during = model(**batch).logits
        after = model(**batch).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)


@pytest.mark.parametrize("case", CASES)
def test_weights_computed_beside_sdpa_equal_the_ones_eager_attention_returns(case):
    model_options, input_options = CASES[case]
    batch = tiny.inputs(tiny.llava(**model_options), **input_options)
    notes = Notes()
    with torch.no_grad():
        expected = tiny.llava(attn="eager", **model_options)(
            **batch, output_attentions=True
        ).attentions
        model = tiny.llava(attn="sdpa", **model_options)
        with attached(model, notes):
            model(**batch)
    valid = batch["attention_mask"].bool()[:, None, :, None]
    assert len(notes.weights) == len(expected)
    for (_, _, ours), theirs in zip(notes.weights, expected, strict=True):
        assert ((ours - theirs) * valid).abs().max() < 1e-5


def test_a_generation_is_one_prefill_and_then_decode_steps():
    model = tiny.llava()
    batch = tiny.inputs(model, batch=[6], images=1)
    length, notes = batch["input_ids"].shape[1], Notes()
    with attached(model, notes):
        model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert notes.begun == [("prefill", 0, 0, length, length)] + [
        ("decode", step, length + step - 1, 1, length + step) for step in (1, 2, 3)
    ]
    assert notes.ended == [0, 1, 2, 3]


def test_a_later_turn_on_a_returned_cache_is_an_extension_of_the_same_sequence():
    model = tiny.llava()
    batch = tiny.inputs(model, batch=[6], images=1)
    notes = Notes()
    with attached(model, notes):
        out = model.generate(
            **batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
        more = torch.cat([out.sequences, torch.full((1, 4), 9)], dim=1)
        model.generate(
            input_ids=more, past_key_values=out.past_key_values, max_new_tokens=2, do_sample=False
        )
    length = batch["input_ids"].shape[1]
    assert [kind for kind, *_ in notes.begun] == ["prefill", "decode", "decode", "extend", "decode"]
    assert notes.begun[3] == ("extend", 2, length + 2, 5, length + 7)


def test_a_cache_filled_elsewhere_is_refused():
    model = tiny.llava()
    batch = tiny.inputs(model, batch=[6], images=1)
    out = model(**batch, use_cache=True)
    with (
        attached(model, Notes()),
        pytest.raises(HookError, match="start with an empty cache"),
    ):
        model(input_ids=torch.tensor([[9]]), past_key_values=out.past_key_values)


def test_the_model_is_restored_after_an_exception():
    model = tiny.llava()
    batch = tiny.inputs(model, batch=[6], images=1)
    before, name = model(**batch).logits, model.config.text_config._attn_implementation

    class Fails(Observer):
        def observe(self, call, output):
            raise RuntimeError("in the middle of a layer")

    with pytest.raises(RuntimeError, match="in the middle"), attached(model, Fails()):
        model(**batch)
    assert model.config.text_config._attn_implementation == name
    assert not model.get_decoder()._forward_pre_hooks
    assert not model._forward_pre_hooks
    assert torch.equal(before, model(**batch).logits)


def test_two_observers_at_once_are_refused_and_an_observer_with_an_intervention_is_fine():
    model = tiny.llava()
    with attached(model, Notes()):
        with pytest.raises(HookError, match="already on this"):
            attach(model, Notes())
        with attached(model, Intervention()):
            pass
        assert model.config.text_config._attn_implementation == "avl_sdpa"
    assert model.config.text_config._attn_implementation == "sdpa"


def test_two_models_that_share_a_config_do_not_disturb_each_other():
    one = tiny.llava(seed=1)
    other = type(one)(one.config).eval()
    notes = Notes()
    batch = tiny.inputs(one, batch=[6], images=1)
    with attached(one, notes):
        with attached(other, Notes()):
            pass
        other(**batch)
        assert notes.begun == []
        one(**batch)
        assert len(notes.begun) == 1
    assert one.config.text_config._attn_implementation == "sdpa"


def test_two_threads_with_two_models_see_only_their_own():
    models = [tiny.llava(layers=2, seed=seed) for seed in (1, 2)]
    batches = [tiny.inputs(model, batch=[6 + i], images=1) for i, model in enumerate(models)]
    alone = [
        model.generate(**batch, max_new_tokens=6, do_sample=False)
        for model, batch in zip(models, batches, strict=True)
    ]
    notes, together = [Notes(), Notes()], [None, None]

    def work(i):
        with attached(models[i], notes[i]):
            together[i] = models[i].generate(**batches[i], max_new_tokens=6, do_sample=False)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert torch.equal(alone[i], together[i])
        assert notes[i].begun[0][3] == batches[i]["input_ids"].shape[1]
        assert len(notes[i].begun) == 6


def test_a_text_only_model_is_refused(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.save_text_only(tmp_path))
    with pytest.raises(UnsupportedModelError, match="names no image token"):
        attach(model, Notes())


def test_what_is_neither_observer_nor_intervention_is_refused():
    with pytest.raises(TypeError, match="must be an Observer or an Intervention; got int"):
        attach(tiny.llava(), 5)
