"""A run of many shards that survives interruptions, by one process or several workers.

A shard is a part of the run that is done at once and leaves files of its own, each written whole or
not at all, in one folder. Starting the same run again does the shards that are missing. The folder
says in `run.json` what the run is, so that another run is refused, and belongs to one process at a
time.

Recording a corpus (`record_corpus`) and the frontier of policies (`evaluation.frontier`) are such
runs. What a shard does and who does it are arguments: a `Job`, and `in_this_process`,
`process_workers.in_processes` or `ray_workers.on_ray`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.files import write_text
from avl_analysis.models.loading import VLM

NOTE = "run.json"
"""File of a run's folder that says what the run is."""


class Shard(ABC):
    """A part of a run that is done at once."""

    @property
    @abstractmethod
    def count(self) -> int:
        """What the shard counts for in the progress of the run."""

    @abstractmethod
    def done(self, folder: Path) -> bool:
        """Whether its files are in the folder and whole."""


S = TypeVar("S", bound=Shard)
R = TypeVar("R")


class Job(ABC, Generic[S]):
    """Everything a worker needs to know; it is sent to the workers.

    Attributes:
        folder: where the files of the shards go.
    """

    folder: Path

    @abstractmethod
    def load(self) -> VLM:
        """The model; a worker loads it once."""

    @abstractmethod
    def do(self, vlm: VLM, shard: S) -> None:
        """Do one shard and leave its files in the folder."""


Workers = Callable[[Job[S], Sequence[S]], Iterator[S]]
"""Does shards of a job and yields each when it is done, in any order."""


def in_this_process(vlm: VLM) -> Workers[S]:
    """This process does one shard after the other, with a model that is loaded already."""

    def work(job: Job[S], shards: Sequence[S]) -> Iterator[S]:
        for shard in shards:
            job.do(vlm, shard)
            yield shard

    return work


def sharded_run(
    job: Job[S],
    shards: Sequence[S],
    described: Mapping[str, Any],
    workers: Workers[S],
    *,
    finish: Callable[[Mapping[str, Any]], R],
    progress: Callable[[int, int], None] | None = None,
) -> R:
    """Do the shards that are missing in the job's folder, then `finish`.

    Args:
        job: what is done to each shard, and the folder.
        shards: all shards of the run, the one to begin with first.
        described: what makes two runs the same one; values that JSON keeps as they are.
        workers: who does the missing shards.
        finish: makes the result when all shards are there, still under the folder's lock; called
            with `described` and the "date" when the run began.
        progress: called with (what is done, the whole), counted by `Shard.count`.

    Raises:
        InputError: the folder cannot be used, holds another run, or another process has it.
    """
    with lock_folder(job.folder):
        note = check_same_run(job.folder, described)
        whole = sum(shard.count for shard in shards)
        missing = [shard for shard in shards if not shard.done(job.folder)]
        done = whole - sum(shard.count for shard in missing)
        # Without anything to do no worker is started, which would load the model for nothing.
        for shard in workers(job, missing) if missing else ():
            done += shard.count
            if progress is not None:
                progress(done, whole)
        return finish(note)


def check_same_run(folder: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Write down what this run is, or check that the folder holds the same one.

    Returns:
        `described` and the "date" when the run began.

    Raises:
        InputError: the folder holds another run, or its note is damaged.
    """
    note = folder / NOTE
    if note.exists():
        with blamed_on_input(
            f"{note} cannot be read", "; delete the folder it is in to start anew"
        ):
            found = dict(json.loads(note.read_text(encoding="utf-8")))
            date = str(found["date"])
        # Only what this run is described by: the note also has the date.
        different = [name for name, value in described.items() if found.get(name) != value]
        if different:
            raise InputError(
                f"{folder} holds a run with other {', '.join(different)}: repeat that one's"
                " arguments to go on with it, choose another folder, or delete the folder to start"
                " anew"
            )
        return {**described, "date": date}
    described = {**described, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    write_text(note, json.dumps(described, indent=1) + "\n")
    return described


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """The folder, for this process alone; the claim ends with the process, however that ends.

    Raises:
        InputError: the folder cannot be made, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {folder} for the parts of the run: {error}"
        ) from error
    try:
        import fcntl
    except ImportError:  # not a POSIX system: two runs at once are the user's to avoid
        yield
        return
    # The lock is the open file's, not the name's: it ends with the process, also by kill -9.
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process is at work in {folder}: wait for it, or stop it first"
            ) from error
        yield
