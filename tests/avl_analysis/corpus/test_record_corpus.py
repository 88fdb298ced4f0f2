"""Corpus runs: however often one is interrupted, and whoever records which shard, the recording is
the same.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from avl_analysis.corpus import record_corpus as recording_run
from avl_analysis.corpus.questions import Sample
from avl_analysis.corpus.record_corpus import Failed, fingerprint, record_corpus
from avl_analysis.corpus.record_samples import record_samples
from avl_analysis.corpus.sharded_run import check_same_run, lock_folder
from avl_analysis.errors import InputError
from avl_analysis.models.loading import VLM, load_model
from avl_analysis.recordings.join_files import join
from avl_analysis.recordings.recording import Recording, load_recording, merge
from tests import tiny

OPTIONS = {
    "max_new_tokens": 3,
    "batch_size": 2,
    "statistics": ["modality_mass", "coverage", "prefill_mass"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_folder(tmp_path_factory.mktemp("model"), tiny.llava(kv_heads=2)))


def _samples(count: int = 7) -> list[Sample]:
    words = [
        "what is the colour",
        "where is it?",
        "describe the image",
        "what is blue and where is the red picture",
    ]
    return [
        Sample(f"s{i}", (tiny.picture(seed=i),), words[i % 4], answers=("red",))
        for i in range(count)
    ]


def _same(one: Recording, other: Recording) -> None:
    for group in other.data:
        left = one.data[group].drop_attrs()
        right = other.data[group].drop_attrs()
        xr.testing.assert_identical(
            left[sorted(map(str, left.data_vars))], right[sorted(map(str, right.data_vars))]
        )
    assert one.samples == other.samples
    assert [one.facts(name) for name in one.samples] == [
        other.facts(name) for name in other.samples
    ]


@pytest.fixture(scope="module")
def whole(folder: str) -> Recording:
    """All samples recorded at once, without shards."""
    return record_samples(load_model(folder), _samples(), **OPTIONS)


def test_shards_become_the_recording_that_one_pass_over_all_samples_makes(
    folder: str, whole: Recording, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    result = record_corpus(
        folder,
        _samples(),
        tmp_path / "run.nc",
        shard=2,
        progress=lambda *p: told.append(p),
        **OPTIONS,
    )
    assert (result.recorded, result.failed) == (7, ())
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7)]
    _same(load_recording(result.path), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["run.nc"]


def test_a_run_stopped_anywhere_and_started_again_gives_the_same_recording(
    folder: str, whole: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before a recording, its note, the description or the result is put in
    place, in turn."""
    original, out = os.replace, tmp_path / "run.nc"
    recorded: list[int] = []
    record_shard = recording_run.record_shard
    monkeypatch.setattr(
        recording_run,
        "record_shard",
        lambda vlm, shard, job: record_shard(vlm, shard, job) or recorded.append(shard.start),
    )
    stops = 0
    while stops < 30:
        left = [1 + stops % 2]  # one file, then two: a note is reached every other time

        def stop_after(source: Path, target: Path, left: list[int] = left) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            original(source, target)

        try:
            with monkeypatch.context() as patched:
                patched.setattr(os, "replace", stop_after)
                record_corpus(folder, _samples(), out, shard=3, **OPTIONS)
            break
        except KeyboardInterrupt:
            stops += 1
            assert not out.exists()
    assert stops > 3
    assert recorded == sorted(set(recorded))  # no shard twice, once its note was written
    expected = record_corpus(folder, _samples(), tmp_path / "other.nc", shard=3, **OPTIONS)
    _same(load_recording(out), load_recording(expected.path))
    assert len(load_recording(out)) == len(whole)


