"""How much accuracy does each policy keep for the bytes it holds?"""

from __future__ import annotations

import re

import numpy as np

from avl.policies.registry import label_of
from avl_analysis.evaluation.frontier import EQUAL_BYTES
from avl_analysis.evaluation.frontier_table import asked
from avl_analysis.figures import Axis, Figure, Heat, Panel, Points, Rule, Scatter
from avl_analysis.scenes.samples import split_of
from avl_reports.findings import Finding, Verdict, judge
from avl_reports.frontiers import Frontier, Point
from avl_reports.policy_numbers import LOSS, PAPER, color_slot
from avl_reports.run import Run, Section
from avl_reports.script import run_script
from avl_reports.shapes import share

QUESTION = "How much accuracy does each policy keep for the bytes it holds?"
_OURS, _FULL, _RANDOM = "A-VL", "full", "random"
_OWN = (
    (PAPER, "A-VL keeps the answers right with the paper's settings"),
    ("A-VL cold", "A-VL keeps the answers right with minor image keys kept in few bits"),
)
"""What is asked with settings of its own, and the choice it stands for."""
_COSTS = {"attended": "keys read / seen", "attention_time": "attention time / full"}
"""What else a point may say it costs; processor time per decode step, other work beside it."""
_MOST = 1.12
"""End of the axes of costs: a policy that keeps bounds of pages holds more than the full cache."""
_SHOWN = 3
"""Tasks that get a panel of their own: those on which policies differ most."""


def section(run: Run) -> Section:
    """Accuracy against bytes for every policy and budget.

    The pooled tasks, those that differ most, and a table.
    """
    frontier = run.frontier
    pooled = "tasks with answers of several tokens" if frontier.one_token_tasks else "all tasks"
    panels: list[Panel] = [
        _scatter(frontier, None, pooled if frontier.telling else "all tasks"),
    ]
    # Not every file counts the keys read.
    if np.isfinite(frontier.cost((_FULL, None), "attended")):
        panels.append(_scatter(frontier, None, "the same, by keys read", by_reads=True))
    panels += [_scatter(frontier, [task], task) for task in _differing(frontier)]
    if frontier.telling and frontier.one_token_tasks:
        panels.append(_scatter(frontier, frontier.one_token_tasks, "tasks answered in one token"))
    panels.append(_heat(frontier))
    figure = Figure(
        "frontier",
        "Accuracy against bytes",
        tuple(panels),
        run.caption(
            "Right free-running answers (Wilson intervals) against the bytes that the keys and"
            " values of a question took when its answer ended, relative to the stock cache; every"
            f" point is the same questions{_split(frontier)} under one policy and budget."
            f"{_apart(frontier)} Shown by themselves: the tasks on which policies differ most."
            f" {_of(frontier)}",
            frontier.questions,
        ),
    )
    return Section(QUESTION, figure, findings(frontier), "", None, table(frontier))


def _apart(frontier: Frontier) -> str:
    """What is not pooled, and why, as a sentence."""
    alone = frontier.one_token_tasks
    if not alone:
        return ""
    listed = ", ".join(alone)
    if not frontier.telling:
        return (
            f" Every answer here is one token long ({listed}); that token comes from the prompt's"
            " own pass, so these questions cannot show what a policy loses while decoding."
        )
    return (
        f" Tasks whose answers are one token long ({listed}) are shown apart: that token comes from"
        " the prompt's own pass, so they cannot show what a policy loses while decoding."
    )


def _split(frontier: Frontier) -> str:
    """Which split the questions are of, in brackets; "" where the file does not say."""
    split = str(frontier.about.get("split") or "")
    if not split:
        # Where the file names no split, it follows from the seed in its settings.
        seed = re.search(r"seed=(\d+)", str(frontier.about.get("settings", "")))
        split = split_of(int(seed[1])) if seed else ""
    if split == "tuning":
        return " (of the split that presets were chosen by, so not held out from them)"
    return f" (split {split})" if split else ""


def findings(frontier: Frontier) -> tuple[Finding, ...]:
    """Whether A-VL keeps accuracy with the paper's settings, and beats random selection.

    At each budget the two share. Nothing can be said where every answer is one token long, or,
    against random selection, where the two do not use equally many bytes.
    """
    points = frontier.points
    found = []
    full = (_FULL, None)
    asked = f"{frontier.questions} questions, paired"
    for name, choice in _OWN:
        own = (name, None)
        if own not in points or full not in points:
            continue
        change = frontier.difference(own, full)
        verdict = judge(change, "at least", LOSS)
        found.append(
            Finding(
                choice,
                f"At {100 * frontier.bytes(own):.0f} % of the bytes accuracy changes by"
                f" {change.words('%')} ({asked}).",
                f"at least {100 * LOSS:.0f} points",
                # Where every answer is one token long nothing can be lost while decoding, so equal
                # accuracy supports nothing.
                verdict if frontier.telling else Verdict.UNDECIDED,
            )
        )
    # Shares of the bytes only; above 1 a budget is a number of image tokens.
    for budget in sorted(
        {b for name, b in points if name == _OURS and b is not None and b < 1}, reverse=True
    ):
        ours, rival = (_OURS, budget), (_RANDOM, budget)
        if rival not in points:
            continue
        gain = frontier.difference(ours, rival)
        # At unequal bytes a difference of accuracy may come from the size of what is kept, not from
        # the way it is chosen.
        fair = frontier.telling and frontier.equal_bytes(ours, rival)
        sizes = f"{100 * frontier.bytes(ours):.1f} %", f"{100 * frontier.bytes(rival):.1f} %"
        found.append(
            Finding(
                f"Choosing by attention beats choosing at random, at {100 * budget:.0f} % of the"
                " bytes",
                f"Accuracy of A-VL (using {sizes[0]}) minus that of random selection (using"
                f" {sizes[1]}): {gain.words('%')} ({asked}).",
                f"above 0, at bytes that differ by at most {100 * EQUAL_BYTES:.0f} % of themselves",
                judge(gain, "at least", 0.0) if fair else Verdict.UNDECIDED,
            )
        )
    return tuple(found)


