"""The search of options: equal effort, and a rule that says which trial is taken."""

import json
from pathlib import Path
from typing import Any

import pytest

from avl.policies.registry import PRESETS, policies
from avl_analysis.errors import InputError
from avl_analysis.evaluation import search
from avl_analysis.evaluation.policy_files import load_options

TRIALS: dict[str, tuple[dict[str, Any], ...]] = {
    "snapkv": ({}, {"window": 8}, {"window": 4}),
    "kivi": ({}, {"newest": 16}, {"newest": 8}),
}


def _line(policy: str, budget: float, task: str, accuracy: float, size: float) -> dict[str, Any]:
    names = ("policy", "budget", "task", "accuracy", "bytes", "attended")
    return dict(zip(names, (policy, budget, task, accuracy, size, 1.0), strict=True))


def _lines(reached: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Two tasks at two budgets around a mean of right answers and of bytes."""
    return [
        _line(name, budget, task, right + sign * 0.1, size)
        for name, (right, size) in reached.items()
        for budget in (0.5, 0.25)
        for task, sign in (("ocr", 1), ("what", -1))
    ]


def test_every_policy_with_options_gets_as_many_trials_and_its_defaults_first() -> None:
    assert len({len(listed) for listed in search.TRIALS.values()}) == 1
    assert all(listed[0] == {} for listed in search.TRIALS.values())
    none = {"full", "random", "stride", "scope", "divprune", "downsample"}
    assert set(search.TRIALS) == {*policies(), *PRESETS} - none
    points = search.trial_points()
    distinct = {(repr(p.policy), p.budget) for p in points}
    assert len(distinct) == len(points)  # no trial repeats another


def test_most_right_answers_are_chosen_and_all_trials_listed() -> None:
    reached = {
        "snapkv": (0.5, 0.4),
        "snapkv,window=8": (0.6, 0.4),
        "snapkv,window=4": (0.6, 0.4),
        "kivi": (0.9, 0.9),
        "kivi,newest=16": (0.89, 0.4),
        "kivi,newest=8": (0.8, 0.3),
    }
    found = search.choose(_lines(reached), TRIALS)
    # Of equal trials the first; and as right to two points with fewer bytes goes before.
    assert found["chosen"] == {"snapkv": {"window": 8}, "kivi": {"newest": 16}}
    assert [trial["accuracy"] for trial in found["trials"]] == pytest.approx(
        [right for right, _ in reached.values()]
    )
    assert found["trials"][1]["fields"] == {"window": 8}
    assert found["trials"][1]["by_task"]["ocr at 0.25"] == pytest.approx(0.7)


def test_what_was_chosen_is_read_again_and_anything_else_refused(tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"chosen": {"snapkv": {"window": 8}, "a-vl-cold": {}}}))
    assert load_options(path) == {"snapkv": {"window": 8}, "a-vl-cold": {}}
    path.write_text(json.dumps({"chosen": {"gizmo": {}}}))
    with pytest.raises(InputError, match="'gizmo', which is no policy"):
        load_options(path)
    path.write_text("[1]")
    with pytest.raises(InputError, match="holds no options that a search chose"):
        load_options(path)
    with pytest.raises(InputError, match=r"make one with python -m avl_analysis\.evaluation"):
        load_options(tmp_path / "none.json")
