"""A frontier file as numbers: accuracy and bytes of every policy at every budget, pooled over
tasks.

The file (`avl frontier`) holds one line per task and point with a
letter per question, so that accuracies can be pooled and policies compared question by question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from avl_analysis.errors import InputError
from avl_analysis.evaluation.frontier import read
from avl_analysis.intervals import Estimate, paired_share_difference, share_interval
from avl_analysis.recordings.origin import Origin

Point = tuple[str, float | None]
"""Policy and the budget it was given; None: its own settings."""


@dataclass(frozen=True)
class Frontier:
    """What a frontier file says. `about`: where it comes from; `lines`: one per task, policy and
    budget.
    """

    about: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]

    @property
    def origin(self) -> Origin:
        """The model it was measured on."""
        named = re.search(r"\bmodel='([^']*)'", str(self.about.get("settings") or ""))
        revision = str(self.about.get("model_revision") or "")
        return Origin("the frontier", named[1] if named else "", revision)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(str(line["task"]) for line in self.lines))

    @property
    def points(self) -> list[Point]:
        """Policies and budgets, in the order of the file."""
        return list(dict.fromkeys((str(line["policy"]), line["budget"]) for line in self.lines))

    @property
    def questions(self) -> int:
        """How many questions each point was asked."""
        first = self.points[0]
        return int(sum(np.isfinite(self.right(first, [task])).sum() for task in self.tasks))

    def right(self, point: Point, tasks: Sequence[str] | None = None) -> np.ndarray:
        """(questions,) 1 right, 0 wrong, NaN not measured, task after task."""
        letters = "".join(str(line["right"]) for line in self._cells(point, tasks))
        return np.array([{"1": 1.0, "0": 0.0}.get(letter, np.nan) for letter in letters])

    def accuracy(self, point: Point, tasks: Sequence[str] | None = None) -> Estimate:
        """Share of right answers with its Wilson interval."""
        return share_interval(self.right(point, tasks))

    def bytes(self, point: Point, tasks: Sequence[str] | None = None) -> float:
        """Bytes in use when answers ended, as a share of the full cache's, mean over tasks. Keys
        kept in few bits count with the bytes they take.
        """
        return float(
            np.mean(
                [line["filled"] for line in self._cells(point, tasks) if line["filled"] is not None]
            )
        )

    def difference(self, point: Point, to: Point) -> Estimate:
        """Accuracy of one point less that of another, paired by question."""
        return paired_share_difference(self.right(point), self.right(to))

    def _cells(self, point: Point, tasks: Sequence[str] | None) -> list[Mapping[str, Any]]:
        wanted = self.tasks if tasks is None else tasks
        cells = {
            line["task"]: line for line in self.lines if (line["policy"], line["budget"]) == point
        }
        return [cells[task] for task in wanted if task in cells]


def load_frontier(path: str | PathLike[str]) -> Frontier:
    """Read a frontier file.

    Raises:
        InputError: no such file, not a frontier, or one without lines.
    """
    about, lines = read(Path(path))
    needed = {"task", "policy", "budget", "right", "filled"}
    if not lines or not all(needed <= set(line) for line in lines):
        raise InputError(f"{path} holds no points with {', '.join(sorted(needed))}: make it again")
    return Frontier(about, lines)