def test_a_failed_sample_is_reported_and_the_rest_kept(folder: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    samples = _samples(5)
    samples[2] = Sample("broken", (broken,), "what is it?")
    result = record_corpus(folder, samples, tmp_path / "run.nc", shard=4, **OPTIONS)
    assert result.recorded == 4
    assert [(one.index, one.id) for one in result.failed] == [(2, "broken")]
    recording = load_recording(result.path)
    assert recording.samples == ["000000", "000001", "000003", "000004"]
    assert [recording.facts(name)["id"] for name in recording.samples] == ["s0", "s1", "s3", "s4"]
    assert json.loads(recording.attrs["failed"])[0]["reason"] == result.failed[0].reason
    alone = record_samples(load_model(folder), samples[3:4], **OPTIONS)
    np.testing.assert_allclose(
        recording["modality_mass"].sel(sample="000003").values,
        alone["modality_mass"].isel(sample=0).values,
        atol=1e-5,
    )


def test_a_shard_without_any_good_sample_and_a_corpus_without_any(
    folder: str, tmp_path: Path
) -> None:
    bad = [Sample(f"b{i}", (tmp_path / "gone.png",), "what?") for i in range(2)]
    result = record_corpus(folder, [*bad, *_samples(2)], tmp_path / "run.nc", shard=2, **OPTIONS)
    assert (result.recorded, len(result.failed)) == (2, 2)
    assert isinstance(result.failed[0], Failed)
    with pytest.raises(
        InputError, match=r"none of the 2 samples could be recorded; b0 failed with.*no such file"
    ):
        record_corpus(folder, bad, tmp_path / "other.nc", **OPTIONS)


def test_shards_with_and_without_pictures_join_like_samples_do(folder: str, tmp_path: Path) -> None:
    vlm = load_model(folder)
    samples = [
        Sample("t", (), "what is red?"),
        *_samples(2),
        Sample("u", (), "where is the blue picture?"),
    ]
    together = record_samples(vlm, samples, max_new_tokens=3)
    files = [
        record_samples(vlm, [sample], max_new_tokens=3, first_sample=i).save(tmp_path / f"{i}.nc")
        for i, sample in enumerate(samples)
    ]
    join(files, tmp_path / "joined.nc", {"note": "x"})
    joined = load_recording(tmp_path / "joined.nc")
    _same(joined, together)
    assert joined.attrs["note"] == "x"
    together.save(tmp_path / "together.nc")
    assert not together.data[
        "attention"
    ]  # no raw weights were kept, and an empty group need not be in a file
    for group in (name for name, data in together.data.items() if data):
        # down to units, fill values and estimates for readers that know only netCDF
        plain = [
            xr.open_dataset(tmp_path / f"{name}.nc", group=group).load()
            for name in ("joined", "together")
        ]
        xr.testing.assert_identical(
            plain[0][sorted(map(str, plain[1].data_vars))], plain[1][sorted(plain[1].data_vars)]
        )


def test_joining_equals_merging_in_memory(folder: str, tmp_path: Path) -> None:
    vlm = load_model(folder)
    parts = [
        record_samples(vlm, [one], max_new_tokens=2 + i, first_sample=i)
        for i, one in enumerate(_samples(3))
    ]
    files = [part.save(tmp_path / f"{i}.nc") for i, part in enumerate(parts)]
    join(files, tmp_path / "joined.nc", {})
    _same(load_recording(tmp_path / "joined.nc"), merge(parts))


def test_shards_of_different_models_do_not_join(folder: str, tmp_path: Path) -> None:
    vlm = load_model(folder)
    one, other = (
        record_samples(vlm, _samples(1), max_new_tokens=2, first_sample=i) for i in range(2)
    )
    other.attrs["model_revision"] = "another"
    with pytest.raises(InputError, match="another model_revision"):
        join(
            [one.save(tmp_path / "0.nc"), other.save(tmp_path / "1.nc")], tmp_path / "joined.nc", {}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": _samples(3)}, "other samples"),
        ({"max_new_tokens": 5}, "other options"),
        ({"shard": 5}, "other shard"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, message: str
) -> None:
    arguments = {"samples": _samples(4), "shard": 2, **OPTIONS}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recording_run, "record_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        record_corpus(
            folder,
            arguments["samples"],
            tmp_path / "run.nc",
            **{k: v for k, v in arguments.items() if k != "samples"},
        )
    arguments |= change
    with pytest.raises(InputError, match=message):
        record_corpus(folder, arguments.pop("samples"), tmp_path / "run.nc", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "1 or more"),
        ({"shard": 0}, "1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"layers": [9]}, "out of range"),
        ({"statistics": ["luck"]}, "luck"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_anything_is_recorded(
    folder: str, tmp_path: Path, arguments: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        record_corpus(folder, _samples(1), tmp_path / "run.nc", **arguments)
    assert not (tmp_path / "run.nc.parts").exists()


def test_an_existing_file_no_samples_and_a_second_process_are_refused(
    folder: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no samples"):
        record_corpus(folder, [], tmp_path / "run.nc")
    (tmp_path / "old.nc").touch()
    with pytest.raises(InputError, match="exists already"):
        record_corpus(folder, _samples(1), tmp_path / "old.nc")
    parts = tmp_path / "run.nc.parts"
    with lock_folder(parts), pytest.raises(InputError, match="another process"):
        record_corpus(folder, _samples(1), tmp_path / "run.nc")


def test_a_fingerprint_changes_with_anything_that_matters(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    tiny.picture().save(path)
    base = Sample("a", (path,), "what?", ("red",))
    others = [
        Sample("b", (path,), "what?", ("red",)),
        Sample("a", (path,), "where?", ("red",)),
        Sample("a", (path,), "what?", None),
        Sample("a", (), "what?", ("red",)),
        Sample("a", (tiny.picture(),), "what?", ("red",)),
        Sample("a", (tiny.picture(seed=1),), "what?", ("red",)),
    ]
    assert len({fingerprint([sample]) for sample in [base, *others]}) == 7
    assert fingerprint([base]) == fingerprint([Sample("a", (path,), "what?", ("red",))])


def _stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Let the next runs end when that many shards are done."""
    record_shard, done = recording_run.record_shard, []

    def stop(vlm: VLM, shard: recording_run.SampleShard, job: recording_run.RecordingJob) -> None:
        if len(done) == shards:
            raise KeyboardInterrupt
        record_shard(vlm, shard, job)
        done.append(shard.start)

    monkeypatch.setattr(recording_run, "record_shard", stop)


@pytest.fixture(scope="module")
def unfinished(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two shards that was stopped after the first."""
    out = tmp_path_factory.mktemp("unfinished") / "run.nc"
    with pytest.MonkeyPatch.context() as patched:
        _stop_after(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            record_corpus(folder, _samples(4), out, shard=2, **OPTIONS)
    return out.with_name("run.nc.parts")


@pytest.fixture
def stopped(unfinished: Path, tmp_path: Path) -> Path:
    """The name of the result of a run that was stopped after the first of two shards."""
    shutil.copytree(unfinished, tmp_path / "run.nc.parts")
    return tmp_path / "run.nc"


@pytest.fixture(scope="module")
def both(folder: str) -> Recording:
    """What that run gives when it is not stopped."""
    return record_samples(load_model(folder), _samples(4), **OPTIONS)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda parts: (parts / "00000000.nc").unlink(),
        lambda parts: (parts / "00000000.nc").write_bytes(b""),
        lambda parts: _flip(parts / "00000000.nc"),
        lambda parts: (parts / "00000000.json").write_text(""),
        lambda parts: (parts / "00000000.json").write_text("[]"),
        lambda parts: (parts / "00000000.json").write_text('{"failed": [{"index": 0}]}'),
        lambda parts: (parts / "00000000.json").write_text("[" * 100_000),
    ],
)
def test_a_shard_that_was_lost_or_damaged_is_recorded_again(
    folder: str, both: Recording, stopped: Path, damage: Callable[[Path], object]
) -> None:
    damage(stopped.with_name("run.nc.parts"))
    result = record_corpus(folder, _samples(4), stopped, shard=2, **OPTIONS)
    assert result.recorded == 4
    _same(load_recording(stopped), both)


def test_a_shard_in_the_place_of_another_is_recorded_again(
    folder: str, both: Recording, stopped: Path
) -> None:
    parts = stopped.with_name("run.nc.parts")
    for kind in ("nc", "json"):
        shutil.copy(parts / f"00000000.{kind}", parts / f"00000002.{kind}")
    with pytest.raises(InputError, match="sample"):
        record_corpus(folder, _samples(4), stopped, shard=2, **OPTIONS)
    (parts / "00000002.json").unlink()
    record_corpus(folder, _samples(4), stopped, shard=2, **OPTIONS)
    _same(load_recording(stopped), both)


@pytest.mark.parametrize("content", ["", "[]", "3", '{"model": "x"}', "[" * 100_000])
def test_a_damaged_description_of_a_run_is_refused_with_what_to_do(
    folder: str, stopped: Path, content: str
) -> None:
    (stopped.with_name("run.nc.parts") / "run.json").write_text(content)
    with pytest.raises(InputError, match="delete the folder"):
        record_corpus(folder, _samples(4), stopped, shard=2, **OPTIONS)


@pytest.mark.parametrize(
    "load", [{"dtype": "bfloat16"}, {"attn_implementation": "eager"}, {"dtype": "float16"}]
)
def test_a_run_is_not_continued_with_another_type_or_attention(
    folder: str, stopped: Path, load: dict
) -> None:
    with pytest.raises(InputError, match="other loading"):
        record_corpus(folder, _samples(4), stopped, shard=2, load=load, **OPTIONS)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "chat_template.jinja",
        "processor_config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors",
    ],
)
def test_a_run_is_not_continued_with_another_file_of_the_model_folder(
    folder: str, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The files are compared before they are used, so any change will do."""
    changed = shutil.copytree(folder, tmp_path / "changed")
    vlm = replace(load_model(folder), path=str(changed))
    parts = stopped.with_name("run.nc.parts")

    def check() -> dict[str, object]:
        return check_same_run(parts, recording_run.described(vlm, _samples(4), 2, OPTIONS))

    assert check()
    with open(changed / name, "ab") as file:
        file.write(b" ")
    with pytest.raises(InputError, match="other model folder"):
        check()


def test_a_run_is_not_continued_with_a_picture_of_other_content_and_equal_size(
    folder: str, tmp_path: Path
) -> None:
    picture, vlm = tmp_path / "p.bmp", load_model(folder)
    samples = [Sample("a", (picture,), "what?")]
    tiny.picture(seed=0).save(picture)
    size = picture.stat().st_size
    (tmp_path / "parts").mkdir()
    check_same_run(tmp_path / "parts", recording_run.described(vlm, samples, 2, {}))
    tiny.picture(seed=1).save(picture)
    assert picture.stat().st_size == size
    with pytest.raises(InputError, match="other samples"):
        check_same_run(tmp_path / "parts", recording_run.described(vlm, samples, 2, {}))


def test_one_question_that_no_tokenizer_takes_is_left_out_and_the_others_are_recorded(
    folder: str, tmp_path: Path
) -> None:
    samples = _samples(3)
    samples[1] = replace(samples[1], prompt="what is \ud800?")
    result = record_corpus(folder, samples, tmp_path / "run.nc", **OPTIONS)
    assert result.recorded == 2
    assert [failed.id for failed in result.failed] == ["s1"]


_SCRIPT = """
import sys
from avl_analysis.corpus.record_corpus import record_corpus
from tests.avl_analysis.corpus.test_record_corpus import OPTIONS, _samples
record_corpus(sys.argv[1], _samples(), sys.argv[2], shard=2, workers=int(sys.argv[3]), **OPTIONS)
"""


def _start(folder: str, out: Path, workers: int = 1) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, folder, str(out), str(workers)], env=environment
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_that_is_killed_and_started_again_gives_the_same_recording(
    folder: str, whole: Recording, tmp_path: Path
) -> None:
    out = tmp_path / "run.nc"
    parts = out.with_name("run.nc.parts")
    for shards in (1, 2):  # kill it as soon as that many shards are done
        process = _start(folder, out)
        while process.poll() is None and len(list(parts.glob("0*.json"))) < shards:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert _start(folder, out).wait() == 0
    _same(load_recording(out), whole)
    assert not parts.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_give_the_recording_of_a_single_process(
    folder: str, whole: Recording, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    assert _start(folder, tmp_path / "run.nc", workers=2).wait() == 0
    _same(load_recording(tmp_path / "run.nc"), whole)
