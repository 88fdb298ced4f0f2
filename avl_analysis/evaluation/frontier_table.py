"""What a frontier file says, in a table and in words.

    avl frontier --show reports/reference/frontier.jsonl

Means leave out tasks whose answers are one token long, which cannot show what a policy loses; these
are printed apart. Kept is a policy's exact match divided by the full cache's, on the task where
that is smallest. Differences are paired by question, each of which has a picture of its own, with
Newcombe's 95 % interval.

Two kinds of comparison follow the table. On all pooled tasks together, A-VL as published and the
preset against each rival: the rival's point with most bytes that are no more than theirs (to 2 %)
is taken, or, for a rival that holds everything and reads little (Quest), most keys read; who is
ahead is said where the interval leaves out 0. On each task by itself, only where a rival beats the
preset. Every comparison is tested by itself; nothing is corrected for their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avl_analysis.evaluation.frontier import EQUAL_BYTES, Line, one_token_tasks
from avl_analysis.intervals import Estimate, paired_share_difference

PRESET, PAPER, FULL = "A-VL cold", "A-VL (paper)", "full"
READS_LITTLE = ("quest",)
"""Policies that hold everything and read little, so that bytes do not say what they save."""
Point = tuple[str, float | None]
"""Policy and budget; None: its own settings."""
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
        read: keys read per decode step, share of those seen, mean over tasks; NaN where the file
            does not say.
        attention_time: processor time of attention per decode step / the full cache's under the
            same session, mean over tasks; NaN likewise.
        accuracy: exact match, mean over tasks.
        change: accuracy minus the full cache's over all pooled questions, paired.
        kept: smallest exact match of a task, relative to the full cache; NaN where that answers
            nothing rightly.
        worst: that task, or "".
    """

    policy: str
    budget: float | None
    bytes: float
    most_bytes: float
    read: float
    attention_time: float
    accuracy: float
    change: Estimate[float]
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
    lines = pooled(lines)
    full = {line["task"]: _number(line["accuracy"]) for line in lines if line["policy"] == FULL}
    cells = _by_point(lines)
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
        known = [line["bytes"] for line in cell if line["bytes"] is not None]
        found.append(
            PolicyRow(
                policy,
                budget,
                _mean(cell, "bytes"),
                max(known, default=np.nan),
                _mean(cell, "attended"),
                _mean(cell, "attention_time"),
                _mean(cell, "accuracy"),
                _change(cell, cells[FULL, None]),
                kept.get(worst, np.nan),
                worst,
            )
        )
    return found


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def pooled(lines: Sequence[Line]) -> list[Line]:
    """Lines of tasks with answers of several tokens, or all where there are none."""
    apart = one_token_tasks(lines)
    return [line for line in lines if line["task"] not in apart] or list(lines)


def asked(budget: float | None) -> str:
    """A budget in words: a share of the bytes, image tokens, or a policy's own settings."""
    if budget is None:
        return "own settings"
    return f"{100 * budget:g} %" if budget <= 1 else f"{budget:g} image tokens"


def _by_point(lines: Sequence[Line]) -> dict[Point, list[Line]]:
    cells: dict[Point, list[Line]] = {}
    for line in lines:
        cells.setdefault((line["policy"], line["budget"]), []).append(line)
    return cells


def _mean(cell: Sequence[Line], key: str) -> float:
    """The mean of what is known, NaN where nothing is."""
    values = [line[key] for line in cell if line.get(key) is not None]
    return float(np.mean(values)) if values else float("nan")


def _change(cell: Sequence[Line], other: Sequence[Line]) -> Estimate[float]:
    """Right answers of one point minus another's, over the questions of all their tasks."""
    tasks = {line["task"]: line for line in other}
    # Both sides in the same order of tasks, so that places in the arrays are the same questions.
    shared = [line for line in cell if line["task"] in tasks]
    mine = np.concatenate([_right(line) for line in shared])
    return paired_share_difference(mine, np.concatenate([_right(tasks[x["task"]]) for x in shared]))


@dataclass(frozen=True)
class Duel:
    """A point of A-VL against a rival that uses no more, over all pooled questions.

    Attributes:
        budget: of A-VL's point; rival_budget: of the rival's.
        by: what the rival uses no more of, "bytes" or "keys read".
        size: how much of it the rival uses, as a share of the full cache's.
        change: right answers of A-VL's point minus the rival's.
    """

    budget: float | None
    rival: str
    rival_budget: float | None
    by: str
    size: float
    change: Estimate[float]

    @property
    def verdict(self) -> str:
        """Whether A-VL's point "wins", "loses" or is "undecided"."""
        if self.change.low > 0:
            return "wins"
        return "loses" if self.change.high < 0 else "undecided"


def duels(lines: Sequence[Line], policy: str, budget: float | None) -> list[Duel]:
    """A point of A-VL against every rival that has a point using no more; see the module.

    Args:
        lines: of a frontier file.
        policy: the point's policy.
        budget: the point's budget.
    """
    cells = _by_point(pooled(lines))
    mine = cells[policy, budget]
    found = []
    for rival in dict.fromkeys(name for name, _ in cells):
        if rival in (FULL, policy):
            continue
        by = "keys read" if rival in READS_LITTLE else "bytes"
        key = {"keys read": "attended", "bytes": "bytes"}[by]
        most = (1 + EQUAL_BYTES) * _mean(mine, key)
        allowed = {
            point: _mean(cell, key)
            for point, cell in cells.items()
            # A rival without known bytes has NaN here, which is not <= anything.
            if point[0] == rival and _mean(cell, key) <= most
        }
        if allowed:
            best = max(allowed, key=lambda point: allowed[point])
            found.append(
                Duel(budget, rival, best[1], by, allowed[best], _change(mine, cells[best]))
            )
    return found


