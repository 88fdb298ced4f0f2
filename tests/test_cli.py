"""The command line: what it prints, and that every mistake is one clear line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from avl_analysis.cli import main
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("model"), tiny.llava(kv_heads=2))


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_text_only(tmp_path_factory.mktemp("text"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    tiny.picture().save(path)
    return path


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line printed for arguments that must be refused."""
    code = _run(*arguments)
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("avl: error: ")
    return lines[0]


def test_the_installed_script_answers_from_any_directory(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("avl")
    done = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "models" in done.stdout


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run() == 0
    assert "Usage: avl" in capsys.readouterr().out


def test_models_prints_what_a_saved_model_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("models", folder) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert " llava 0.1 M 2 4 / 2 KV 16 yes " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["modles"], "No such command 'modles'"),
        (["models", "--colour"], "No such option: --colour"),
        (["models", "gizmo"], "unknown model 'gizmo': possible: 'scenes'"),
        (["models", "org/gizmo"], "--download"),
        (["models", "./gizmo"], "no such model folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in _refused(capsys, *arguments)


def test_models_refuses_a_text_only_model(text_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "text-only model" in _refused(capsys, "models", text_only)


def test_a_defect_is_not_dressed_up_as_a_mistake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("avl_analysis.inventory.inspect_model", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["models", str(folder)])


def test_an_interrupt_is_reported_in_one_line_with_its_own_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("avl_analysis.inventory.inspect_model", interrupted)
    assert _run("models", folder) == 130
    assert capsys.readouterr().err == "avl: interrupted\n"
