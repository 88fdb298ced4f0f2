"""Which version of the kernels runs, and what threads of their own leave behind: nothing."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch

import avl
from avl.kernels import backend
from tests import tiny
from tests.avl.generating import difference, generate


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it raises ImportError
    backend.compiled_available.cache_clear()
    yield
    backend.compiled_available.cache_clear()


def test_devices_other_than_processors_run_the_plain_version() -> None:
    assert backend.backend_for("cuda:1") == "torch"
    assert backend.backend_for(torch.device("meta")) == "torch"


@pytest.mark.usefixtures("without_numba")
def test_without_numba_everything_works_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.llava(kv_heads=2)
    inputs, preset = tiny.inputs(model, [9, 30]), avl.AdaptivePolicy.with_cold_tier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with avl.adaptive(model, preset) as session:
            tokens, logits = generate(model, inputs, 6)
        assert session.usage().kernels == "torch"
        with avl.adaptive(model, preset):
            generate(model, inputs, 2)
    assert sum("numba" in str(warning.message) for warning in caught) == 1
    monkeypatch.undo()
    backend.compiled_available.cache_clear()
    if backend.compiled_available():
        with avl.adaptive(model, preset) as session:
            same, same_logits = generate(model, inputs, 6)
        assert session.usage().kernels == "numba"
        assert torch.equal(tokens, same)
        assert difference(logits, same_logits) < 1e-4


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_work_is_divided_among_threads_that_use_one_thread_of_torch_each() -> None:
    barrier = threading.Barrier(3, timeout=250)

    def work(item: int) -> tuple[int, int, bool]:
        barrier.wait()  # three threads have to be here at the same time
        return 10 * item, torch.get_num_threads(), torch.is_grad_enabled()

    assert backend.on_threads(work, range(6)) == [(10 * item, 1, False) for item in range(6)]
    assert torch.get_num_threads() == 3
    seen: list[int] = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [3]


@pytest.mark.usefixtures("three_threads")
def test_an_error_in_a_thread_is_raised_where_the_work_was_given() -> None:
    def work(item: int) -> int:
        return 1 // item

    with pytest.raises(ZeroDivisionError):
        backend.on_threads(work, [1, 0, 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", ["highest", "medium"])
def test_products_are_as_exact_as_their_numbers_and_the_callers_setting_comes_back(
    dtype: torch.dtype, wanted: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(64, 128, generator=generator).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        with backend.products_in_float32(one, other):
            found = one.float() @ other.float().T
        assert torch.get_float32_matmul_precision() == wanted
        with pytest.raises(KeyError), backend.products_in_float32(one):
            raise KeyError
        assert torch.get_float32_matmul_precision() == wanted
    finally:
        torch.set_float32_matmul_precision(before)
    assert float((found - one.double() @ other.double().T).abs().max()) < 5e-5


@pytest.mark.skipif(not backend.compiled_available(), reason="numba is not installed")
def test_machine_code_on_disk_is_that_of_the_sources_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from avl.kernels import compiled, slots_compiled

    function = slots_compiled.drop_worst
    arguments = (), function.targetctx.codegen()
    before = function._cache._index_key(*arguments)
    assert function._cache._index_key(*arguments) == before
    # A change in any file of the folder, for example of a function that this one calls.
    monkeypatch.setattr(compiled, "_SOURCES", "others")
    assert function._cache._index_key(*arguments) != before
