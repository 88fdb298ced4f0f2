"""`avl record --data`: the command around corpus runs."""

import json
from pathlib import Path

import pytest

from avl_analysis.cli.main import main
from avl_analysis.corpus import record_corpus
from avl_analysis.recordings.recording import load_recording
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("model"), tiny.llava(kv_heads=2))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    tiny.picture().save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    lines = [
        {"image": "a.png", "prompt": "what is this?", "id": "one", "answer": "red"},
        {"image": "broken.png", "prompt": "what is this?", "id": "two"},
        {"image": ["a.png", "a.png"], "prompt": "the same?", "id": "three"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def test_a_file_of_questions_is_recorded_and_what_failed_is_said(
    folder: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.nc"
    arguments = [
        "record",
        "--data",
        questions,
        "--out",
        out,
        "--model",
        folder,
        "--max-new-tokens",
        2,
    ]
    assert _run(*arguments, "--batch-size", 2, "--layers", 1) == 0
    printed, said = capsys.readouterr()
    assert "2 sample(s)" in printed
    assert "(1 left out)" in printed
    assert "two was left out: InputError: " in said
    recording = load_recording(out)
    assert [recording.facts(name)["id"] for name in recording.samples] == ["one", "three"]
    assert recording["modality_mass"]["layer"].values.tolist() == [1]
    assert _run(*arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert _run(*arguments, "--force") == 0


def test_an_interrupted_command_says_how_to_go_on_and_does(
    folder: Path,
    questions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run.nc"
    arguments = [
        "record",
        "--data",
        questions,
        "--out",
        out,
        "--model",
        folder,
        "--max-new-tokens",
        2,
    ]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(record_corpus, "_finish", stop)
        assert _run(*arguments) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    monkeypatch.setattr(record_corpus, "record_shard", stop)  # everything is recorded already
    assert _run(*arguments) == 0
    assert len(load_recording(out)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "gone.jsonl"], "no such file: gone.jsonl"),
        (["--data", "QUESTIONS", "--scenes", "3"], "leave out pictures"),
        (["photo.jpg", "what?", "--data", "QUESTIONS"], "leave out pictures"),
        (["--data", "QUESTIONS", "--layers", "7", "--model", "FOLDER"], "out of range"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    folder: Path,
    questions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    known = {"FOLDER": str(folder), "QUESTIONS": str(questions)}
    assert _run("record", *[known.get(argument, argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
