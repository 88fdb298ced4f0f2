"""A decode step's attention in one call, against the same in float64, with and without codes."""

from __future__ import annotations

import pytest
import torch

from avl.kernels import backend, row_attention, row_products
from avl.quantized_tier import QuantizedTier

pytestmark = pytest.mark.skipif(not backend.compiled_available(), reason="numba is not installed")


@pytest.mark.parametrize("bits", [None, 8, 4, 2, (8, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "kv_heads", "shared", "width"),
    [(1, 1, 1, 8), (1, 2, 3, 32), (2, 3, 4, 64), (1, 1, 2, 96)],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_it_is_the_softmax_over_decoded_and_full_keys(
    bits, dtype, batch, kv_heads, shared, width, threads, monkeypatch
):
    monkeypatch.setattr(row_products, "_SMALL", 1)
    generator = torch.Generator().manual_seed(0)
    # As a cache keeps them: heads beside one another, and the part of a larger buffer.
    both = torch.randn(2, batch, 150, kv_heads, width, generator=generator).to(dtype)
    keys, values = both.transpose(2, 3)[..., 3:140, :]
    query = torch.randn(batch, 1, kv_heads * shared, width, generator=generator).to(dtype)
    query, tier, codes = query.transpose(1, 2), None, None
    every_key, every_value = keys, values
    if bits is not None:
        positions, chosen = torch.arange(137)[None, None], torch.arange(2, 132)[None, None]
        positions, chosen = positions.expand(batch, 1, -1), chosen.expand(batch, 1, -1)
        tier = QuantizedTier.hold(bits, keys, values, positions, chosen, [])
        codes = tier.codes()
        tier.dtype = torch.float32  # what is stored, not rounded to bfloat16 again
        decoded = tier.read()
        every_key, every_value = (
            torch.cat([a.float(), b.float()], 2)
            for a, b in zip(decoded, (keys, values), strict=True)
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output, weights = row_attention.row_attention(query, keys, values, 0.3, codes)
    finally:
        torch.set_num_threads(before)
    wide = [t.double().repeat_interleave(shared, 1) for t in (every_key, every_value)]
    expected = torch.softmax(query.double() @ wide[0].transpose(2, 3) * 0.3, -1)
    assert weights.shape == (batch, kv_heads, shared, every_key.shape[2])
    assert float((weights.flatten(1, 2)[:, :, None] - expected).abs().max()) < 1e-5
    assert float((output - (expected @ wide[1]).transpose(1, 2)).abs().max()) < 1e-5


def test_codes_that_are_exchanged_are_read_as_they_are_now():
    keys, values = torch.randn(2, 1, 2, 20, 8)
    every = torch.arange(20)[None, None]
    tier = QuantizedTier.hold(8, keys, values, every, every[..., :12], [every[..., 12:]])
    query = torch.randn(1, 2, 1, 8)
    tail = keys[:, :, 18:], values[:, :, 18:]
    before, _ = row_attention.row_attention(query, *tail, 1.0, tier.codes())
    slots = torch.tensor([0, 5])
    tier.put(0, slots, 5 * keys[0, :, 13:15], 9 * values[0, :, 13:15], every[0, :, 13:15].int())
    after, _ = row_attention.row_attention(query, *tail, 1.0, tier.codes())
    decoded = [torch.cat(pair, 2) for pair in zip(tier.read(), tail, strict=True)]
    expected = torch.softmax(query @ decoded[0].transpose(2, 3), -1) @ decoded[1]
    assert float((after - before).abs().max()) > 1e-3
    assert float((after - expected.transpose(1, 2)).abs().max()) < 1e-5


def test_a_key_that_is_no_number_breaks_the_output():
    keys, values = torch.randn(2, 1, 1, 6, 8)
    keys[0, 0, 2, 3] = torch.nan
    output, weights = row_attention.row_attention(torch.ones(1, 1, 1, 8), keys, values, 1.0)
    assert bool(output.isnan().all() & weights.isnan().all())
