"""Recording a corpus.

Many samples, in shards that survive interruptions, by one process or several.

A shard is a fixed range of samples. Its recording and then a small note (which samples failed, and
the digest of the recording) are each written whole or not at all, in a folder beside the result; a
shard without a note, or whose recording is not the one the note was written for, was not done.
Starting the same run again does the shards that are missing, and when all are there they become one
recording (`join_files.join`), which is the same however often the run was interrupted and whoever
recorded which shard: what goes into a pass together depends on the samples alone.

A run is the same if the model and everything in its folder, the content of all questions and
pictures, the options, the floating type, the device, the attention backend and the libraries are.

A batch that fails is halved until the sample that fails is alone; it is noted with its reason and
left out. Memory holds one shard at a time. A sample's number in the recording is its place in the
corpus, so failed samples leave gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from avl import UnsupportedModelError
from avl_analysis.capture.recorder import record
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.files import write_text
from avl_analysis.models.checkpoint import fingerprint as folder_digest
from avl_analysis.models.loading import VLM, load_model
from avl_analysis.recordings.join_files import join
from avl_analysis.recordings.recording import Recording, merge

SHARD = 16
"""Samples per shard unless told otherwise: what an interruption can cost at most."""

_FAILURES = (
    RuntimeError,
    ValueError,
    OSError,
    MemoryError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
)
"""What a model, a processor or a tokenizer may raise about one sample; it is noted with the sample,
its type in front, and the run goes on.
"""


@dataclass(frozen=True)
class Failed:
    """A sample that could not be recorded: its place in the corpus, its id and the reason."""

    index: int
    id: str
    reason: str


@dataclass(frozen=True)
class CorpusResult:
    """What came of a run: the file, how many samples are in it, and those that failed."""

    path: Path
    recorded: int
    failed: tuple[Failed, ...]


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to know.

    Attributes:
        model: name or path, as `load_model` takes it; load: its further arguments.
        options: arguments of `record_samples`.
        folder: where shards go.
    """

    model: str
    folder: Path
    load: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def loaded(self) -> VLM:
        return load_model(self.model, **self.load)


@dataclass(frozen=True, eq=False)
class Shard:
    """Samples `start`, `start + 1`, ... of the corpus."""

    start: int
    samples: Sequence[Sample]

    def files(self, folder: Path) -> tuple[Path, Path]:
        """Its recording and its note."""
        return folder / f"{self.start:08d}.nc", folder / f"{self.start:08d}.json"

    def done(self, folder: Path) -> bool:
        """Whether the shard is done: its note and, unless all its samples failed, its recording.

        The recording must be the one that the note was written for.
        """
        note = read_note(self.files(folder)[1])
        if note is None or len(note["failed"]) > len(self.samples):
            return False
        file = self.files(folder)[0]
        if len(note["failed"]) == len(self.samples):
            return True
        return file.is_file() and digest_of(file) == note["sha256"]


