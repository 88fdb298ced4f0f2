"""Hooks observe without touching, follow the sequence, and leave nothing behind."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StoppingCriteria

import avl
from avl.arguments import cache_parameter, find_cache
from avl.families import UnsupportedModelError
from avl.hooks import HookError, Intervention, attach, attached
from tests import tiny
from tests.taps import Notes, Watch

PAST = "past_key_values"


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

    def fail(call, output):
        raise RuntimeError("in the middle of a layer")

    with pytest.raises(RuntimeError, match="in the middle"), attached(model, Watch(fail)):
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


# -- versions of transformers ----------------------------------------------------------------------


def test_a_cache_is_found_under_any_name():
    cache = DynamicCache()
    for name in ("cache", "past_key_values", "cache_params", "a_name_of_tomorrow"):
        assert find_cache({"input_ids": 1, name: cache}) is cache
    assert find_cache({"past_key_values": None, "use_cache": True}) is None


def test_a_decoder_names_the_parameter_that_takes_its_cache():
    name = cache_parameter(tiny.llava().get_decoder())
    assert name == ("cache" if Version(transformers.__version__) >= Version("5.24") else PAST)

    class Takes(torch.nn.Module):
        def forward(self, input_ids, kv=None):
            pass

    with pytest.raises(LookupError, match=r"known here \(cache, past_key_values, cache_params\)"):
        cache_parameter(Takes())


def test_decode_steps_whose_cache_cannot_be_found_are_refused_and_not_taken_for_prompts():
    model, notes = tiny.llava(), Notes()
    decoder = model.get_decoder()
    name = cache_parameter(decoder)

    def hide(module, args, kwargs):
        return args, {**kwargs, name: None}

    handle = decoder.register_forward_pre_hook(hide, with_kwargs=True)
    with attached(model, notes), pytest.raises(HookError, match="without a KV cache"):
        model.generate(**tiny.inputs(model), max_new_tokens=3)
    handle.remove()
    assert notes.begun == []


# -- threads ---------------------------------------------------------------------------------------


def in_thread(work):
    """What `work` returned or raised in a thread of its own."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001 - whatever it was is looked at
            found.append(error)

    thread = threading.Thread(target=run, name="bystander")
    thread.start()
    thread.join()
    return found[0]


def test_a_second_thread_is_refused_while_one_generates_and_the_first_goes_on():
    model, notes, errors = tiny.llava(), Notes(), []
    batch = tiny.inputs(model)
    plain = model.generate(**batch, max_new_tokens=5, do_sample=False)

    class Meanwhile(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            for other in (
                lambda: model.generate(**batch, max_new_tokens=2),
                lambda: model(**batch),
            ):
                errors.append(in_thread(other))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with attached(model, notes):
        watched = model.generate(
            **batch, max_new_tokens=5, do_sample=False, stopping_criteria=[Meanwhile()]
        )
    assert torch.equal(plain, watched)
    assert [kind for kind, *_ in notes.begun] == ["prefill"] + ["decode"] * 4
    assert len(errors) == 10
    assert all(isinstance(error, HookError) for error in errors)
    assert "running in another thread (MainThread)" in str(errors[0])


def test_threads_may_use_a_model_one_after_the_other():
    model, notes = tiny.llava(), Notes()
    batch = tiny.inputs(model)
    with attached(model, notes):
        for work in (lambda: model(**batch), lambda: model.generate(**batch, max_new_tokens=2)):
            assert not isinstance(in_thread(work), Exception)
            work()
    assert [kind for kind, *_ in notes.begun].count("prefill") == 4


def test_a_pass_that_raised_leaves_the_model_to_other_threads():
    model, notes = tiny.llava(), Notes()
    batch = tiny.inputs(model)
    with attached(model, notes):
        with pytest.raises(IndexError):
            model(**{**batch, "input_ids": batch["input_ids"] + 1000})
        assert not isinstance(in_thread(lambda: model(**batch)), Exception)


# -- odd uses --------------------------------------------------------------------------------------


def embeds_with_features(model, batch, ids):
    """Input embeddings of `ids` with image features where `batch` has image tokens."""
    embeds = model.get_input_embeddings()(ids).clone()
    features = model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
    embeds[batch["input_ids"] == tiny.IMAGE] = torch.cat(list(features))
    return embeds


def test_embeddings_made_from_the_ids_of_the_prompt_are_understood():
    model, notes = tiny.llava(), Notes()
    batch = tiny.inputs(model)
    with attached(model, notes), torch.no_grad():
        embeds = embeds_with_features(model, batch, batch["input_ids"])
        during = model(inputs_embeds=embeds).logits
    assert torch.equal(during, model(**batch).logits)
    assert notes.begun[0][:2] == ("prefill", 0)
    assert notes.layouts[0].images() == [1]


def test_embeddings_made_from_other_ids_than_the_image_placeholders_are_refused():
    model, notes = tiny.llava(), Notes()
    batch = tiny.inputs(model)
    masked = batch["input_ids"].masked_fill(batch["input_ids"] == tiny.IMAGE, tiny.PAD)
    with (
        attached(model, notes),
        torch.no_grad(),
        pytest.raises(HookError, match="cannot tell image from text"),
    ):
        model(inputs_embeds=embeds_with_features(model, batch, masked))


def test_another_attention_implementation_inside_is_refused_and_stays_the_users_choice():
    model = tiny.llava()
    with attached(model, Notes()):
        model.set_attn_implementation("eager")
        with pytest.raises(HookError, match="changed to 'eager' while the model is recorded"):
            model(**tiny.inputs(model))
    assert model.config.text_config._attn_implementation == "eager"
    with attached(model, Notes()):
        model(**tiny.inputs(model))


def test_a_copy_made_inside_is_a_plain_model_and_can_be_watched_itself():
    model, notes, others = tiny.llava(), Notes(), Notes()
    batch = tiny.inputs(model)
    expected = model.generate(**batch, max_new_tokens=3, do_sample=False)
    with attached(model, notes):
        model(**batch)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.model.vision_tower.embeddings.patch_embedding.weight.zero_()
        blind = twin.generate(**batch, max_new_tokens=3, do_sample=False)
        assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), expected)
    assert len(notes.begun) == 4
    assert torch.equal(twin.generate(**batch, max_new_tokens=3, do_sample=False), blind)
    with attached(twin, others):
        twin.generate(**batch, max_new_tokens=3, do_sample=False)
    assert len(others.begun) == 3
    assert not torch.equal(twin(**batch).logits, model(**batch).logits)  # it has its own weights


