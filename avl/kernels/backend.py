"""Which version of the kernels runs, and how their work is divided among threads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Barrier, Lock, Thread
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

COMPILED, REFERENCE = "numba", "torch"
"""Names of the two versions, as they stand in provenance and in `usage()`."""

_POOLS: dict[int, ThreadPoolExecutor] = {}
_POOLS_LOCK = Lock()


def backend_for(device: torch.device | str) -> str:
    """Which version of the kernels runs on a device.

    "numba" (compiled, processors only) or "torch" (the reference).
    """
    return COMPILED if torch.device(device).type == "cpu" and compiled_available() else REFERENCE


@cache
def compiled_available() -> bool:
    """Whether numba can be imported; warns, once, where it cannot."""
    try:
        import numba  # noqa: F401 -- imported by the compiled kernels, too; takes a while
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        # Not only where it is missing: numba refuses versions of NumPy it does not know, and
        # looks into other packages, which may be broken.
        warnings.warn(
            f"numba cannot be imported ({error}), so recording and quantised keys run on plain"
            " torch operations, several times slower on a processor; `pip install numba` brings"
            " the compiled kernels",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def on_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The function's results for all items, on as many threads as torch uses.

    Each item runs on one of them.

    Inside a thread torch's own operations are single-threaded, so that the threads do not compete
    for the processor. This pays where the function spends its time in compiled code that releases
    Python's lock (torch operations, numba's `nogil` functions, NumPy's sorting).
    """
    if len(items) <= 1 or torch.get_num_threads() <= 1:
        return [function(item) for item in items]

    inference = torch.is_inference_mode_enabled()

    def without_gradients(item: Item) -> Result:
        # Whether gradients are recorded is a setting of each thread.
        with torch.inference_mode(inference), torch.no_grad():
            return function(item)

    return list(_pool(torch.get_num_threads()).map(without_gradients, items))


def _pool(threads: int) -> ThreadPoolExecutor:
    with _POOLS_LOCK:
        if threads not in _POOLS:
            pool = ThreadPoolExecutor(threads, "avl-kernels")
            barrier = Barrier(threads)

            def start(_: int) -> None:
                barrier.wait()  # one task for each thread, and all threads are there
                torch.get_num_threads()  # gives a new thread the process's number, once
                torch.set_num_threads(1)

            # OpenMP keeps the number of threads for each thread. torch also keeps one for the
            # process, which threads that start later read; it is put back by a thread that has no
            # number of its own to lose.
            list(pool.map(start, range(threads)))
            restore = Thread(target=torch.set_num_threads, args=(threads,))
            restore.start()
            restore.join()
            _POOLS[threads] = pool
        return _POOLS[threads]


def _forget_pools() -> None:
    """Threads do not survive a fork; the child starts its own."""
    _POOLS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)


@contextmanager
def products_in_float32(*operands: Tensor) -> Iterator[None]:
    """Have float32 matrix products be as exact as the operands' own precision deserves.

    On a processor only.

    Numbers that came from bfloat16 are exact in it, so oneDNN may multiply them with bfloat16
    instructions; it adds up in float32 and returns float32, in half the time and with no larger
    error. Other operands are multiplied in float32, whatever the caller's own setting is. The
    setting is one for the process, so it is changed for the length of the block only.

    Args:
        operands: the factors as the model made them, before they were converted to float32.
    """
    exact = all(operand.dtype == torch.bfloat16 for operand in operands)
    settings = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
    if settings is not None:  # torch 2.9 and later: a setting of oneDNN's products alone
        torch.backends.mkldnn.matmul.fp32_precision = "bf16" if exact else "ieee"
        try:
            yield
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = settings
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if exact else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
