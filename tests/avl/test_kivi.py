"""The full cache in few bits: what is stored how, against the slow statement of it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import avl
from avl.policies.checks import PolicyWarning
from tests import tiny
from tests.avl.generating import check_rows_alone, difference, generate, rows_alone


def rounded(numbers: Tensor, bits: int) -> Tensor:
    """A group of numbers as so many bits can say them, its limits in half precision."""
    low = numbers.min().half().float()
    step = ((numbers.max() - low) / (2**bits - 1)).half().float()
    if step == 0:
        return torch.full_like(numbers, float(low))
    return low + step * ((numbers - low) / step).round().clamp(0, 2**bits - 1)


def slow_keys(keys: Tensor, bits: int, groups: list[tuple[int, int]]) -> Tensor:
    """Keys of one head, (tokens, width), each channel of each group of tokens for itself."""
    out = keys.clone()
    for start, stop in groups:
        for channel in range(keys.shape[1]):
            out[start:stop, channel] = rounded(keys[start:stop, channel], bits)
    return out


def slow_values(values: Tensor, bits: int, count: int) -> Tensor:
    """Values of one head, (tokens, width), each token of the first `count` for itself."""
    out = values.clone()
    for token in range(count):
        out[token] = rounded(values[token], bits)
    return out


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_all_but_the_newest_keys_are_stored_in_few_bits(bits: int) -> None:
    model = tiny.llava(kv_heads=2, grid=12)
    inputs = tiny.inputs(model, [9])
    tokens, steps, newest = 3 + 144 + 9, 40, 16
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    with avl.adaptive(model, avl.KIVIPolicy(bits=bits, newest=newest)) as session:
        out = model.generate(**inputs, max_new_tokens=steps, **options)
    # The first layer's keys depend on the tokens alone: those of the same tokens in full precision.
    full = model(input_ids=out.sequences, pixel_values=inputs["pixel_values"], use_cache=True)
    layer, exact = out.past_key_values.layers[0].buffer, full.past_key_values.layers[0]
    keys, values = layer.everything()
    positions = layer.stored_positions()[0, 0].long()
    # 140 keys of the prompt in groups of 128, then the block quantised after 32 steps.
    last = tokens - newest
    groups = [(0, 128), (128, last), (last, last + 32)]
    slots = {int(p): slot for slot, p in enumerate(positions) if p >= 0}
    assert sorted(slots) == list(range(tokens + steps - 1))
    order = torch.tensor([slots[p] for p in range(tokens + steps - 1)])
    for head in range(2):
        expected = slow_keys(exact.keys[0, head, :-1], bits, groups)
        assert torch.allclose(keys[0, head, order], expected, atol=2e-3)
        expected = slow_values(exact.values[0, head, :-1], bits, last + 32)
        assert torch.allclose(values[0, head, order], expected, atol=2e-3)
    assert session.usage().attended_share == 1.0


def test_bytes_are_those_of_codes_limits_and_the_newest_keys() -> None:
    model = tiny.llava(kv_heads=2, grid=16)
    with avl.adaptive(model, avl.KIVIPolicy(bits=4, newest=16)) as session:
        out = model.generate(
            **tiny.inputs(model, [9]),
            max_new_tokens=60,
            do_sample=False,
            return_dict_in_generate=True,
        )
    usage = session.usage()
    buffers = [layer.buffer for layer in out.past_key_values.layers]
    stored = sum(t.nbytes for b in buffers for t in b.quantized.tensors())
    in_full = sum(t[:, :, : b.filled].nbytes for b in buffers for t in (b.keys, b.values))
    assert usage.filled == stored + in_full
    assert usage.filled < 0.36 * usage.full
    assert all(16 <= held < 16 + 32 for b in buffers for held in b.held_in_buffer())
    assert [step.held[0][0] for step in usage.steps] == list(range(268, 328))


def test_nothing_is_changed_while_all_keys_are_among_the_newest() -> None:
    model = tiny.llava(kv_heads=2)
    inputs = tiny.inputs(model, [25, 8], images=[1, 2], between=3)
    tokens, logits = generate(model, inputs)
    with (
        avl.adaptive(model, avl.KIVIPolicy(newest=500)),
        pytest.warns(PolicyWarning, match="newest=500 is no less than the .* nothing of it"),
    ):
        same_tokens, same_logits = generate(model, inputs)
    assert torch.equal(tokens, same_tokens)
    assert difference(logits, same_logits) < 1e-4


@pytest.mark.parametrize("bits", [8, 2])
def test_every_row_of_a_padded_batch_equals_that_row_alone(bits: int) -> None:
    model = tiny.llava(kv_heads=2, layers=3, grid=5)
    rows = rows_alone(model, [25, 50, 8], [1, 0, 2], between=11)
    policy = avl.KIVIPolicy(bits=bits, newest=20)
    # Past step 32, at which keys are quantised while decoding; later, roundings that differ in the
    # last bit are amplified by these sharp random models.
    check_rows_alone(model, *rows, policy, steps=38, tolerance=1e-3)


def test_a_budget_stands_for_bits_of_a_cache_of_sixteen() -> None:
    bits = [avl.KIVIPolicy.for_budget(share).bits for share in (1, 0.5, 0.49, 0.25, 0.1)]
    assert bits == [8, 8, 4, 4, 2]


def test_bits_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="bits must be one of 8, 4, 2"):
        avl.KIVIPolicy(bits=3)
