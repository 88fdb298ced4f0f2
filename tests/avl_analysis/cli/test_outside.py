"""What comes from outside and what goes outside: no command connects to anything without
--download, errors of every kind are one line, text from strangers does nothing to the terminal, and
output that cannot be written is refused before anything is computed.
"""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from avl_analysis.cli.main import explained, main
from avl_analysis.cli.options import parse_numbers, plain, printable
from avl_analysis.errors import InputError
from avl_analysis.evaluation.comparison import load_comparison
from avl_analysis.evaluation.policy_files import save_policy
from avl_analysis.models import inventory
from avl_analysis.recordings.recording import load_recording
from tests import tiny
from tests.offline import Offline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_folder(tmp_path_factory.mktemp("model"), tiny.llava(kv_heads=2))


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
    code = _run(*arguments)
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("avl: error: ")
    assert said.count("\n") == 1
    return said


COMMANDS = """
    import os, sys
    from avl_analysis.cli.main import main
    os.chdir(sys.argv[1])
    for line in sys.stdin.read().split("\\n"):
        try:
            main(line.split("\\t"))
        except SystemExit as end:
            print("exit", end.code or 0, line, flush=True)
"""


def _without_network(
    offline: Offline, folder: Path, *commands: list[object]
) -> tuple[list[int], str]:
    """Exit codes of commands that one process runs in `folder`, and what it said meanwhile."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMANDS), folder],
        input="\n".join("\t".join(map(str, command)) for command in commands),
        env=offline.environment,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("exit ")]
    return [int(line.split()[1]) for line in lines], done.stdout + done.stderr


def _questions(folder: Path, count: int = 1) -> Path:
    """A file of questions about pictures beside it."""
    lines = []
    for index in range(count):
        tiny.picture(seed=index).save(folder / f"{index}.png")
        lines.append({"image": f"{index}.png", "prompt": f"what is {index}?", "answer": "red"})
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_no_command_connects_to_anything_without_being_asked(folder: Path, tmp_path: Path) -> None:
    """With every way to open a connection refused and noted, and an empty cache."""
    offline, work = Offline(tmp_path / "offline"), tmp_path / "work"
    work.mkdir()
    asked = _questions(work, 1)
    short: list[object] = ["--model", folder, "--max-new-tokens", 1]
    foreign: list[object] = ["--model", "org/name"]
    commands: list[tuple[int, list[object]]] = [
        (2, ["models", "org/name"]),
        (0, ["models", "scenes", folder]),
        (2, ["record", "0.png", "what?", *foreign]),
        (0, ["record", "0.png", "what?", *short, "--out", "a.nc"]),
        (0, ["record", "--data", asked, *short, "--out", "b.nc"]),
        (2, ["record", "0.png", "what?", "--model", folder, "--attention", "org/kernel"]),
        (0, ["stats", "a.nc"]),
        (0, ["stats", "--list"]),
        (0, ["compare", asked, *short, "-p", "random:0.5"]),
        (2, ["compare", asked, *foreign, "-p", "random:0.5"]),
        (2, ["calibrate", asked, *foreign, "--out", "q.json"]),
        (2, ["ablate", asked, *foreign]),
        (2, ["knockout", asked, *foreign]),
        (2, ["frontier", *foreign, "--out", "g.jsonl", "--scenes", 1]),
        (2, ["report", *foreign]),
        (2, ["eval", "org/name", "--wrapper", "llava_hf", "--scenes", 1]),
    ]
    codes, said = _without_network(offline, work, *(command for _, command in commands))
    assert offline.tried() == []
    assert codes == [code for code, _ in commands], said


def test_with_the_switch_the_hub_is_asked(tmp_path: Path) -> None:
    """What the test above watches is the way to the hub."""
    offline = Offline(tmp_path / "offline")
    codes, said = _without_network(offline, tmp_path, ["models", "org/name", "--download"])
    assert codes == [2], said
    assert offline.tried()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_longer_commands_connect_to_nothing_either(folder: Path, tmp_path: Path) -> None:
    """Nor do the processes that a frontier starts."""
    offline, work = Offline(tmp_path / "offline"), tmp_path / "work"
    work.mkdir()
    asked = _questions(work, 9)
    short: list[object] = ["--model", folder, "--max-new-tokens", 4]
    scenes: list[object] = ["--scenes", 1, "--task", "colour", "--budgets", 0.5, "--workers", 1]
    few: list[object] = ["--compare", 0, "--ablate", 1, "--cut", 1, "--sunk", 1, "--words", 1]
    codes, said = _without_network(
        offline,
        work,
        ["calibrate", asked, *short, "--out", "p.json"],
        ["ablate", asked, *short, "--draws", 1, "--out", "ablation.json"],
        ["knockout", asked, *short, "--flow", "image:last"],
        ["frontier", "--model", folder, "--out", "f.jsonl", *scenes],
        ["frontier", "--show", "f.jsonl"],
        ["sinks", asked, *short, "--draws", 1],
        ["errors", "--model", folder, "--scenes", 1, "--task", "colour"],
        ["report", "--model", folder, "--samples", 12, *few],
        ["report", "report/run.nc", "--frontier", "f.jsonl", "--out", "again"],
    )
    assert offline.tried() == []
    assert codes == [0] * 9, said
    assert (work / "again" / "report.pdf").stat().st_size > 1000


def test_a_benchmark_is_run_offline_unless_it_may_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """lmms-eval runs in a process of its own; a small one in its place says what it was told."""
    package = tmp_path / "lmms_eval"
    package.mkdir()
    (package / "__init__.py").touch()
    told = "[os.environ.get(name) for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE')]"
    (package / "__main__.py").write_text(f"import os\nraise ValueError('Error', {told})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    command = ["eval", "org/name", "--wrapper", "llava_hf", "--benchmark", "mme"]
    out = ["--out", tmp_path / "out"]
    assert "['1', '1']" in _refused(capsys, *command, *out)
    assert "[None, None]" in _refused(capsys, *command, *out, "--download")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("a reason"), "a reason"),
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
            "not enough memory",
        ),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied"),
    ],
)
def test_errors_a_person_can_act_on_are_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(inventory, "inspect_model", fail)
    assert said in _refused(capsys, "models")


@pytest.mark.parametrize(
    "error", [TypeError("x"), ValueError("x"), KeyError("x"), RuntimeError("x"), AssertionError()]
)
def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    assert explained(error) is None
    monkeypatch.setattr(inventory, "inspect_model", fail)
    with pytest.raises(type(error)):
        main(["models"])


def test_a_reader_that_closes_the_pipe_early_is_no_error(folder: Path, tmp_path: Path) -> None:
    arguments = ["record", "--scenes", "1", "--max-new-tokens", "1", "--out", tmp_path / "a.nc"]
    assert _run(*arguments, "--model", folder) == 0
    program = "from avl_analysis.cli.main import main; main(['stats', 'a.nc'])"
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{program}" | head -n 1'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.count("\n") == 1


def test_two_policies_of_one_name_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from avl import AdaptivePolicy, StridePolicy

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = [
        save_policy(AdaptivePolicy(core=0.2), tmp_path / "a" / "t.json"),
        save_policy(StridePolicy(budget=0.5), tmp_path / "b" / "t.json"),
        save_policy(AdaptivePolicy(core=0.1), tmp_path / "a-vl.json"),
    ]
    line = _refused(capsys, "compare", "-p", files[0], "-p", files[1])
    assert "would both be the row 't'" in line
    assert str(files[0]) in line
    assert "would both be" in _refused(capsys, "compare", "-p", "a-vl", "-p", files[2])


def test_a_policy_that_could_not_be_measured_at_all_is_an_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.nc"
    policy = "a-vl,prefill=0.5,prefill_layer=99"
    command = ["compare", "-p", policy, "-p", "random:0.5", "--model", folder, "--scenes", 1]
    code = _run(*command, "--task", "colour", "--max-new-tokens", 2, "--out", out)
    said = capsys.readouterr().err
    assert code == 2
    assert f"policy {policy} could not be measured" in said
    assert load_comparison(out).policies == ["full", policy, "random:0.5"]


def test_an_ablation_of_another_models_recording_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.save_folder(tmp_path / "other", tiny.llava(kv_heads=2, seed=1))
    out = tmp_path / "r.nc"
    short = ["--max-new-tokens", 2, "--out", out]
    assert _run("record", "--scenes", 2, "--model", other, *short) == 0
    capsys.readouterr()
    line = _refused(capsys, "ablate", "--model", folder, "--recording", out, "--scenes", 1)
    assert "are of different models" in line


def test_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe.nc"
    os.mkfifo(pipe)
    long = tmp_path / ("n" * 300 + ".json")
    for command in (
        ["record", "x.png", "what?", "--model", "no/such", "--out", pipe, "--force"],
        ["record", "--data", "x", "--model", "no/such", "--out", "/proc/x.nc"],
        ["compare", "--model", "no/such", "--out", long],
        ["calibrate", "--model", "no/such", "--out", long],
        ["ablate", "--model", "no/such", "--out", long],
        ["frontier", "--model", "no/such", "--out", long],
        ["report", "--model", "no/such", "--out", "/proc/report"],
    ):
        line = _refused(capsys, *command)
        assert "no/such" not in line
        assert "x.png" not in line


def test_force_keeps_the_old_recording_until_the_new_one_is_whole(
    folder: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run.nc"
    command = ["record", picture, "what?", "--model", folder, "--max-new-tokens", 2, "--out", out]
    assert _run(*command) == 0
    before = out.read_bytes()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        assert _run(*command, "--force") == 2
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "run.nc"]
    assert _run(*command, "--force") == 0
    assert load_recording(out).samples == ["000000"]


def test_names_with_markup_and_control_characters_are_shown_as_they_are(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path("m[") / "x][red]y"
    model.parent.mkdir()
    model.symlink_to(folder)
    assert _run("models", model) == 0
    assert "m[/x][red]y" in capsys.readouterr().out
    short = ["--max-new-tokens", 1, "--out", "r.nc"]
    assert _run("record", "--scenes", 1, "--model", model, *short) == 0
    assert _run("stats", "r.nc") == 0
    assert "m[/x][red]y" in capsys.readouterr().out
    assert "\\x1b[31m" in _refused(capsys, "models", "a\x1b[31mb")


def test_text_from_outside_is_written_out_for_the_terminal() -> None:
    assert printable("a\x1b[0m\u202eb\ud800\n") == "a\\x1b[0m\\u202eb\\ud800\n"
    assert plain("[bold]x[/]") == "\\[bold]x\\[/]"
    assert printable("é 漢 🙂") == "é 漢 🙂"


@pytest.mark.parametrize("text", ["0-1000000000", "9" * 5000, "1-2-3", "", "-1", "1,,2", "5-3"])
def test_lists_of_numbers_are_bounded(text: str) -> None:
    with pytest.raises(InputError) as error:
        parse_numbers(text, "--layers")
    assert len(str(error.value)) < 200


def test_an_empty_choice_of_statistics_or_rows_is_refused(
    folder: Path,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in ("", ",", " , "):
        assert "names none" in _refused(
            capsys, "record", picture, "what?", "--model", folder, "--statistics", value
        )
    line = _refused(
        capsys,
        "record",
        picture,
        "what?",
        "--model",
        folder,
        "--keep-attention",
        "--queries",
        "9999",
    )
    assert "no row" in line
