"""The decode step's own attention against the weights computed for all rows."""

from typing import Any

import pytest
import torch
from torch import nn

from avl import attention
from avl.attention import AttentionCall, Forward, attend_one_row, attention_weights
from avl.tokens import token_layout


def call(dtype: torch.dtype, kv_heads: int, **options: Any) -> AttentionCall:
    """Four query heads, two rows; keys and values are views of a larger buffer, as in a cache."""
    generator = torch.Generator().manual_seed(0)
    forward = Forward(
        "decode", 1, 8, 1, token_layout(torch.ones(2, 9, dtype=torch.long), [5]), None
    )
    buffers = torch.randn(2, 2, kv_heads, 40, 16, generator=generator).to(dtype)
    key, value = buffers[..., 7:33, :]
    query = 3 * torch.randn(2, 4, 1, 16, generator=generator).to(dtype)
    return AttentionCall(forward, 0, nn.Module(), query, key, value, None, 0.25, options)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 1.5}, {"s_aux": torch.tensor([0.5, 2.0, -1.0, 4.0])}],
    ids=["plain", "softcap", "sinks"],
)
def test_one_row_gives_the_weights_and_the_weighted_sum_of_values(
    kv_heads: int, options: dict[str, Any]
) -> None:
    one = call(torch.float32, kv_heads, **options)
    empty = torch.zeros(2, 1, 26, dtype=torch.bool)
    empty[1, :, :5] = True
    one.mask = ~empty[:, :, None]
    output, weights = attend_one_row(one, empty)
    expected = attention_weights(one)
    assert weights.shape == (2, kv_heads, 4 // kv_heads, 26)
    assert torch.allclose(weights.reshape(2, 4, 1, 26), expected, atol=1e-6)
    value = one.value.repeat_interleave(one.groups, 1)
    assert torch.allclose(output, torch.einsum("bhqk,bhkd->bqhd", expected, value), atol=1e-5)


def test_half_precision_in_pieces_equals_half_precision_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = call(torch.float16, 4)
    output, weights = attend_one_row(one)
    for size in (1, 2000, 10**9):
        monkeypatch.setattr(attention, "_COPIED_BYTES", size)
        again, again_weights = attend_one_row(one)
        assert torch.equal(weights, again_weights)
        assert torch.equal(output, again)
    exact, _ = attend_one_row(call(torch.float32, 4))
    assert (output - exact).abs().max() < 0.1


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_bfloat16_is_rounded_once_at_the_end(kv_heads: int) -> None:
    one = call(torch.bfloat16, kv_heads)
    output, weights = attend_one_row(one)
    wide = call(torch.bfloat16, kv_heads)
    wide.query, wide.key, wide.value = (t.double() for t in (wide.query, wide.key, wide.value))
    key, value = (t.repeat_interleave(wide.groups, 1) for t in (wide.key, wide.value))
    expected = torch.softmax(wide.query @ key.transpose(2, 3) * wide.scaling, -1)
    assert output.dtype == torch.bfloat16
    assert torch.allclose(weights.reshape(2, 4, 1, 26).double(), expected, atol=1e-6)
    exact = (expected @ value).transpose(1, 2)
    assert bool(((output - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all())


def test_gradients_pass_through_a_decode_step() -> None:
    one = call(torch.float32, 2)
    one.query.requires_grad_()
    output, _ = attend_one_row(one)
    output.sum().backward()
    assert one.query.grad is not None
    assert bool((one.query.grad != 0).any())
