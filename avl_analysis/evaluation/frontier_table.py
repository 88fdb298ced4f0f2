"""What a frontier file says, in a table and three verdicts.

    avl frontier --show reports/reference/frontier.jsonl

Kept is a policy's exact match divided by the full cache's, on the task where that is smallest. A
rival beats the preset where, asked for the same share of bytes, it answers more of a task's
questions rightly, and the 95 % interval of the paired difference lies above nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avl_analysis.evaluation.frontier import Line
from avl_analysis.intervals import paired_share_difference

PRESET, FULL = "A-VL cold", "full"
KEPT = 0.95
"""Share of the full cache's exact match that counts as kept."""


@dataclass(frozen=True)
class PolicyRow:
    """One policy at one budget (None: its own settings), over all tasks.

    Attributes:
        bytes: share of the full cache's bytes, mean over tasks; `most_bytes` the largest of a task.
        accuracy: exact match, mean over tasks.
        kept: smallest exact match of a task, relative to the full cache; `worst` is that task.
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
    """A rival that is better than the preset on a task, with the difference of exact match and its
    interval.
    """

    rival: str
    budget: float
    task: str
    difference: float
    low: float
    high: float


def rows(lines: Sequence[Line]) -> list[PolicyRow]:
    """One row per policy and budget, in the file's order."""
    full = {line["task"]: line["accuracy"] for line in lines if line["policy"] == FULL}
    cells: dict[tuple[str, float | None], list[Line]] = {}
    for line in lines:
        cells.setdefault((line["policy"], line["budget"]), []).append(line)
    found = []
    for (policy, budget), cell in cells.items():
        kept = {line["task"]: line["accuracy"] / full[line["task"]] for line in cell}
        worst = min(kept, key=kept.__getitem__)
        size = [line["bytes"] for line in cell]
        accuracy = float(np.mean([line["accuracy"] for line in cell]))
        found.append(
            PolicyRow(policy, budget, float(np.mean(size)), max(size), accuracy, kept[worst], worst)
        )
    return found


def beaten(lines: Sequence[Line], preset: str = PRESET) -> list[Beaten]:
    """Rivals of the preset, not A-VL itself, that beat it beyond the interval at a budget."""
    ours = {(line["task"], line["budget"]): line for line in lines if line["policy"] == preset}
    found = []
    for line in lines:
        mine = ours.get((line["task"], line["budget"]))
        if line["budget"] is None or line["policy"].startswith("A-VL") or mine is None:
            continue
        change = paired_share_difference(_right(line), _right(mine))
        if change.low > 0:
            rival, budget, task = line["policy"], line["budget"], line["task"]
            found.append(Beaten(rival, budget, task, change.mean, change.low, change.high))
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
            f"| {row.policy} | {asked} | {100 * row.bytes:.0f} % | {row.accuracy:.3f} |"
            f" {row.kept:.2f}, {row.worst} |"
        )
    own = next((row for row in rows(lines) if row.policy == preset and row.budget is None), None)
    if own is not None:
        verb = "keeps" if own.kept >= KEPT else "does not keep"
        text += [
            "",
            (
                f"With its own settings {preset} {verb} {KEPT:g} of the full cache's exact match on"
                f" every task (least: {own.kept:.3f}, {own.worst}), at {100 * own.bytes:.0f} % of"
                f" the bytes (most on a task: {100 * own.most_bytes:.0f} %)."
            ),
        ]
    losses = beaten(lines, preset)
    if not losses:
        text += [
            "",
            f"No baseline beats {preset} at the same budget on any task beyond its interval.",
        ]
    for loss in losses:
        span = f"{100 * loss.difference:.1f} points [{100 * loss.low:.1f}, {100 * loss.high:.1f}]"
        text.append(
            f"- {loss.rival} beats {preset} at {100 * loss.budget:g} % on {loss.task} by {span}."
        )
    return "\n".join(text)
