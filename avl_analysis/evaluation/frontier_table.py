"""What a frontier file says, in a table and three verdicts.

    avl frontier --show reports/reference/frontier.jsonl

Kept is a policy's exact match divided by the full cache's, on the task where that is smallest. A
rival beats the preset at one of the preset's points where, using no more bytes than that point (to
2 %), it answers more of a task's questions rightly, and Newcombe's 95 % interval of the difference,
paired by question, lies above 0. Every task, point and rival is tested by itself; nothing is
corrected for their number. Means over tasks leave out tasks whose answers are one token long, which
cannot show what a policy loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avl_analysis.evaluation.frontier import EQUAL_BYTES, Line, one_token_tasks
from avl_analysis.intervals import paired_share_difference

PRESET, FULL = "A-VL cold", "full"
KEPT = 0.95
"""Share of the full cache's exact match that counts as kept."""


@dataclass(frozen=True)
class PolicyRow:
    """One policy at one budget (None: its own settings).

    Over the tasks with answers of several tokens, or over all tasks where there are none.

    Attributes:
        policy: its name in the file.
        budget: what it was asked for.
        bytes: share of the full cache's bytes, mean over tasks.
        most_bytes: the largest of a task.
        accuracy: exact match, mean over tasks.
        kept: smallest exact match of a task, relative to the full cache; NaN where that answers
            nothing rightly.
        worst: that task, or "".
    """

    policy: str
    budget: float | None
    bytes: float
    most_bytes: float
    accuracy: float
    kept: float
    worst: str


@dataclass(frozen=True)
class Beaten:
    """A rival that is better than the preset on a task with no more bytes.

    With the difference of exact match and its interval; `budget` is the preset's (None: its own
    settings).
    """

    rival: str
    budget: float | None
    task: str
    difference: float
    low: float
    high: float


def rows(lines: Sequence[Line]) -> list[PolicyRow]:
    """One row per policy and budget, in the file's order."""
    apart = one_token_tasks(lines)
    if pooled := [line for line in lines if line["task"] not in apart]:
        lines = pooled
    full = {line["task"]: _number(line["accuracy"]) for line in lines if line["policy"] == FULL}
    cells: dict[tuple[str, float | None], list[Line]] = {}
    for line in lines:
        cells.setdefault((line["policy"], line["budget"]), []).append(line)
    found = []
    for (policy, budget), cell in cells.items():
        # Of a task that the full cache never answers rightly nothing can be kept, and of one that
        # a policy failed at nothing is known.
        kept = {
            line["task"]: line["accuracy"] / full[line["task"]]
            for line in cell
            if line["accuracy"] is not None and full.get(line["task"], 0) > 0
        }
        worst = min(kept, key=kept.__getitem__, default="")
        sizes = [_number(line["bytes"]) for line in cell]
        known = [size for size in sizes if not np.isnan(size)]
        found.append(
            PolicyRow(
                policy,
                budget,
                _mean(sizes),
                max(known, default=np.nan),
                _mean([_number(line["accuracy"]) for line in cell]),
                kept.get(worst, np.nan),
                worst,
            )
        )
    return found


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _shown(value: float, form: str, unit: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:{form}}{unit}"


def _mean(values: Sequence[float]) -> float:
    """The mean of what is known, NaN where nothing is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else np.nan


def beaten(lines: Sequence[Line], preset: str = PRESET) -> list[Beaten]:
    """Rivals of the preset, not A-VL itself, that beat it beyond the interval with no more bytes.

    Of a rival's points on a task the one with the most bytes that are allowed is taken.
    """
    return [one for one in _compared(lines, preset) if one.low > 0]


def _compared(lines: Sequence[Line], preset: str) -> list[Beaten]:
    """Every comparison of a point of the preset with a rival, on one task."""
    rivals: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if None not in (line["budget"], line["bytes"]) and not line["policy"].startswith("A-VL"):
            rivals.setdefault((line["task"], line["policy"]), []).append(line)
    found = []
    measured = [line for line in lines if line["bytes"] is not None]
    for mine in (line for line in measured if line["policy"] == preset):
        # Bytes cannot be hit exactly, as keys are whole: a rival may use a little more.
        most = (1 + EQUAL_BYTES) * mine["bytes"]
        for (task, rival), points in rivals.items():
            allowed = [line for line in points if task == mine["task"] and line["bytes"] <= most]
            if allowed:
                # The rival's point that uses most of the bytes allowed, not the one with most right
                # answers: choosing by the result would favour rivals with many points.
                best = max(allowed, key=lambda line: float(line["bytes"]))
                change = paired_share_difference(_right(best), _right(mine))
                bounds = change.mean, change.low, change.high
                found.append(Beaten(rival, mine["budget"], task, *bounds))
    return found


def _right(line: Line) -> np.ndarray:
    return np.array([np.nan if mark == "-" else float(mark) for mark in line["right"]])


def show(lines: Sequence[Line], preset: str = PRESET) -> str:
    """Table and verdicts in Markdown."""
    text = [
        "| policy | asked for | bytes in use | exact match | least kept, on |",
        "|---|---|---|---|---|",
    ]
    for row in rows(lines):
        asked = "" if row.budget is None else f"{100 * row.budget:g} %"
        text.append(
            f"| {row.policy} | {asked} | {_shown(100 * row.bytes, '.0f', ' %')}"
            f" | {_shown(row.accuracy, '.3f')} | {_shown(row.kept, '.2f', f', {row.worst}')} |"
        )
    own = next((row for row in rows(lines) if row.policy == preset and row.budget is None), None)
    if own is not None and not own.worst:
        text += [
            "",
            (
                f"What {preset} keeps cannot be said: on no task were both measured and the full"
                " cache ever right."
            ),
        ]
    elif own is not None:
        verb = "keeps" if own.kept >= KEPT else "does not keep"
        text += [
            "",
            (
                f"With its own settings {preset} {verb} {KEPT:g} of the full cache's exact match on"
                f" every task (least: {own.kept:.3f}, {own.worst}), at {100 * own.bytes:.0f} % of"
                f" the bytes (most on a task: {100 * own.most_bytes:.0f} %)."
            ),
        ]
    compared = _compared(lines, preset)
    losses = [one for one in compared if one.low > 0]
    tested = f"{len(compared)} comparisons of one task, point and rival, each at 95 %"
    if not losses:
        text += ["", f"No baseline beats {preset} with no more bytes ({tested})."]
    else:
        text += ["", f"Baselines that beat {preset} with no more bytes ({tested}):", ""]
    for loss in losses:
        span = f"{100 * loss.difference:.1f} points [{100 * loss.low:.1f}, {100 * loss.high:.1f}]"
        at = "with its own settings" if loss.budget is None else f"at {100 * loss.budget:g} %"
        text.append(f"- {loss.rival} beats {preset} {at} on {loss.task} by {span}.")
    return "\n".join(text)
