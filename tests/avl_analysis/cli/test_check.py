"""`avl models --check`: what it prints, what it writes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from avl_analysis.cli.main import main
from avl_analysis.conformance import table
from avl_analysis.conformance.build import model_types
from avl_analysis.conformance.recording import Mismatch
from avl_analysis.conformance.table import MARK, Row, parse


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "families.md"
    path.write_text(f"# Families\n\nProse.\n\n{MARK}\n\nold\n", encoding="utf-8")
    return path


def _everything_exact(model_type: str) -> Row:
    return Row(model_type, "exact", "2 of 2 layers", "none", "random")


def test_a_type_is_checked_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("models", "--check", "llava") == 0
    out = capsys.readouterr().out
    assert "grid, confirmed by painting" in out.replace("\n", " ")
    assert "1 types: 1 recorded exactly, 1 adapted, 0 refused." in out


def test_the_table_of_a_page_is_renewed_and_its_prose_kept(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "check", _everything_exact)
    assert _run("models", "--check", "--write", page) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Families\n\nProse.\n\n{MARK}\n\ntransformers ")
    assert sorted(row.model_type for row in parse(text)) == sorted(model_types())


def test_what_should_hold_and_does_not_is_said_and_nothing_is_written(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model_type: str) -> Row:
        if model_type == "llava":
            raise Mismatch("logits changed")
        return _everything_exact(model_type)

    monkeypatch.setattr(table, "check", broken)
    before = page.read_text(encoding="utf-8")
    assert _run("models", "--check", "--write", page) == 1
    assert "llava: logits changed" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--check", "no_such_type"), "registers no image-text-to-text type no_such_type"),
        (("--write", "families.md", "llava"), "leave the type names out"),
        (("--write", "missing.md"), "is not a file with the line <!-- table -->"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("models", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert part in err
