"""Shards of a run in several processes of this machine, of one thread each.

Each process loads the model once and does one shard after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache, partial
from multiprocessing.connection import wait
from typing import Any

import torch

from avl_analysis.corpus.sharded_run import Job, S, Workers
from avl_analysis.models.loading import VLM

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def in_processes(workers: int) -> Workers[S]:
    """`workers` processes do the shards. The job must be hashable: a process knows it by that."""
    return partial(_do_shards, workers=workers)


def _do_shards(job: Job[S], shards: Sequence[S], *, workers: int) -> Iterator[S]:
    saved = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(saved, "1"))  # read when a worker imports torch
    # Spawned, because a fork of a process with running torch threads may hang.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    try:
        futures = {pool.submit(_do, job, shard): shard for shard in shards}
        for future in as_completed(futures):
            # Raises what the worker raised.
            future.result()
            yield futures[future]
    finally:
        # Reached also when the caller stops asking for shards; those that have not begun are
        # dropped.
        pool.shutdown(cancel_futures=True)
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _do(job: Job[Any], shard: Any) -> None:
    job.do(_loaded(job), shard)


@lru_cache(maxsize=1)
def _loaded(job: Job[Any]) -> VLM:
    """The model of a job; a worker process loads it once."""
    torch.set_num_threads(1)
    return job.load()


def _end_with_parent() -> None:
    """Let this worker process end when the process that started it does.

    One that is killed cannot tell its workers, which would wait for further units for good.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        # Returns when the parent process has ended.
        wait([parent.sentinel])
        # `sys.exit` would end this thread alone.
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with parent").start()
