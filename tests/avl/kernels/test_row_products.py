"""One row against keys and values of any precision, however these lie in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from avl.kernels import backend, row_products

VERSIONS = [
    pytest.param(
        "numba",
        marks=pytest.mark.skipif(not backend.compiled_available(), reason="numba is not installed"),
    ),
    "torch",
]


SIZES = [(1, 1, 1, 1), (3, 1, 77, 24), (2, 4, 502, 64)]


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The version that runs; the compiled one on the smallest inputs, too."""
    monkeypatch.setattr(row_products, "backend_for", lambda device: request.param)
    monkeypatch.setattr(row_products, "_SMALL", 1)
    monkeypatch.setattr(row_products, "_FEW", 1)
    return request.param


def as_cached(heads: int, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """As a cache keeps them: the part of a larger buffer, heads beside one another."""
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(count + 5, heads, width, generator=generator).to(dtype)
    return buffer.transpose(0, 1)[:, 2 : 2 + count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "shared", "count", "width"), SIZES)
def test_products_are_those_of_the_numbers_in_float64(
    version: str, threads: int, dtype: torch.dtype, heads: int, shared: int, count: int, width: int
) -> None:
    keys = as_cached(heads, count, width, dtype)
    query = torch.randn(heads * shared, width, generator=torch.Generator().manual_seed(1))
    found = row_products.row_products(query, keys)
    repeated = keys.double().repeat_interleave(shared, 0)
    expected = (repeated @ query.double()[:, :, None])[..., 0]
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "shared", "count", "width"), SIZES)
def test_sums_are_those_of_the_numbers_in_float64(
    version: str, threads: int, dtype: torch.dtype, heads: int, shared: int, count: int, width: int
) -> None:
    values = as_cached(heads, count, width, dtype)
    generator = torch.Generator().manual_seed(1)
    weights = torch.softmax(torch.randn(heads * shared, count, generator=generator), -1)
    weights[:, 4:12] = 0.0  # two fours that are not attended
    found = row_products.row_sums(weights, values)
    repeated = values.double().repeat_interleave(shared, 0)
    expected = (weights.double()[:, None] @ repeated)[:, 0]
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_numbers_reach_the_sums(version: str, dtype: torch.dtype) -> None:
    weights = torch.zeros(1, 9)
    weights[0, 5] = torch.nan
    assert bool(row_products.row_sums(weights, as_cached(1, 9, 8, dtype)).isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 6, 195)])
def test_means_over_heads(version: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(row_products.head_means(weights), weights.mean(1))
    with_gradient = weights.clone().requires_grad_()
    row_products.head_means(with_gradient).sum().backward()
    assert with_gradient.grad is not None
    parts = weights.repeat(1, 1, 2)[..., ::2]  # numbers that do not lie side by side
    torch.testing.assert_close(row_products.head_means(parts), parts.mean(1))
