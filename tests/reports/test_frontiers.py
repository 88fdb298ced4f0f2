"""Reading a frontier file and pooling what is in it."""

import json

import pytest

from avl_analysis.errors import InputError
from avl_analysis.evaluation.frontier import write
from avl_reports.frontiers import load_frontier
from tests.reports import made


def test_a_frontier_is_read_as_it_was_written(tmp_path):
    frontier = made.frontier()
    write(tmp_path / "f.jsonl", [dict(line) for line in frontier.lines], frontier.about)
    again = load_frontier(tmp_path / "f.jsonl")
    assert (again.about, again.lines) == (frontier.about, frontier.lines)
    assert again.tasks == ["colour", "count", "shape"]
    assert len(again.points) == 6
    assert again.questions == 8


def test_accuracy_is_pooled_over_questions_and_paired_between_points():
    frontier = made.frontier()
    assert frontier.accuracy(("A-VL", 0.5)).mean == 0.75
    assert frontier.accuracy(("A-VL", 0.5), ["count"]).mean == 0.5
    change = frontier.difference(("A-VL", 0.25), ("random", 0.25))
    assert (change.mean, change.n) == (0.0, 8)
    assert (
        change.low < -0.5 < 0.5 < change.high
    )  # every question differs, so pairing says how little is known
    assert frontier.bytes(("random", 0.25)) == pytest.approx(0.26)


def test_bytes_are_those_of_the_rows_not_of_the_batches_they_ran_in():
    frontier = made.frontier()
    assert frontier.lines[-1]["filled"] == pytest.approx(0.36)
    assert frontier.bytes(("random", 0.25)) == pytest.approx(0.26)
    assert frontier.bytes(("full", None), ["count"]) == 1.0


def test_tasks_answered_in_one_token_are_not_pooled():
    frontier = made.frontier()
    assert frontier.one_token_tasks == ["shape"]
    assert frontier.pooled == ["colour", "count"]
    assert frontier.accuracy(("random", 0.5), ["shape"]).mean == 0.75
    assert frontier.accuracy(("random", 0.5)).n == 8
    unknown = [{k: v for k, v in line.items() if k != "answer_tokens"} for line in frontier.lines]
    assert type(frontier)({}, unknown).pooled == ["colour", "count", "shape"]
    alone = [line for line in frontier.lines if line["task"] == "shape"]
    only = type(frontier)({}, alone)
    assert not only.telling
    assert only.pooled == ["shape"]


def test_equal_bytes_are_equal_to_two_per_cent():
    frontier = made.frontier()
    assert frontier.equal_bytes(("A-VL", 0.5), ("random", 0.5))
    assert not frontier.equal_bytes(("A-VL", 0.25), ("random", 0.25))


def test_a_question_that_failed_counts_nowhere():
    frontier = made.frontier()
    lines = [{**line, "right": "-" + line["right"][1:]} for line in frontier.lines]
    found = type(frontier)(frontier.about, lines)
    assert found.accuracy(("full", None)).n == 6
    assert found.questions == 6


@pytest.mark.parametrize("content", [[], [{"task": "colour"}]])
def test_a_file_without_points_is_refused(tmp_path, content):
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [{"about": {}}, *content]) + "\n")
    with pytest.raises(InputError, match="holds no points"):
        load_frontier(path)
