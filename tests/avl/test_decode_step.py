"""The usual decode step, one compiled call a layer, against the same step in single operations."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import avl
from avl.buffer import KeyBuffer
from avl.families import UnsupportedModelError
from avl.kernels import backend
from avl.kernels.row_attention import SlotAttention
from avl_analysis.capture.recorder import record
from tests import tiny
from tests.avl.generating import generate
from tests.avl_analysis.recorded import close

needs_numba = pytest.mark.skipif(not backend.compiled_available(), reason="numba is not installed")
POLICIES = {
    "full": avl.FullPolicy(),
    "a-vl": avl.AdaptivePolicy(),
    "text alone": avl.AdaptivePolicy(secondary=None, core=None, text=0.3),
    "budget": avl.AdaptivePolicy.for_budget(0.6),
    "drift": avl.AdaptivePolicy(drift=0.95),
    "sparse": avl.AdaptivePolicy(sparse_refresh=True, refresh_every=1, core=0.2),
    "preset": avl.AdaptivePolicy.with_cold_tier(),
    "preset of a budget": avl.AdaptivePolicy.with_cold_tier(0.5),
    "mixed bits": avl.AdaptivePolicy.with_cold_tier(cold=(8, 4)),
    "core and tier": avl.AdaptivePolicy(secondary=0.4, core=0.2, cold=4),
    "host": avl.AdaptivePolicy(secondary=0.4, core=0.2, cold="host"),
    "h2o": avl.H2OPolicy.for_budget(0.6),
    "snapkv": avl.SnapKVPolicy(budget=0.5, window=4),
    "kivi": avl.KIVIPolicy(newest=16),
}
BATCHES: dict[str, dict[str, Any]] = {
    "one row": {"batch": [9]},
    "equal rows": {"batch": [9, 9]},
    "padded": {"batch": [9, 30, 5]},
    "images differ": {"batch": [9, 30], "images": [1, 2]},
}


@contextmanager
def in_single_operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No step is the usual one."""
    with monkeypatch.context() as patch:
        patch.setattr(KeyBuffer, "slot_attention", lambda *args, **options: None)
        yield


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an entry at each call of a prepared attention."""
    calls: list[int] = []
    attend = SlotAttention.__call__

    def watched(self: SlotAttention, *args: Any) -> Any:
        calls.append(1)
        return attend(self, *args)

    monkeypatch.setattr(SlotAttention, "__call__", watched)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", POLICIES)
def test_both_ways_give_the_same_answer_and_hold_the_same_keys(
    name: str, batch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.llava(kv_heads=2).to(dtype)
    inputs = tiny.inputs(model, **BATCHES[batch])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with avl.adaptive(model, POLICIES[name]) as session:
        tokens, logits = generate(model, inputs, steps=8)
    usage, selection = session.usage(), session.selection
    with in_single_operations(monkeypatch), avl.adaptive(model, POLICIES[name]) as plain:
        same_tokens, same_logits = generate(model, inputs, steps=8)
    if dtype == torch.float32:
        assert torch.equal(tokens, same_tokens)
        torch.testing.assert_close(logits, same_logits, rtol=0, atol=1e-4)
        assert usage == plain.usage()
        for layer in selection.layers:
            assert torch.equal(selection.state(layer), plain.selection.state(layer))
    else:  # sums are rounded differently, and near ties then fall differently
        torch.testing.assert_close(logits[0], same_logits[0], rtol=0, atol=0.05)
        assert [step.filled for step in usage.steps] == [s.filled for s in plain.usage().steps]


@needs_numba
@pytest.mark.parametrize("name", ["full", "a-vl", "preset", "h2o", "budget"])
def test_generate_calls_one_compiled_attention_for_each_layer_and_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.llava(kv_heads=2)
    inputs, calls = tiny.inputs(model, [9]), counted(monkeypatch)
    writes: list[int] = []
    monkeypatch.setattr(KeyBuffer, "write", lambda *args: writes.append(1))
    with avl.adaptive(model, POLICIES[name]) as session:
        generate(model, inputs, steps=6)
    steps = sum(step.step > 0 for step in session.usage().steps)
    assert steps >= 5
    assert len(calls) == steps * len(session.usage().layers)
    assert not writes


@needs_numba
def test_rows_of_different_lengths_take_single_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny.llava(), counted(monkeypatch)
    with avl.adaptive(model, avl.FullPolicy()):
        generate(model, tiny.inputs(model, [9, 30]), steps=3)
    assert not calls


@contextmanager
def keys_changed_by(
    model: nn.Module, change: Callable[[Tensor], Tensor], prompts: bool
) -> Iterator[None]:
    """A model that changes keys between its cache and its attention.

    Args:
        model: the model.
        change: what is done with keys.
        prompts: whether it is done in a prompt, too.
    """
    name = model.get_decoder().config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def changed(module: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        key = change(key) if prompts or query.shape[2] == 1 else key
        return attend(module, query, key, *args, **options)

    ALL_ATTENTION_FUNCTIONS.register(name, changed)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(name, attend)


@pytest.mark.parametrize("name", ["full", "a-vl", "preset"])
def test_a_model_that_copies_the_keys_of_its_cache_gives_the_same_answer(name: str) -> None:
    model = tiny.llava(kv_heads=2)
    inputs = tiny.inputs(model, [9])
    with avl.adaptive(model, POLICIES[name]):
        tokens, logits = generate(model, inputs, steps=6)
        with keys_changed_by(model, lambda key: key.clone(), prompts=True):
            same_tokens, same_logits = generate(model, inputs, steps=6)
    assert torch.equal(tokens, same_tokens)
    torch.testing.assert_close(logits, same_logits, rtol=0, atol=1e-4)


def test_a_model_that_changes_keys_in_decode_steps_only_is_refused() -> None:
    model = tiny.llava(kv_heads=2)
    inputs = tiny.inputs(model, [9])
    with (
        avl.adaptive(model, avl.FullPolicy()),
        keys_changed_by(model, lambda key: 2 * key, prompts=False),
        pytest.raises(UnsupportedModelError, match="not the 1 its cache returned"),
    ):
        generate(model, inputs, steps=3)


@needs_numba
def test_a_recorder_sees_all_keys_of_the_usual_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llava(kv_heads=2)
    inputs, calls = tiny.inputs(model, [9]), counted(monkeypatch)
    for name in ("full", "a-vl", "preset"):
        with avl.adaptive(model, POLICIES[name]), record(model, keep="attention") as found:
            generate(model, inputs, steps=6)
        assert calls
        policy = POLICIES[name]
        with (
            in_single_operations(monkeypatch),
            avl.adaptive(model, policy),
            record(model, keep="attention") as expected,
        ):
            generate(model, inputs, steps=6)
        assert found.names == expected.names
        for variable in found.names:
            close(found[variable], expected[variable], 1e-3 if "fit" in variable else 1e-5)


def test_a_step_that_needs_gradients_keeps_them() -> None:
    model = tiny.llava(kv_heads=2)
    inputs = tiny.inputs(model, [9])
    with avl.adaptive(model, avl.FullPolicy()):
        with torch.no_grad():
            output = model(**inputs)
        token = output.logits[:, -1:].argmax(-1)
        model(input_ids=token, past_key_values=output.past_key_values).logits.sum().backward()
    gradient = model.get_decoder().layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0


@needs_numba
@pytest.mark.parametrize("name", ["a-vl", "preset"])
def test_a_copy_of_a_buffer_leaves_the_original_alone(name: str) -> None:
    model = tiny.llava(kv_heads=2)
    inputs = tiny.inputs(model, [9])
    with avl.adaptive(model, POLICIES[name]), torch.no_grad():
        output = model(**inputs)
        token = output.logits[:, -1:].argmax(-1)
        model(input_ids=token, past_key_values=output.past_key_values)  # makes the tables
        buffer = output.past_key_values.layers[0].filled_buffer
        before = copy.deepcopy(buffer)
        another = copy.deepcopy(buffer)
    query, key, value = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
    options = {"refresh": True, "accumulate": False, "weights_wanted": True}
    attention = another.slot_attention(another.reserve(), 99, 0.0, **options)
    assert attention is not None
    _, weights = attention(query, 0.3, key, value)
    for one, same in zip(buffer.tensors(), before.tensors(), strict=True):
        # Slots that are not in use hold whatever was in memory, which may be no number.
        torch.testing.assert_close(one, same, rtol=0, atol=0, equal_nan=True)
    assert bool(another.positions.eq(99).any())
    # Its own codes were read, and its own key.
    assert weights is not None
    keys, _ = another.decoded(refresh=True)
    wide = keys.float().repeat_interleave(2, 1)
    expected = torch.softmax(query @ wide.transpose(2, 3) * 0.3, -1)
    torch.testing.assert_close(weights.flatten(1, 2)[:, :, None], expected, rtol=0, atol=1e-5)
