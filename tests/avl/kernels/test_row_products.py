"""Products of one row with keys of any precision, however these lie in memory."""

from __future__ import annotations

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


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "shared", "count", "width"), [(1, 1, 1, 1), (3, 1, 77, 24), (2, 4, 500, 64)]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_products_are_those_of_the_numbers_in_float64(
    version: str,
    dtype: torch.dtype,
    heads: int,
    shared: int,
    count: int,
    width: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(row_products, "backend_for", lambda device: version)
    monkeypatch.setattr(row_products, "_SMALL", 1)
    generator = torch.Generator().manual_seed(0)
    # As a cache keeps them: the part of a larger buffer, heads beside one another.
    keys = torch.randn(count + 5, heads, width, generator=generator).to(dtype)
    keys = keys.transpose(0, 1)[:, 2 : 2 + count]
    query = torch.randn(heads * shared, width, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = row_products.row_products(query, keys)
    finally:
        torch.set_num_threads(before)
    repeated = keys.double().repeat_interleave(shared, 0)
    expected = (repeated @ query.double()[:, :, None])[..., 0]
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 1e-5