def beaten(lines: Sequence[Line], preset: str = PRESET) -> list[Beaten]:
    """Rivals of the preset, not A-VL itself, that beat it beyond the interval with no more bytes.

    Of a rival's points on a task the one with the most bytes that are allowed is taken.
    """
    return [one for one in _compared(lines, preset) if one.low > 0]


def _compared(lines: Sequence[Line], preset: str) -> list[Beaten]:
    """Every comparison of a point of the preset with a rival, on one task."""
    rivals: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        ours = line["policy"].startswith("A-VL")
        # Rivals count at the budgets they were asked for, where their bytes are known.
        known = None not in (line["budget"], line["bytes"])
        if known and not ours and line["policy"] not in READS_LITTLE:
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
    parts = [_table(lines), _apart(lines), _kept(lines, preset)]
    # The points that are put into words; those a file does not have are left out.
    own = [(PAPER, None), *((preset, b) for b in (None, 0.25, 0.1))]
    known = _by_point(lines)
    parts += [_duels(lines, *point) for point in own if point in known]
    return "\n\n".join([*(part for part in parts if part), _losses(lines, preset)])


def _table(lines: Sequence[Line]) -> str:
    text = [
        "| policy | asked for | bytes in use | keys read | attention time | exact match |"
        " minus full cache, points | least kept, on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(lines):
        change = "" if row.policy == FULL else _points(row.change)
        text.append(
            f"| {row.policy} | {asked(row.budget)} | {_percent(row.bytes)} |"
            f" {_percent(row.read)} | {_percent(row.attention_time)} |"
            f" {_shown(row.accuracy, '.3f')} | {change} |"
            f" {_shown(row.kept, '.2f', f', {row.worst}')} |"
        )
    return "\n".join(text)


def _percent(value: float) -> str:
    return _shown(100 * value, ".0f", " %")


def _shown(value: float, form: str, unit: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:{form}}{unit}"


def _points(change: Estimate[float]) -> str:
    """A difference of shares and its interval, in percentage points."""
    if np.isnan(change.mean):
        return "-"
    return f"{100 * change.mean:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"


def _apart(lines: Sequence[Line]) -> str:
    """The tasks answered in one token, with the points that lose something there."""
    alone = [line for line in lines if line["task"] in one_token_tasks(lines)]
    if not alone or len(alone) == len(lines):
        return ""
    cells = _by_point(alone)
    full = cells[FULL, None]
    changes = {point: _change(cell, full) for point, cell in cells.items()}
    worse = [
        f"{name} ({asked(budget)}) {_points(change)}"
        for (name, budget), change in changes.items()
        if change.high < 0
    ]
    listed = ", ".join(dict.fromkeys(str(line["task"]) for line in alone))
    return (
        f"Apart, tasks answered in one token ({listed}): the full cache's exact match is"
        f" {_mean(full, 'accuracy'):.3f}. That token comes from the prompt's own pass. Below the"
        f" full cache beyond the interval, in points: {'; '.join(worse) or 'none'}."
    )


def _kept(lines: Sequence[Line], preset: str) -> str:
    own = next((row for row in rows(lines) if row.policy == preset and row.budget is None), None)
    if own is None:
        return ""
    if not own.worst:
        return (
            f"What {preset} keeps cannot be said: on no task were both measured and the full cache"
            " ever right."
        )
    verb = "keeps" if own.kept >= KEPT else "does not keep"
    return (
        f"With its own settings {preset} {verb} {KEPT:g} of the full cache's exact match on every"
        f" task (least: {own.kept:.3f}, {own.worst}), at {100 * own.bytes:.0f} % of the bytes (most"
        f" on a task: {100 * own.most_bytes:.0f} %)."
    )


def _duels(lines: Sequence[Line], policy: str, budget: float | None) -> str:
    """One point of A-VL against all rivals, in words."""
    found = duels(lines, policy, budget)
    cell = _by_point(pooled(lines))[policy, budget]
    if not found:
        return ""
    said = [
        f"**{policy}, {asked(budget)}** ({100 * _mean(cell, 'bytes'):.0f} % of the bytes, exact"
        f" match {_mean(cell, 'accuracy'):.3f}), against rivals that use no more:",
        "",
    ]
    for verdict, words in (
        ("wins", "wins against"),
        ("loses", "loses to"),
        ("undecided", "is not told apart from"),
    ):
        rivals = [
            f"{one.rival} at {asked(one.rival_budget)}, {100 * one.size:.0f} % of the {one.by}"
            f" ({_points(one.change)})"
            for one in found
            if one.verdict == verdict
        ]
        said.append(f"- {words}: {'; '.join(rivals) or 'none'}")
    return "\n".join(said)


def _losses(lines: Sequence[Line], preset: str) -> str:
    """Where, on one task, a rival beats the preset."""
    compared = _compared(lines, preset)
    losses = [one for one in compared if one.low > 0]
    tested = f"{len(compared)} comparisons of one task, point and rival, each at 95 %"
    if not losses:
        return f"No baseline beats {preset} on a task with no more bytes ({tested})."
    text = [f"Baselines that beat {preset} on a task with no more bytes ({tested}):", ""]
    for loss in losses:
        span = f"{100 * loss.difference:.1f} points [{100 * loss.low:.1f}, {100 * loss.high:.1f}]"
        at = "with its own settings" if loss.budget is None else f"at {asked(loss.budget)}"
        text.append(f"- {loss.rival} beats {preset} {at} on {loss.task} by {span}.")
    return "\n".join(text)
