"""The README stays true: its Python runs, its commands and options exist, its files are there."""

import re
from pathlib import Path

import pytest

from avl_analysis.cli.main import main
from avl_analysis.models.loading import load_model
from tests import tiny

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.picture().save("picture.png")
    for block in _blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert Path("run.nc").is_file()


def test_the_embedded_model_knows_every_word_of_the_prompts_in_the_readme() -> None:
    tokenizer = load_model("scenes").processor.tokenizer
    code = "\n".join([*_blocks("python"), *_blocks("sh")])
    prompts = re.findall(r"""["']([A-Z][^"']*[.?])["']""", code)
    assert len(prompts) >= 3
    for prompt in prompts:
        letters = [piece for piece in tokenizer.tokenize(prompt) if piece.strip("▁").isalpha()]
        assert len(letters) == len(prompt.split()), prompt


def test_every_command_of_the_readme_exists_with_its_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [line.partition("#")[0] for block in _blocks("sh") for line in block.splitlines()]
    commands = [line.split() for line in lines if line.startswith("avl ")]
    assert len(commands) > 5
    for _, command, *words in commands:
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0, command
        usage = capsys.readouterr().out
        assert all(word in usage for word in words if word.startswith("-")), words


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_file_in_the_tree_of_the_readme_exists() -> None:
    tree = TEXT.split("## What lies where")[1].split("```")[1]
    folder, missing = ROOT, []
    for line in tree.strip().splitlines():
        if not line.startswith(" "):
            folder = ROOT / line.split("/")[0]
        names = [] if not line.startswith(" ") else re.findall(r"[\w*]+(?:\.py|/)", line)
        missing += [
            f"{folder.name}/{name}" for name in names if not list(folder.glob(name.rstrip("/")))
        ]
        missing += [] if folder.is_dir() else [folder.name]
    assert missing == []