POLICIES = [
    avl.AdaptivePolicy(),
    avl.AdaptivePolicy(prefill=0.5, prefill_layer=1),
    avl.SCOPEPolicy(budget=0.5),
]
"""One that acts at the cache only, one that hooks into the layers, one into the image encoder."""


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_a_copy_made_under_a_policy_is_a_plain_model(policy):
    model = tiny.llava(kv_heads=2)
    batch = tiny.inputs(model)
    plain = model.generate(**batch, max_new_tokens=3, do_sample=False)
    with avl.adaptive(model, policy):
        before = model.generate(**batch, max_new_tokens=3, do_sample=False)
        twin = copy.deepcopy(model)
        assert torch.equal(twin.generate(**batch, max_new_tokens=3, do_sample=False), plain)
        assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), before)
    assert torch.equal(twin.generate(**batch, max_new_tokens=3, do_sample=False), plain)
    with avl.adaptive(twin, policy):
        assert torch.equal(twin.generate(**batch, max_new_tokens=3, do_sample=False), before)
    assert type(twin.config.text_config._attn_implementation) is str


def test_a_copy_does_not_keep_the_model_alive():
    model = tiny.llava()
    with avl.adaptive(model, avl.AdaptivePolicy()):
        twin = copy.deepcopy(model)
    gone = weakref.ref(model.get_decoder().layers[0])
    del model
    gc.collect()
    assert gone() is None
    assert twin.get_decoder().layers[0] is not None


@pytest.mark.parametrize("put", ["an observer", "a policy"])
def test_saving_a_whole_model_inside_says_what_to_do_instead(put, tmp_path):
    model = tiny.llava()
    inside = (
        attached(model, Notes())
        if put == "an observer"
        else avl.adaptive(model, avl.AdaptivePolicy())
    )
    saves = [
        lambda: torch.save(model, tmp_path / "m.pt"),
        lambda: pickle.dumps(model),
        lambda: torch.save(model.get_decoder(), tmp_path / "d.pt"),
    ]
    with inside:
        for save in saves:
            with pytest.raises(pickle.PicklingError, match=r"save_pretrained\(folder\)"):
                save()
        torch.save(model.state_dict(), tmp_path / "w.pt")
        model.save_pretrained(tmp_path / "folder")
        torch.save(model.config, tmp_path / "config.pt")
        config = torch.load(tmp_path / "config.pt", weights_only=False)
    assert config.text_config._attn_implementation == "sdpa"
    assert type(config.text_config._attn_implementation) is str
    weights = torch.load(tmp_path / "w.pt", weights_only=True)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    again = type(model).from_pretrained(tmp_path / "folder")
    assert torch.equal(again(**tiny.inputs(model)).logits, model(**tiny.inputs(model)).logits)
    # transformers adds hooks of its own at a model's first pass, which cannot be pickled, either
    assert pickle.dumps(tiny.llava())


def test_generate_and_encoding_are_the_models_own_methods_again_afterwards():
    model = tiny.llava()
    before = [dict(vars(module)) for module in model.modules()]
    with attached(model, Notes()):
        assert "generate" in vars(model)
    assert [dict(vars(module)).keys() for module in model.modules()] == [
        names.keys() for names in before
    ]
