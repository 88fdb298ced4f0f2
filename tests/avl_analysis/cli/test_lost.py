"""Nothing old and nothing finished is lost: commands that are killed at any moment, that meet a
full disk, or that are told to write where nothing can be written.
"""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import ANY

import pytest
import xarray as xr

from avl_analysis import load_recording
from avl_analysis.evaluation import frontier
from tests import tiny
from tests.avl_analysis.cli.forked import Forked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]
KILLS = 20
QUESTIONS = 34
"""Three shards."""


@pytest.fixture(scope="module")
def avl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    forked = Forked(tmp_path_factory.mktemp("said"))
    yield forked
    forked.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("model"), tiny.llava(kv_heads=2))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for index in range(QUESTIONS):
        tiny.picture(seed=index).save(folder / f"{index}.png")
        lines.append({"image": f"{index}.png", "prompt": f"what is {index}?", "answer": "red"})
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    few = folder / "few.jsonl"
    few.write_text("\n".join(map(json.dumps, lines[:9])))
    return path


def _tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _same(one: Path, other: Path) -> None:
    left, right = load_recording(one), load_recording(other)
    assert left.samples == right.samples
    for group in right.data:
        xr.testing.assert_identical(left.data[group].drop_attrs(), right.data[group].drop_attrs())
    assert [left.facts(name) for name in left.samples] == [
        right.facts(name) for name in right.samples
    ]


