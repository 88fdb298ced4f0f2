"""Keys and values in a few bits: stored alike by both versions, and attended to as if they had been
decoded.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from avl.kernels import backend, codes

compiled = pytest.mark.skipif(not backend.compiled_available(), reason="numba is not installed")
BACKENDS = [pytest.param("numba", marks=compiled), "torch"]


@pytest.fixture(params=BACKENDS)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which version of the kernels runs."""
    use(monkeypatch, request.param)
    return str(request.param)


def use(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(codes, "backend_for", lambda device: name)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers whose channels differ in size and offset."""
    scale = torch.logspace(-2, 2, shape[-1])
    drawn = torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed)
    ) * scale + 3 * scale.flip(0)
    return drawn.to(dtype)


def index(batch: int, heads: int, count: int, of: int) -> Tensor:
    """Some of the keys, in order, each row (and head) its own, a few places empty."""
    generator = torch.Generator().manual_seed(count)
    rows = [
        torch.randperm(of, generator=generator)[:count].sort().values for _ in range(batch * heads)
    ]
    chosen = torch.stack(rows).view(batch, heads, count)
    chosen[0, :, : count // 5] = -1
    return chosen


SHAPES = [(1, 1, 1, 1, 8), (2, 3, 40, 40, 7), (2, 2, 300, 211, 24), (1, 4, 260, 256, 64)]
"""Rows, heads, keys there are, keys chosen, width."""


@compiled
@pytest.mark.parametrize("bits", codes.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("apart", [False, True], ids=["packed", "heads beside one another"])
def test_both_versions_store_the_same_bytes(
    bits: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    apart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, heads, there, count, width = shape
    if apart:  # as projections leave them: the heads of a token next to one another
        source = numbers(batch, there, heads, width, dtype=dtype).transpose(1, 2)
    else:
        source = numbers(batch, heads, there, width, dtype=dtype)
    at = index(batch, heads if apart else 1, count, there)
    groups = (torch.arange(count) // 128).to(torch.int16).expand(batch, 1, -1)
    value_groups = 2 if width % 2 == 0 else 1
    results = []
    for name in ("torch", "numba"):
        use(monkeypatch, name)
        limits, own = (
            codes.key_limits(source, at, 128, bits),
            codes.value_limits(source, at, value_groups, bits),
        )
        stored = (
            codes.store_keys(source, at, groups, limits, bits),
            codes.store_values(source, at, own, bits),
        )
        results.append((limits, own, *stored))
    for plain, fast in zip(*results, strict=True):
        assert torch.equal(plain, fast)


@pytest.mark.parametrize("bits", codes.BITS)
def test_what_is_stored_is_within_half_a_step(version: str, bits: int) -> None:
    source, at = numbers(2, 3, 150, 24), index(2, 1, 150, 150).clamp_min(0)
    groups = (torch.arange(150) // 64).to(torch.int16).expand(2, 1, -1)
    limits, own = codes.key_limits(source, at, 64, bits), codes.value_limits(source, at, 3, bits)
    exact = codes.taken_at(source, at)
    keys = codes.read_keys(codes.store_keys(source, at, groups, limits, bits), groups, limits, bits)
    for part, read, step in zip(
        exact.split(64, 2), keys.split(64, 2), limits[:, :, :, 1].unbind(2), strict=True
    ):
        error = 0.51 * step.float()[:, :, None] + 2e-3 * part.abs().amax(2, keepdim=True)
        assert bool(((part - read).abs() <= error).all())
    values = codes.read_values(codes.store_values(source, at, own, bits), own, bits, 24)
    error = 0.51 * own[..., 1].float().repeat_interleave(8, -1) + 2e-3 * exact.abs().amax(
        -1, keepdim=True
    )
    assert bool(((exact - values).abs() <= error).all())


def stored_case(
    bits: int, heads: int, count: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes and limits of keys whose groups come in any order, and of values."""
    source = numbers(2, heads, count, width) / 50
    at = torch.arange(count).expand(2, 1, -1)
    shuffled = torch.randint(
        0, 3, (2, heads, count), generator=torch.Generator().manual_seed(3)
    ).to(torch.int16)
    limits = codes.key_limits(source, at.expand(2, 1, -1), -(-count // 3), bits)
    limits = limits if limits.shape[2] == 3 else limits.expand(-1, -1, 3, -1, -1).contiguous()
    own = codes.value_limits(source, at, 2 if width % 2 == 0 else 1, bits)
    stored = (
        codes.store_keys(source, at, shuffled, limits, bits),
        codes.store_values(source, at, own, bits),
    )
    return stored[0], shuffled, limits, stored[1], own


@pytest.mark.parametrize("bits", codes.BITS)
@pytest.mark.parametrize(
    ("heads", "shared", "count", "width"),
    [(2, 1, 211, 64), (2, 4, 1, 24), (1, 2, 40, 7), (3, 1, 2000, 128)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_attending_to_codes_equals_attending_to_what_they_stand_for(
    version: str, bits: int, heads: int, shared: int, count: int, width: int, threads: int
) -> None:
    keys, groups, limits, values, own = stored_case(bits, heads, count, width)
    query = torch.randn(2, heads * shared, width, generator=torch.Generator().manual_seed(4))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        products = codes.key_products(query, keys, groups, limits, bits)
        weights = torch.softmax(products / 10, -1) * (torch.arange(count) % 3 > 0)
        sums = codes.weighted_values(weights, values, own, bits, width)
    finally:
        torch.set_num_threads(before)
    plain = codes.read_keys(keys, groups, limits, bits).double().repeat_interleave(shared, 1)
    expected = (query.double()[:, :, None] @ plain.transpose(-1, -2))[:, :, 0]
    assert float((products - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    read = codes.read_values(values, own, bits, width).double().repeat_interleave(shared, 1)
    expected = (weights.double()[:, :, None] @ read)[:, :, 0]
    assert float((sums - expected).abs().max()) <= 1e-5 * max(float(expected.abs().max()), 1.0)


def test_gradients_reach_the_query_and_the_weights(version: str) -> None:
    keys, groups, limits, values, own = stored_case(4, 2, 50, 64)
    query = torch.randn(2, 2, 64, requires_grad=True)
    products = codes.key_products(query, keys, groups, limits, 4)
    codes.weighted_values(torch.softmax(products / 10, -1), values, own, 4, 64).sum().backward()
    assert query.grad is not None
    assert bool((query.grad != 0).any())
    with torch.no_grad():
        assert not codes.key_products(query, keys, groups, limits, 4).requires_grad


def test_values_without_weight_are_not_read(version: str) -> None:
    _, _, _, values, own = stored_case(4, 2, 50, 64)
    own[:, :, 10:] = torch.finfo(torch.float16).max
    weights = torch.rand(2, 2, 50, generator=torch.Generator().manual_seed(5))
    weights[..., 10:] = 0
    few = codes.weighted_values(weights[..., :10], values[:, :, :10], own[:, :, :10], 4, 64)
    assert torch.allclose(
        codes.weighted_values(weights, values, own, 4, 64), few, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("bits", codes.BITS)
def test_keys_that_are_no_numbers_are_stored_as_something_and_the_others_as_they_were(
    version: str, bits: int
) -> None:
    source, at = numbers(1, 2, 30, 8), torch.arange(30).view(1, 1, -1)
    groups = torch.zeros(1, 1, 30, dtype=torch.int16)
    limits = codes.key_limits(source, at, 30, bits)
    before = codes.store_keys(source, at, groups, limits, bits)
    source[0, 1, 5] = torch.nan
    after = codes.store_keys(source, at, groups, limits, bits)
    assert torch.equal(
        torch.cat([before[:, :, :5], before[:, :, 6:]], 2),
        torch.cat([after[:, :, :5], after[:, :, 6:]], 2),
    )
    assert bool((after[0, 1, 5] == 0).all())


@pytest.mark.parametrize("bits", codes.BITS)
@pytest.mark.parametrize("width", [8, 7, 1])
def test_codes_survive_packing(bits: int, width: int) -> None:
    drawn = torch.randint(
        0, 2**bits, (3, 5, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    packed = codes.pack(drawn, bits)
    assert packed.shape[-1] == codes.packed_width(width, bits)
    assert torch.equal(codes.unpack(packed, bits, width), drawn)
