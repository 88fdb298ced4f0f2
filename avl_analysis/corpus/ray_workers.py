"""Shards of a run on several Ray workers, on this machine or a running cluster.

Each worker loads the model once and does one shard after the other; results are files, so nothing
large travels. Ray is optional: `pip install 'avl-analysis[ray]'`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from avl_analysis.corpus.sharded_run import Job, S, Workers
from avl_analysis.errors import InputError

OBJECT_STORE = 128 * 2**20
"""Bytes of shared memory for what is passed to workers: questions and drawn pictures of a few
shards.
"""


class _Worker:
    """What runs in a worker."""

    def __init__(self, job: Job[Any]) -> None:
        self.job, self.vlm = job, job.load()

    def do(self, shard: Any) -> None:
        self.job.do(self.vlm, shard)


def on_ray(workers: int, address: str | None, gpus: int = 0) -> Workers[S]:
    """Ray workers do the shards.

    Args:
        workers: how many.
        address: a running Ray cluster ("auto" or ray://...); None starts workers on this machine.
        gpus: GPUs that each worker is given for itself.

    Returns:
        What does the shards. When it is asked for the first one it raises InputError if Ray is not
        installed or the cluster cannot be reached, later if a worker died.
    """
    return partial(_do_shards, workers=workers, address=address, gpus=gpus)


def _do_shards(
    job: Job[S], shards: Sequence[S], *, workers: int, address: str | None, gpus: int
) -> Iterator[S]:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "several workers need Ray: pip install 'avl-analysis[ray]', or use one worker"
        ) from error
    # A Ray that runs already belongs to somebody else and is left running.
    started = not ray.is_initialized()
    if started:
        _start(ray, workers, address)
    try:
        remote: Any = ray.remote(num_cpus=1, num_gpus=gpus)(_Worker)
        # Every worker loads the model, so none is started that would get no shard.
        idle = [remote.remote(job) for _ in range(min(workers, len(shards)))]
        waiting = list(shards)
        busy: dict[Any, tuple[Any, S]] = {}
        while waiting or busy:
            while waiting and idle:
                worker, shard = idle.pop(), waiting.pop(0)
                busy[worker.do.remote(shard)] = (worker, shard)
            # Whoever is through first gets the next shard.
            (finished, *_), _ = ray.wait(list(busy), num_returns=1)
            worker, shard = busy.pop(finished)
            # Nothing comes back; this raises what the worker raised.
            ray.get(finished)
            idle.append(worker)
            yield shard
    except ray.exceptions.RayActorError as error:
        raise InputError(
            "a worker died, perhaps for lack of memory; what was done is kept: run the same"
            f" command again, with fewer workers if it happens again ({str(error).splitlines()[0]})"
        ) from error
    except ray.exceptions.RayTaskError as error:
        # As the type of what the job raised, so that an InputError is reported as in one process.
        raise error.as_instanceof_cause() from error
    finally:
        if started:
            ray.shutdown()


def _start(ray: Any, workers: int, address: str | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
        }
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "on this machine" if address is None else f"at {address!r}"
        raise InputError(f"cannot use Ray {where}: {str(error).splitlines()[0]}") from error
