"""The table of a frontier file: least kept task, bytes, and who beats the preset."""

from pathlib import Path

import pytest

from avl_analysis.cli.main import main
from avl_analysis.evaluation import frontier_table
from avl_analysis.evaluation.frontier import entries, policy_at, read, write
from avl_analysis.evaluation.policy_files import load_options
from avl_analysis.scenes import TASKS


def line(
    policy: str, budget: float | None, task: str, right: str, size: float
) -> dict[str, object]:
    accuracy = right.count("1") / len(right)
    return {
        "policy": policy,
        "budget": budget,
        "task": task,
        "right": right,
        "accuracy": accuracy,
        "bytes": size,
        "answer_tokens": 3,
    }


LINES = [
    line("full", None, "ocr", "1" * 20, 1.0),
    line("full", None, "count", "1" * 16 + "0" * 4, 1.0),
    line("A-VL cold", None, "ocr", "1" * 19 + "0", 0.3),
    line("A-VL cold", None, "count", "1" * 16 + "0" * 4, 0.4),
    line("A-VL cold", 0.1, "ocr", "0" * 12 + "1" * 8, 0.1),
    line("A-VL cold", 0.1, "count", "1" * 10 + "0" * 10, 0.1),
    line("h2o", 0.1, "ocr", "1" * 20, 0.1),
    line("h2o", 0.1, "count", "1" * 9 + "0" * 10 + "1", 0.1),
    line("A-VL", 0.1, "ocr", "1" * 20, 0.1),
]


def test_a_row_tells_the_task_on_which_least_is_kept() -> None:
    preset = frontier_table.rows(LINES)[1]
    assert (preset.kept, preset.worst) == (0.95, "ocr")
    assert preset.bytes == pytest.approx(0.35)
    assert preset.most_bytes == 0.4
    assert preset.accuracy == pytest.approx((0.95 + 0.8) / 2)


def test_only_rivals_beyond_the_interval_beat_the_preset() -> None:
    (loss,) = frontier_table.beaten(LINES)
    assert (loss.rival, loss.budget, loss.task) == ("h2o", 0.1, "ocr")
    assert loss.difference == pytest.approx(0.6)
    assert 0 < loss.low < 0.6 < loss.high
    assert frontier_table.beaten(LINES[:6]) == []


def test_a_rival_that_uses_more_bytes_does_not_beat_the_preset() -> None:
    larger = [
        {**one, "bytes": 0.103} if one["policy"] == "h2o" else one for one in LINES if one["budget"]
    ]
    assert frontier_table.beaten(larger) == []
    equal = [{**one, "bytes": 0.101} if one["policy"] == "h2o" else one for one in larger]
    assert [loss.rival for loss in frontier_table.beaten(equal)] == ["h2o"]


def test_means_leave_out_tasks_answered_in_one_token() -> None:
    mixed = [{**one, "answer_tokens": 1} if one["task"] == "count" else one for one in LINES]
    preset = frontier_table.rows(mixed)[1]
    assert (preset.bytes, preset.accuracy) == (0.3, 0.95)


def test_the_verdicts_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "f.jsonl", LINES, {})
    with pytest.raises(SystemExit):
        main(["frontier", "--show", str(tmp_path / "f.jsonl")])
    said = capsys.readouterr().out
    assert "| A-VL cold | own settings | 35 % | - | - | 0.875 |" in said
    assert "A-VL cold keeps 0.95" in said
    assert "- h2o beats A-VL cold at 10 % on ocr by 60.0 points" in said
    assert (
        "No baseline beats A-VL cold on a task with no more bytes (0 comp"
        in frontier_table.show(LINES[:6])
    )
    with pytest.raises(SystemExit) as done:
        main(["frontier", "--show", str(tmp_path / "g.jsonl")])
    assert done.value.code == 2


MORE = [
    {**one, "attended": one["bytes"], "attention_time": one["bytes"] / 2}
    for one in [
        line("full", None, "ocr", "1" * 20, 1.0),
        line("full", None, "what", "1" * 20, 1.0),
        line("A-VL (paper)", None, "ocr", "1" * 10 + "0" * 10, 0.5),
        line("A-VL (paper)", None, "what", "1" * 20, 0.5),
        line("h2o", 0.5, "ocr", "1" * 20, 0.505),
        line("h2o", 0.5, "what", "1" * 20, 0.505),
        line("h2o", 0.25, "ocr", "0" * 20, 0.25),
        line("h2o", 0.25, "what", "0" * 20, 0.25),
        line("stride", 0.5, "ocr", "0" * 20, 0.5),
        line("stride", 0.5, "what", "0" * 20, 0.5),
        line("random", 0.5, "ocr", "1" * 10 + "0" * 10, 0.52),
        line("random", 32, "ocr", "1" * 9 + "0" * 11, 0.4),
        line("random", 32, "what", "1" * 20, 0.4),
        line("quest", 0.5, "ocr", "1" * 20, 1.1),
        line("quest", 0.5, "what", "1" * 20, 1.1),
    ]
]
MORE[-1]["attended"] = MORE[-2]["attended"] = 0.45