def test_a_corpus_killed_at_twenty_moments_keeps_the_old_recording_and_every_finished_shard(
    avl: Forked, model: Path, questions: Path, tmp_path: Path
) -> None:
    options = ["--model", model, "--max-new-tokens", 2, "--batch-size", 8]
    options += ["--statistics", "modality_mass,coverage"]
    wanted, out, parts = tmp_path / "wanted.nc", tmp_path / "run.nc", tmp_path / "run.nc.parts"
    whole = avl.run("record", "--data", questions, *options, "--out", wanted)
    assert whole.code == 0, whole.said
    old_data = avl.run("record", questions.parent / "0.png", "what?", *options, "--out", out)
    assert old_data.code == 0, old_data.said
    old = out.read_bytes()
    draw, kills, last = random.Random(19), 0, False
    done: dict[str, tuple[int, int]] = {}
    while not last:
        last = kills == KILLS
        moment = None if last else draw.uniform(0, whole.seconds)
        ended = avl.run(
            "record", "--data", questions, *options, "--out", out, "--force", kill_after=moment
        )
        assert ended.left == 0
        if ended.code is None:
            kills += 1
            if out.read_bytes() == old:
                notes = {path.stem for path in parts.glob("0*.json")}
                shards = {path.name: path.stat() for path in parts.glob("0*.nc")}
                now = {
                    name: (stat.st_ino, stat.st_mtime_ns)
                    for name, stat in shards.items()
                    if Path(name).stem in notes
                }
                assert done.items() <= now.items()  # what was finished stays and is not redone
                done = now
                continue
        else:
            assert ended.code == 0, ended.said
        _same(out, wanted)  # also where it was killed behind its last step
        if not last:  # from the start again
            out.write_bytes(old)
            shutil.rmtree(parts, ignore_errors=True)
            done = {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.nc", "wanted.nc"]


def test_a_single_recording_killed_while_it_runs_keeps_the_old_one(
    avl: Forked, model: Path, questions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.nc"
    command = ["record", questions.parent / "1.png", "what?", "--model", model, "--force"]
    command += ["--max-new-tokens", 2, "--out", out]
    whole = avl.run(*command)
    assert whole.code == 0, whole.said
    old, draw = out.read_bytes(), random.Random(20)
    for _ in range(5):
        ended = avl.run(*command, kill_after=draw.uniform(0, whole.seconds))
        if out.read_bytes() != old:
            assert load_recording(out).samples == ["000000"]
        elif ended.code == 0:
            pytest.fail("a finished recording must not be the old file")
        old = out.read_bytes()
    assert avl.run(*command).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.nc"]


def test_a_frontier_killed_while_it_runs_goes_on_and_leaves_no_process(
    avl: Forked, model: Path, tmp_path: Path
) -> None:
    options = ["--model", model, "--scenes", 3, "--batch-size", 1, "--budgets", 0.5]
    options += ["--task", "colour", "--workers", 1]
    wanted, out = tmp_path / "wanted.jsonl", tmp_path / "f.jsonl"
    work = tmp_path / "f.jsonl.work"
    whole = avl.run("frontier", *options, "--out", wanted)
    assert whole.code == 0, whole.said
    out.write_text("old")
    draw = random.Random(21)
    done: dict[str, bytes] = {}
    for kill in (True, True, True, False):
        moment = draw.uniform(0.3 * whole.seconds, whole.seconds) if kill else None
        ended = avl.run("frontier", *options, "--out", out, "--force", kill_after=moment)
        assert ended.left == 0, "worker processes go on without the one that started them"
        if ended.code == 0:
            break
        assert ended.code is None, ended.said
        assert out.read_text() == "old"
        now = {path.name: path.read_bytes() for path in work.glob("colour-*.jsonl")}
        assert done.items() <= now.items()
        done = now
    # Seconds are measured anew in every run; everything else must be what an unbroken run finds.
    timed = {"attention_seconds": ANY, "attention_time": ANY}
    assert frontier.read(out)[1] == [{**line, **timed} for line in frontier.read(wanted)[1]]


def test_a_report_killed_while_it_is_built_leaves_files_that_are_old_or_new(
    avl: Forked, model: Path, questions: Path, tmp_path: Path
) -> None:
    few, built = questions.with_name("few.jsonl"), tmp_path / "report"
    options = ["--model", model, "--max-new-tokens", 2]
    run = tmp_path / "run.nc"
    assert avl.run("record", "--data", few, *options, "--out", run).code == 0
    whole = avl.run("report", run, "--out", built, "--title", "old")
    assert whole.code == 0, whole.said
    old, draw = _tree(built), random.Random(22)
    for _ in range(2):
        moment = draw.uniform(0.2, 1) * whole.seconds
        ended = avl.run("report", run, "--out", built, "--title", "new", kill_after=moment)
        assert ended.code in (None, 0), ended.said
        now = _tree(built)
        assert now.keys() >= old.keys()
        for name, content in now.items():
            if ".unfinished" in name or content == old.get(name):
                continue
            assert name in old
            # a whole file of its kind, and of the new report
            if name.endswith(".pdf"):
                assert content.rstrip().endswith(b"%%EOF"), name
            elif name.endswith(".html"):
                assert content.rstrip().endswith(b"</html>"), name
            elif name.endswith(".json"):
                json.loads(content)
            elif name.endswith(".nc"):
                load_recording(built / name)
            elif name.endswith(".svg"):
                assert content.rstrip().endswith(b"</svg>"), name
    assert avl.run("report", run, "--out", built, "--title", "new").code == 0
    assert not [name for name in _tree(built) if ".unfinished" in name]


# -- full and read-only ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(
    avl: Forked, model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with what every command writes."""
    folder = tmp_path_factory.mktemp("finished")
    for command in _commands(model, questions, folder).values():
        ended = avl.run(*command)
        assert ended.code == 0, (command, ended.said)
    return folder


def _commands(model: Path, questions: Path, folder: Path) -> dict[str, list[object]]:
    """A command for every kind of output, each of which replaces what is there."""
    few, picture = questions.with_name("few.jsonl"), questions.parent / "0.png"
    options = ["--model", model, "--max-new-tokens", 4]
    replace = [*options, "--force", "--out"]
    scenes = ["--model", model, "--scenes", 1, "--task", "colour", "--budgets", 0.5]
    return {
        "record": ["record", picture, "what?", *replace, folder / "run.nc"],
        "corpus": ["record", "--data", few, *replace, folder / "corpus.nc"],
        "compare": ["compare", few, "-p", "random:0.5", *replace, folder / "compare.nc"],
        "csv": ["compare", few, "-p", "random:0.5", *replace, folder / "compare.csv"],
        "calibrate": ["calibrate", few, *replace, folder / "policy.json"],
        "ablate": ["ablate", few, "--draws", 1, *replace, folder / "ablation.json"],
        "knockout": ["knockout", few, "--flow", "image:last", *replace, folder / "cut.nc"],
        "frontier": ["frontier", *scenes, "--workers", 1, "--force", "--out", folder / "f.jsonl"],
        "report": ["report", folder / "run.nc", "--out", folder / "report"],
    }


OUTPUTS = {
    "record": "run.nc",
    "corpus": "corpus.nc",
    "compare": "compare.nc",
    "csv": "compare.csv",
    "calibrate": "policy.json",
    "ablate": "ablation.json",
    "knockout": "cut.nc",
    "frontier": "f.jsonl",
    "report": "report/run.nc",
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_disk_that_takes_half_of_an_output_keeps_the_old_one(
    avl: Forked, model: Path, questions: Path, finished: Path, kind: str
) -> None:
    target = finished / OUTPUTS[kind]
    before = _tree(finished)
    command = _commands(model, questions, finished)[kind]
    ended = avl.run(*command, largest_file=target.stat().st_size // 2)
    assert ended.code == 2, ended.said
    _one_line(ended.said, "File too large")
    now = _tree(finished)
    assert now[OUTPUTS[kind]] == before[OUTPUTS[kind]]
    assert [name for name in now if ".unfinished" in name] == []
    assert before.keys() <= now.keys()


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_folder_that_cannot_be_written_is_refused_at_once(
    avl: Forked, model: Path, questions: Path, finished: Path, kind: str
) -> None:
    before = _tree(finished)
    with _read_only(finished):
        ended = avl.run(*_commands(model, questions, finished)[kind])
    assert ended.code == 2, ended.said
    _one_line(ended.said, "Read-only file system|Permission denied")
    assert _tree(finished) == before


def _one_line(said: str, reason: str) -> None:
    (line,) = [line for line in said.splitlines() if line.startswith("avl: error: ")]
    assert any(one in line for one in reason.split("|")), line
    assert "Traceback" not in said


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """Nothing in the folder can be written meanwhile."""
    if os.getuid() != 0:
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        for one in folders:
            one.chmod(0o555)
        try:
            yield
        finally:
            for one in folders:
                one.chmod(0o755)
        return
    # The superuser may write whatever permissions say.
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="mounting needs the superuser")
def test_a_corpus_on_a_disk_that_fills_up_goes_on_once_there_is_room(
    avl: Forked, model: Path, questions: Path, tmp_path: Path
) -> None:
    disk, wanted = tmp_path / "disk", tmp_path / "wanted.nc"
    options = ["--model", model, "--max-new-tokens", 2, "--batch-size", 8]
    assert avl.run("record", "--data", questions, *options, "--out", wanted).code == 0
    size, out = wanted.stat().st_size, disk / "run.nc"
    disk.mkdir()
    space = f"size={3 * size // 1024}k"
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", space, "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        out.write_bytes(b"old")
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(int(free - 0.9 * size)))
        command = ["record", "--data", questions, *options, "--out", out, "--force"]
        ended = avl.run(*command)
        assert ended.code == 2, ended.said
        _one_line(ended.said, "No space left on device")
        assert out.read_bytes() == b"old"
        notes = sorted(path.name for path in (disk / "run.nc.parts").glob("0*.json"))
        (disk / "filler").unlink()
        assert avl.run(*command).code == 0
        _same(out, wanted)
        assert notes  # something was finished before the disk was full
    finally:
        subprocess.run(["umount", disk], check=True)