def table(frontier: Frontier) -> tuple[tuple[str, ...], ...]:
    """Bytes and accuracy of every point on the pooled tasks.

    Keys read and time of attention where the file has them, its difference to the full cache, and
    its accuracy on the tasks answered in one token where these are shown apart.
    """
    apart = frontier.one_token_tasks if frontier.telling else []
    costs = {
        key: title
        for key, title in _COSTS.items()
        if np.isfinite(frontier.cost((_FULL, None), key))
    }
    header = (
        "policy",
        "budget",
        "bytes in use / full",
        *costs.values(),
        "right answers",
        "minus full cache",
    )
    rows = [(*header, "answered in one token") if apart else header]
    for point in frontier.points:
        name, budget = point
        change = "" if name == _FULL else frontier.difference(point, (_FULL, None)).words("%")
        accuracy = frontier.accuracy(point).words("%")
        rows.append(
            (
                name,
                asked(budget),
                f"{frontier.bytes(point):.2f}",
                *(f"{frontier.cost(point, key):.2f}" for key in costs),
                accuracy,
                change,
                *((frontier.accuracy(point, apart).words("%"),) if apart else ()),
            )
        )
    return tuple(rows)


def _scatter(
    frontier: Frontier, tasks: list[str] | None, title: str, *, by_reads: bool = False
) -> Scatter:
    """Accuracy of every point against its bytes.

    Args:
        frontier: what was measured.
        tasks: None: the pooled ones.
        title: of the panel.
        by_reads: against the keys that a decode step reads instead.
    """
    size = Axis("keys and values in use", "share of the full cache's bytes", (0.0, _MOST))
    if by_reads:
        size = Axis("keys read at a decode step", "share of the tokens seen", (0.0, _MOST))

    def used(point: Point) -> float:
        if by_reads:
            return frontier.cost(point, "attended", tasks)
        return frontier.bytes(point, tasks)

    full = frontier.accuracy((_FULL, None), tasks).mean
    series = []
    for name in dict.fromkeys(name for name, _ in frontier.points if name != _FULL):
        # By cost, so that the line that joins the points does not run back.
        points = sorted((p for p in frontier.points if p[0] == name), key=used)
        found = [frontier.accuracy(point, tasks) for point in points]
        y, low, high = (
            np.array([getattr(one, end) for one in found]) for end in ("mean", "low", "high")
        )
        x = np.array([used(point) for point in points])
        label = label_of(name)
        slot = color_slot(label)
        series.append(Points(label, x, y, low, high, slot=slot, joined=len(points) > 1))
    return Scatter(
        size, share("right answers"), tuple(series), (Rule(full, "full cache", "y"),), title=title
    )


def _heat(frontier: Frontier) -> Heat:
    """Accuracy by task at the middle budget, and of what has no budget."""
    # One budget for all policies that have one, so that their rows differ in the policy only.
    budgets = sorted({b for _, b in frontier.points if b is not None and b <= 1})
    middle = min(budgets, key=lambda budget: abs(budget - 0.5)) if budgets else None
    points = [point for point in frontier.points if point[1] in (None, middle)]
    values = np.array(
        [[frontier.accuracy(point, [task]).mean for task in frontier.tasks] for point in points]
    )
    x = Axis("task", "name", ticks=tuple(enumerate(frontier.tasks)))
    y = Axis("policy", "name", ticks=tuple(enumerate(_label(point, frontier) for point in points)))
    return Heat(
        x,
        y,
        share("right answers"),
        values,
        annotate=True,
        # A file of settings without budgets of bytes has no middle one.
        title="by task" if middle is None else f"by task, at {middle:g} of the bytes",
    )


def _differing(frontier: Frontier) -> list[str]:
    """The tasks on which accuracies spread most over policies and budgets.

    In the order of the file.
    """
    spread = {
        t: np.std([frontier.accuracy(p, [t]).mean for p in frontier.points])
        for t in frontier.pooled
    }
    # The panel of a single task would repeat that of the pooled ones.
    chosen = sorted(spread, key=lambda task: -spread[task])[:_SHOWN] if len(spread) > 1 else []
    return [task for task in frontier.tasks if task in chosen]


def _label(point: Point, frontier: Frontier) -> str:
    """A policy's name; with its own settings where it was asked with budgets too."""
    name = label_of(point[0])
    several = any(other != point and other[0] == point[0] for other in frontier.points)
    return f"{name}, own settings" if several and point[1] is None else name


def _of(frontier: Frontier) -> str:
    settings = frontier.about.get("settings") or {}
    command = frontier.about.get("command")
    return f"Made by: {command}." if command else (f"Made with {settings}." if settings else "")


if __name__ == "__main__":
    run_script(section)