def record_corpus(
    model: str,
    samples: Sequence[Sample],
    out: str | Path,
    *,
    load: Mapping[str, Any] | None = None,
    workers: int = 1,
    address: str | None = None,
    shard: int = SHARD,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> CorpusResult:
    """Record a model on many samples, resuming an earlier run with the same arguments.

    Args:
        model: name or path, as `load_model` takes it.
        samples: the questions, always the same ones in the same order.
        out: netCDF file to write; the shards are kept in `<out>.parts` until it is complete.
        load: further arguments of `load_model`.
        workers: processes; more than one needs Ray (the extra `ray`). Bits are the same if every
            process computes with as many threads (OMP_NUM_THREADS).
        address: a running Ray cluster ("auto" or ray://...); its machines must see models and
            pictures, and the folder of `out`, under the same paths. None starts workers on this
            machine.
        shard: samples per shard.
        replace: whether an existing `out` may be replaced, once the new recording is complete.
        progress: called with (samples done, samples in all).
        options: passed on to `record_samples` (max_new_tokens, batch_size, system, ...) and
            `record` (layers, ...).

    Raises:
        InputError: an `out` that exists, a folder of another run, options that cannot be used, Ray
            missing, or not one sample that could be recorded.
    """
    target = Path(out)
    if workers < 1 or shard < 1:
        raise InputError(f"workers {workers} and shard {shard}: both must be 1 or more")
    if not samples:
        raise InputError("no samples to record: pass at least one")
    folder = target.with_name(target.name + ".parts")
    if target.exists() and not folder.exists() and not replace:
        raise InputError(f"{target} exists already: choose another name, or delete it")
    job = Job(model, folder, dict(load or {}), options)
    vlm = job.loaded()
    _check_options(vlm, options)
    with lock_folder(folder):
        date = check_same_run(folder, vlm, samples, shard, options)
        shards = [
            Shard(start, samples[start : start + shard]) for start in range(0, len(samples), shard)
        ]
        missing = [one for one in shards if not one.done(folder)]
        done = sum(len(one.samples) for one in shards) - sum(len(one.samples) for one in missing)
        for finished in _work(job, vlm, missing, workers, address):
            done += len(finished.samples)
            if progress is not None:
                progress(done, len(samples))
        result = _finish(folder, target, shards, date)
    shutil.rmtree(folder)
    return result


def record_shard(vlm: VLM, shard: Shard, job: Job) -> None:
    """Record one shard and leave its files in the folder."""
    recordings, failed = _record(vlm, shard.samples, shard.start, job.options)
    recording_file, note = shard.files(job.folder)
    digest = None
    if recordings:
        merge(recordings).save(recording_file)
        digest = digest_of(recording_file)
    content = {"failed": [asdict(one) for one in failed], "sha256": digest}
    write_text(note, json.dumps(content) + "\n")


def read_note(path: Path) -> dict[str, Any] | None:
    """The note of a shard.

    "failed", its samples that could not be recorded, and "sha256", the digest of its recording;
    None where there is no note or a damaged one, so that the shard is recorded again.
    """
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        failed = [Failed(**one) for one in note["failed"]]
        return {"failed": failed, "sha256": note["sha256"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _record(
    vlm: VLM, samples: Sequence[Sample], start: int, options: Mapping[str, Any]
) -> tuple[list[Recording], list[Failed]]:
    """Recordings of the samples that can be recorded, and the others; halves what fails."""
    try:
        return [record_samples(vlm, samples, first_sample=start, **options)], []
    except UnsupportedModelError:
        raise
    except _FAILURES as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    if len(samples) == 1:
        return [], [Failed(start, samples[0].id, reason)]
    half = len(samples) // 2
    first, second = (
        _record(vlm, samples[:half], start, options),
        _record(vlm, samples[half:], start + half, options),
    )
    return first[0] + second[0], first[1] + second[1]


def _work(
    job: Job, vlm: VLM, missing: Sequence[Shard], workers: int, address: str | None
) -> Iterator[Shard]:
    """Do the missing shards, yielding each when it is done."""
    if workers == 1 and address is None:
        for shard in missing:
            record_shard(vlm, shard, job)
            yield shard
    elif missing:
        from avl_analysis.corpus.ray_workers import record_shards

        yield from record_shards(job, missing, workers, address)


def _finish(folder: Path, target: Path, shards: Sequence[Shard], date: str) -> CorpusResult:
    """Join the shards into the result."""
    notes = [read_note(shard.files(folder)[1]) or {"failed": []} for shard in shards]
    failed = tuple(one for note in notes for one in note["failed"])
    recorded = sum(len(shard.samples) for shard in shards) - len(failed)
    if not recorded:
        first = failed[0]
        shutil.rmtree(folder)
        raise InputError(
            f"none of the {len(failed)} samples could be recorded; {first.id} failed with:"
            f" {first.reason}"
        )
    files = [
        shard.files(folder)[0]
        for shard, note in zip(shards, notes, strict=True)
        if len(note["failed"]) < len(shard.samples)
    ]
    attrs = {"date": date, "failed": json.dumps([asdict(one) for one in failed])}
    join(files, target, attrs, samples=recorded)
    return CorpusResult(target, recorded, failed)


# -- at the door -----------------------------------------------------------------------------------


def _check_options(vlm: VLM, options: Mapping[str, Any]) -> None:
    """Let `record` refuse its options now rather than once per sample."""
    own = {"system", "max_new_tokens", "batch_size", "generate", "on_token"}
    for name in ("max_new_tokens", "batch_size"):
        if options.get(name, 1) < 1:
            raise InputError(f"{name} must be 1 or more; got {options[name]}")
    with record(vlm.model, **{name: value for name, value in options.items() if name not in own}):
        pass


def check_same_run(
    folder: Path, vlm: VLM, samples: Sequence[Sample], shard: int, options: Mapping[str, Any]
) -> str:
    """Write down what this run is, or check that the folder holds the same one; returns its date.

    Raises:
        InputError: the folder holds another run.
    """
    note = folder / "run.json"
    described = {
        "model": vlm.name,
        "revision": vlm.revision,
        "model folder": folder_digest(vlm.path),
        "loading": _loading(vlm),
        "libraries": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "samples": fingerprint(samples),
        "shard": shard,
        "options": repr(sorted(options.items())),
    }
    if note.exists():
        with blamed_on_input(
            f"{note} cannot be read", "; delete the folder it is in to start anew"
        ):
            found = dict(json.loads(note.read_text(encoding="utf-8")))
            date = str(found["date"])
        different = [name for name, value in described.items() if found.get(name) != value]
        if different:
            raise InputError(
                f"{folder} holds an unfinished run with other {', '.join(different)}: repeat that"
                " one's arguments to finish it, or delete the folder to start anew"
            )
        return date
    date = datetime.now(UTC).isoformat(timespec="seconds")
    write_text(note, json.dumps({**described, "date": date}, indent=1) + "\n")
    return date


def _loading(vlm: VLM) -> str:
    """What a model was loaded as."""
    attention = vlm.model.config.get_text_config(decoder=True)._attn_implementation
    return f"{vlm.model.dtype} on {vlm.model.device.type} with attention {attention}"


def fingerprint(samples: Sequence[Sample]) -> str:
    """A digest of everything about the samples; of pictures in files their path and content."""
    digest = hashlib.sha256()
    for sample in samples:
        fields = [
            sample.id,
            sample.prompt,
            sample.answers,
            sample.task,
            sample.regions,
            sample.strict,
        ]
        further = [sorted((given or {}).items()) for given in (sample.meta, sample.scene)]
        digest.update(repr([*fields, *further]).encode("utf-8", "surrogatepass"))
        for image in sample.images:
            if isinstance(image, (str, os.PathLike)):
                there = os.path.isfile(image)
                content = digest_of(Path(image)) if there else "missing"
                digest.update(f"{os.fspath(image)!r} {content}".encode("utf-8", "surrogatepass"))
            else:
                digest.update(
                    image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
                )
    return digest.hexdigest()


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
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process is at work in {folder}: wait for it, or stop it first"
            ) from error
        yield
