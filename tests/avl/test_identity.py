"""Policies that keep everything change nothing, and leaving a policy leaves the model as it was."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import avl
from tests import tiny
from tests.avl.generating import difference, generate

NEUTRAL = {
    "full": avl.FullPolicy(),
    "S = C = 1": avl.AdaptivePolicy(secondary=1, core=1, text=None),
    "S = C = T = 1": avl.AdaptivePolicy(secondary=1, core=1, text=1, prefill=1.0, prefill_layer=1),
    "all rules off": avl.AdaptivePolicy(secondary=None, core=None, text=None),
}
SETUPS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "MHA": ({}, {}, {}),
    "GQA": ({"kv_heads": 2}, {}, {}),
    "eager": ({"kv_heads": 2, "attn": "eager"}, {"batch": [9, 4]}, {}),
    "padded batch": ({}, {"batch": [9, 30, 5]}, {}),
    "images differ": ({"kv_heads": 2}, {"batch": [9, 30, 5], "images": [1, 0, 2]}, {}),
    "two images": ({}, {"images": 2, "between": 4}, {}),
    "no image": ({}, {"images": 0, "batch": [25, 30]}, {}),
    "beam search": ({}, {"batch": [9, 4]}, {"num_beams": 3}),
    "sampling": ({}, {"batch": [9, 4]}, {"do_sample": True}),
    "several samples": ({}, {"batch": [9, 4]}, {"do_sample": True, "num_return_sequences": 2}),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_policies_that_keep_everything_equal_no_policy(setup: str) -> None:
    model_options, batch, options = SETUPS[setup]
    model = tiny.llava(**model_options)
    inputs = tiny.inputs(model, **batch)
    tokens, logits = generate(model, inputs, **options)
    for name, policy in NEUTRAL.items():
        with avl.adaptive(model, policy) as session:
            same_tokens, same_logits = generate(model, inputs, **options)
        assert torch.equal(tokens, same_tokens), name
        assert difference(logits, same_logits) < 1e-4, name
        assert session.usage().filled_share == 1.0, name
    again, again_logits = generate(model, inputs, **options)
    assert torch.equal(tokens, again)
    assert torch.equal(logits, again_logits)


def test_a_plain_forward_call_without_a_cache_object_equals_no_policy() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [9, 4])
    with torch.no_grad():
        logits = model(**inputs).logits
        with avl.adaptive(model, avl.AdaptivePolicy()) as session:
            output = model(**inputs)
    assert torch.equal(logits, output.logits)
    assert output.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    assert session.usage().filled_share < 1


def test_the_prefill_filter_computes_the_last_row_and_marks_rows_that_left_as_not_a_number() -> (
    None
):
    model = tiny.llava(layers=3)
    inputs = tiny.inputs(model, [9])
    policy = avl.AdaptivePolicy(secondary=None, core=None, text=None, prefill=0.5, prefill_layer=2)
    with torch.no_grad(), avl.adaptive(model, policy):
        logits = model(**inputs).logits
    missing = logits[0].isnan().all(-1)
    assert logits.shape[1] == inputs["input_ids"].shape[1]
    assert int(missing.sum()) == 8
    assert not missing[[0, 1, 2, *range(19, 28)]].any()


class Interrupted(Exception):
    pass


def interrupt_after(calls: int) -> Callable[..., torch.Tensor]:
    remaining = [calls]

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise Interrupted
        return scores

    return processor


def snapshot(model: torch.nn.Module) -> list[Any]:
    """Everything a session touches: hooks of every module, and the attention implementation of
    every config.
    """
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs))
        for name, m in model.named_modules()
    ]
    names = [
        (name, type(m.config._attn_implementation_internal), m.config._attn_implementation_internal)
        for name, m in model.named_modules()
        if hasattr(m, "config") and hasattr(m.config, "_attn_implementation_internal")
    ]
    return [hooks, names]


@pytest.mark.parametrize(
    "policy", [avl.AdaptivePolicy(prefill=0.6, prefill_layer=1), avl.VLCachePolicy(budget=0.5)]
)
def test_an_exception_mid_generation_leaves_the_model_bit_identical(policy: avl.Policy) -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [30, 4])
    tokens, logits = generate(model, inputs)
    before = snapshot(model)
    with pytest.raises(Interrupted), avl.adaptive(model, policy):
        generate(model, inputs, logits_processor=[interrupt_after(5)])
    assert snapshot(model) == before
    again, again_logits = generate(model, inputs)
    assert torch.equal(tokens, again)
    assert torch.equal(logits, again_logits)


def test_an_exception_inside_the_model_leaves_a_session_that_works() -> None:
    model = tiny.llava()
    inputs = tiny.inputs(model, [30])
    policy = avl.AdaptivePolicy(text=0.4)

    def explode(*_: Any) -> None:
        raise Interrupted

    with avl.adaptive(model, policy):
        tokens, logits = generate(model, inputs)
    with avl.adaptive(model, policy):
        hook = model.model.language_model.layers[1].mlp.register_forward_hook(explode)
        with pytest.raises(Interrupted):
            generate(model, inputs)
        hook.remove()
        again, again_logits = generate(model, inputs)
    assert torch.equal(tokens, again)
    assert torch.equal(logits, again_logits)


def test_two_threads_with_two_models_do_not_disturb_each_other() -> None:
    setups = [
        (tiny.llava(seed=1), avl.AdaptivePolicy(text=0.4)),
        (tiny.llava(kv_heads=2, seed=2), avl.H2OPolicy(budget=0.5)),
    ]
    expected = []
    for model, policy in setups:
        with avl.adaptive(model, policy):
            expected.append(generate(model, tiny.inputs(model, [25, 4]), 20)[1])
    results: list[Any] = [None, None]
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        model, policy = setups[index]
        inputs = tiny.inputs(model, [25, 4])
        for _ in range(3):
            with avl.adaptive(model, policy):
                barrier.wait()
                out = model.generate(
                    **inputs,
                    max_new_tokens=20,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            results[index] = torch.stack(out.logits)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, logits in zip(results, expected, strict=True):
        assert torch.equal(result, logits)