def test_a_duel_is_over_all_tasks_with_the_rivals_largest_point_that_uses_no_more() -> None:
    found = {duel.rival: duel for duel in frontier_table.duels(MORE, "A-VL (paper)", None)}
    assert {name: duel.rival_budget for name, duel in found.items()} == {
        "h2o": 0.5,
        "stride": 0.5,
        "random": 32,
        "quest": 0.5,
    }
    assert {name: duel.verdict for name, duel in found.items()} == {
        "h2o": "loses",
        "stride": "wins",
        "random": "undecided",
        "quest": "loses",
    }
    assert found["h2o"].change.mean == -0.25
    assert found["h2o"].change.n == 40
    assert (found["h2o"].by, found["quest"].by, found["quest"].size) == ("bytes", "keys read", 0.45)


def test_the_words_say_who_wins_by_how_much_and_what_is_apart() -> None:
    one_token = [
        {**line(policy, None, "size", right, 1.0), "answer_tokens": 1}
        for policy, right in (("full", "1" * 20), ("A-VL (paper)", "0" * 20))
    ]
    said = frontier_table.show([*MORE, *one_token])
    assert "| A-VL (paper) | own settings | 50 % | 50 % | 25 % | 0.750 | -25.0 [" in said
    assert "| random | 32 image tokens |" in said
    assert "- loses to: h2o at 50 %, 50 % of the bytes (-25.0 [" in said
    assert "quest at 50 %, 45 % of the keys read" in said
    assert (
        "Apart, tasks answered in one token (size): the full cache's exact match is 1.000" in said
    )
    assert "A-VL (paper) (own settings) -100.0 [" in said


def test_a_model_that_is_never_right_and_a_policy_that_failed_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {**line("h2o", 0.1, "ocr", "-" * 20, 0.0), "accuracy": None, "bytes": None}
    wrong = [
        line("full", None, "ocr", "0" * 20, 1.0),
        line("A-VL cold", None, "ocr", "0" * 20, 0.3),
        failed,
    ]
    write(tmp_path / "f.jsonl", wrong, {})
    with pytest.raises(SystemExit) as done:
        main(["frontier", "--show", str(tmp_path / "f.jsonl")])
    said = capsys.readouterr().out
    assert not done.value.code
    assert "| full | own settings | 100 % | - | - | 0.000 |  | - |" in said
    assert "| h2o | 10 % | - | - | - | - | - | - |" in said
    assert "What A-VL cold keeps cannot be said" in said
    assert [row.worst for row in frontier_table.rows([*LINES, failed])][2:4] == ["ocr", "count"]


def test_the_filed_frontier_is_whole_and_its_preset_keeps_what_is_claimed() -> None:
    about, lines = read(Path(__file__).parents[3] / "reports" / "reference" / "frontier.jsonl")
    assert "frontier --out frontier.jsonl" in about["command"]
    # Policies and budgets that came after the file was made are not in it; what is in it is whole.
    measured, budgets = {x["policy"] for x in lines}, {x["budget"] for x in lines}
    points = [p for p in entries() if p.name in measured and p.budget in budgets]
    assert {"full", "A-VL", "A-VL (paper)", "A-VL cold", "random", "h2o"} <= measured
    assert {(x["task"], x["policy"], x["budget"]) for x in lines} == {
        (task, point.name, point.budget) for task in {x["task"] for x in lines} for point in points
    }
    assert set(TASKS) <= {x["task"] for x in lines}
    assert all(x["samples"] == lines[0]["samples"] and x["failed"] == 0 for x in lines)
    (preset,) = [
        row
        for row in frontier_table.rows(lines)
        if row.policy == "A-VL cold" and row.budget is None
    ]
    assert preset.kept >= frontier_table.KEPT
    assert preset.most_bytes <= 0.5


def test_the_page_on_the_frontier_says_what_the_filed_frontier_says() -> None:
    root = Path(__file__).parents[3]
    about, lines = read(root / "reports" / "reference" / "frontier.jsonl")
    page = (root / "docs" / "frontier.md").read_text(encoding="utf-8")
    for part in frontier_table.show(lines).split("\n\n"):
        assert part in page
    assert about["command"].partition(" --task")[0] in page
    assert about["split"] == "comparison"
    options = root / "reports" / "reference" / "policy-options.json"
    asked = {(x["policy"], x["budget"]): x["settings"] for x in lines}
    for name, fields in load_options(options).items():
        shown = name.replace("a-vl", "A-VL").replace("-cold", " cold")
        assert asked[shown, 0.5] == repr(policy_at(name, 0.5, fields))


def test_readme_says_what_the_filed_frontier_says_of_long_answers() -> None:
    _, lines = read(Path(__file__).parents[3] / "reports" / "reference" / "frontier.jsonl")
    cells = {
        (x["policy"], x["budget"], x["task"]): (x["right"].count("1"), round(100 * x["bytes"]))
        for x in lines
    }
    long = ("caption", "story")
    assert [cells["A-VL (paper)", None, task] for task in long] == [(0, 56), (0, 57)]
    assert [cells["A-VL cold", None, task] for task in long] == [(16, 37), (16, 43)]
    assert [cells["kivi", 0.25, task] for task in long] == [(16, 29), (16, 32)]
