"""Recording a corpus: many samples into one file, in shards that survive interruptions.

A shard is a fixed range of samples. Its recording and then a small note (which samples failed, and
the digest of the recording) are each written whole or not at all, in a folder beside the result; a
shard without a note, or whose recording is not the one the note was written for, was not done.
When all are there they become one recording (`join_files.join`), which is the same however often
the run was interrupted and which worker recorded which shard: what goes into a pass together
depends on the samples alone.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from avl_analysis.capture.recorder import record
from avl_analysis.corpus.batches import FAILURES, Failure, halved
from avl_analysis.corpus.questions import Sample, shown_videos
from avl_analysis.corpus.ray_workers import on_ray
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.corpus.sharded_run import Job, Shard, Workers, in_this_process, sharded_run
from avl_analysis.errors import InputError
from avl_analysis.files import digest_of, write_text
from avl_analysis.models.checkpoint import fingerprint as folder_digest
from avl_analysis.models.loading import VLM, load_model
from avl_analysis.models.videos import parts_of
from avl_analysis.recordings.join_files import join
from avl_analysis.recordings.recording import Recording, merge

SHARD = 16
"""Samples per shard unless told otherwise: what an interruption can cost at most."""

_SAMPLE_FAILURES = (*FAILURES, TypeError, AttributeError)
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
class RecordingJob(Job["SampleShard"]):
    """Everything a worker needs to know to record.

    Attributes:
        model: name or path, as `load_model` takes it; load_options: its further arguments.
        options: arguments of `record_samples`.
        folder: where shards go.
    """

    model: str
    folder: Path
    load_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> VLM:
        return load_model(self.model, **self.load_options)

    def do(self, vlm: VLM, shard: SampleShard) -> None:
        record_shard(vlm, shard, self)


@dataclass(frozen=True, eq=False)
class SampleShard(Shard):
    """Samples `start`, `start + 1`, ... of the corpus."""

    start: int
    samples: Sequence[Sample]

    @property
    def count(self) -> int:
        return len(self.samples)

    def files(self, folder: Path) -> tuple[Path, Path]:
        """Its recording and its note."""
        return folder / f"{self.start:08d}.nc", folder / f"{self.start:08d}.json"

    def done(self, folder: Path) -> bool:
        """Whether the shard is done: its note and, unless all its samples failed, its recording.

        The recording must be the one that the note was written for.
        """
        note = read_note(self.files(folder)[1])
        # More failures than samples: the note is not of this shard.
        if note is None or len(note["failed"]) > len(self.samples):
            return False
        file = self.files(folder)[0]
        if len(note["failed"]) == len(self.samples):
            return True
        # A recording that was cut off, exchanged or damaged is recorded again.
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
    # With a folder of parts beside it an existing file is that of a run which was cut off between
    # writing the result and clearing up: it is finished again.
    if target.exists() and not folder.exists() and not replace:
        raise InputError(f"{target} exists already: choose another name, or delete it")
    job = RecordingJob(model, folder, dict(load or {}), options)
    # Also where other processes do the work: name, revision and floating type describe the run.
    vlm = job.load()
    _check_options(vlm, options)
    shards = [
        SampleShard(start, samples[start : start + shard])
        for start in range(0, len(samples), shard)
    ]
    result = sharded_run(
        job,
        shards,
        described(vlm, samples, shard, options),
        _workers(vlm, job, workers, address),
        finish=lambda note: _finish(folder, target, shards, note["date"]),
        progress=progress,
    )
    shutil.rmtree(folder)
    return result


def _workers(
    vlm: VLM, job: RecordingJob, workers: int, address: str | None
) -> Workers[SampleShard]:
    if workers == 1 and address is None:
        return in_this_process(vlm)
    gpus = 1 if str(job.load_options.get("device") or "").startswith("cuda") else 0
    return on_ray(workers, address, gpus=gpus)


def record_shard(vlm: VLM, shard: SampleShard, job: RecordingJob) -> None:
    """Record one shard and leave its files in the folder."""
    recordings, failed = _record(vlm, shard.samples, shard.start, job.options)
    recording_file, note = shard.files(job.folder)
    digest = None
    if recordings:
        # The recording before its note: only the note says that the shard is done.
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


def _record(
    vlm: VLM, samples: Sequence[Sample], start: int, options: Mapping[str, Any]
) -> tuple[list[Recording], list[Failed]]:
    """Recordings of the samples that can be recorded, and the others; halves what fails."""

    def run(places: Sequence[int]) -> Recording:
        # Places count from the beginning of the corpus, `samples` from that of the shard. Halves of
        # a range are ranges, so the first and last place say it all.
        part = samples[places[0] - start : places[-1] + 1 - start]
        return record_samples(vlm, part, first_sample=places[0], **options)

    recordings: list[Recording] = []
    failed: list[Failed] = []
    places = range(start, start + len(samples))
    for part, result in halved(run, places, failures=_SAMPLE_FAILURES):
        if isinstance(result, Failure):
            failed.append(Failed(part[0], samples[part[0] - start].id, result.reason))
        else:
            recordings.append(result)
    return recordings, failed


def _finish(folder: Path, target: Path, shards: Sequence[SampleShard], date: str) -> CorpusResult:
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
    # Shards of which every sample failed have no recording.
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
    # Arguments of `record_samples` itself; all others are those of `record`.
    own = {"system", "max_new_tokens", "batch_size", "generate", "on_token"}
    for name in ("max_new_tokens", "batch_size"):
        if options.get(name, 1) < 1:
            raise InputError(f"{name} must be 1 or more; got {options[name]}")
    with record(vlm.model, **{name: value for name, value in options.items() if name not in own}):
        pass


def described(
    vlm: VLM, samples: Sequence[Sample], shard: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What makes two runs the same one."""
    return {
        "model": vlm.name,
        "revision": vlm.revision,
        # The revision of a local folder is a hash of its weights alone; processor, tokenizer and
        # chat template change answers as well.
        "model folder": folder_digest(vlm.path),
        "loading": _loading(vlm),
        "libraries": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "samples": fingerprint(samples),
        "shard": shard,
        "options": repr(sorted(options.items())),
    }


def _loading(vlm: VLM) -> str:
    """What a model was loaded as."""
    attention = vlm.model.config.get_text_config(decoder=True)._attn_implementation
    return f"{vlm.model.dtype} on {vlm.model.device.type} with attention {attention}"


def fingerprint(samples: Sequence[Sample]) -> str:
    """A digest of everything about the samples; of pictures in files their path and content."""
    digest = hashlib.sha256()
    for sample in samples:
        fields: list[Any] = [
            sample.id,
            sample.prompt,
            sample.answers,
            sample.task,
            sample.regions,
            sample.strict,
        ]
        further = [sorted((given or {}).items()) for given in (sample.meta, sample.scene)]
        fields += [shown for shown in shown_videos(sample) if shown is not None]
        # `repr` of a list keeps the fields apart: the same letters divided otherwise are another
        # text.
        digest.update(repr([*fields, *further]).encode("utf-8", "surrogatepass"))
        for image in [part for source in sample.images for part in parts_of(source)]:
            if isinstance(image, (str, os.PathLike)):
                there = os.path.isfile(image)
                content = digest_of(Path(image)) if there else "missing"
                digest.update(f"{os.fspath(image)!r} {content}".encode("utf-8", "surrogatepass"))
            else:
                digest.update(
                    image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
                )
    return digest.hexdigest()
