"""A thousand malformed calls, drawn from a seed: each ends with success or with one line and exit
code 2, never with a traceback, and none hangs.
"""

import json
import random
import resource
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch

from avl import AdaptivePolicy
from avl_analysis.cli.main import main
from avl_analysis.evaluation.policy_files import save_policy
from tests import tiny
from tests.avl_analysis.cli.malformed import Call, Given, calls

LONGEST = 20
"""Seconds of the process's own computing after which a call counts as hanging."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Sound files of every kind, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("sound")
    model = tiny.save_folder(folder / "model", tiny.llava(kv_heads=2))
    picture = folder / "picture.png"
    tiny.picture().save(picture)
    work = folder / "work"
    work.mkdir()
    given = Given(
        model,
        picture,
        folder / "run.nc",
        folder / "compare.nc",
        folder / "ablation.json",
        save_policy(AdaptivePolicy(core=0.2, text=0.6), folder / "policy.json"),
        work,
    )
    short = ["--model", model, "--max-new-tokens", 2]
    for command in (
        ["record", "--scenes", 3, *short, "--out", given.recording],
        [
            "compare",
            "--scenes",
            1,
            "--task",
            "colour",
            "-p",
            "stride:0.5",
            *short,
            "--out",
            given.comparison,
        ],
    ):
        with pytest.raises(SystemExit) as end:
            main(list(map(str, command)))
        assert not end.value.code
    silenced = {"name": "nothing", "heads": [], "right": "10"}
    content = {
        "format": "avl-ablation",
        "version": 1,
        "kind": "visual",
        "found": 1,
        "heads": 4,
        "model": str(model),
        "samples": ["a", "b"],
        "tasks": ["x", "x"],
        "groups": [silenced, {**silenced, "name": "visual"}, {**silenced, "name": "random 1"}],
        "found_on": "",
        "same_layers": False,
        "command": "",
    }
    given.ablation.write_text(json.dumps(content))
    return given


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """What asks for more than 6 GB beyond what is in use fails, so that the machine does not."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = Path("/proc/self/statm")
    if not used.exists():
        pytest.skip("how much memory is in use cannot be told here")
    most = int(used.read_text().split()[0]) * resource.getpagesize() + 6 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _bounded(seconds: int) -> Iterator[None]:
    """TimeoutError after that much computing; other processes do not count."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {seconds} s of computing")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def outcome(call: Call, capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with the way a call ended; None if nothing is."""
    capsys.readouterr()
    try:
        with _bounded(LONGEST):
            main(call.arguments)
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what is looked for
        return "".join(traceback.format_exception_only(error)) + "".join(
            traceback.format_tb(error.__traceback__)[-3:]
        )
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("avl: error: ")]
    if "Traceback" in said:
        return f"a traceback on stderr:\n{said[-600:]}"
    if code == 2 and len(errors) != 1:
        return f"{len(errors)} lines of error:\n{said[-600:]}"
    if code not in (0, 2):
        return f"exit code {code}"
    if code == 0 and not call.harmless:
        return "it succeeded"
    return None


def check(given: Given, count: int, seed: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Descriptions of the calls that ended wrongly."""
    wrong = []
    for call in calls(given, count, seed):
        random.seed(0)
        torch.manual_seed(0)
        if (problem := outcome(call, capsys)) is not None:
            words = [w if len(w) < 120 else f"{w[:100]}..." for w in call.arguments]
            wrong.append(f"{call.note}: {words!r}\n{problem}")
    return wrong


def _report(wrong: list[str]) -> str:
    return f"{len(wrong)} calls ended wrongly\n" + "\n\n".join(wrong[:20])


def test_a_malformed_call_of_every_kind_is_one_line(
    given: Given, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(given.work)
    wrong = check(given, 12, 1, capsys)
    assert not wrong, _report(wrong)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_malformed_calls_are_one_line_each(
    given: Given, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(given.work)
    wrong = check(given, 1008, 0, capsys)
    assert not wrong, _report(wrong)
