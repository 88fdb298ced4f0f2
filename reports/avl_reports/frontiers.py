"""A frontier file as numbers: accuracy and bytes of every policy and budget, pooled over tasks.

The file (`avl frontier`) holds one line per task and point with a letter per question, so that
accuracies can be pooled and policies compared question by question. Pooled are only tasks that can
show what a policy loses: the first token of an answer comes from the prompt's own pass, which reads
every key under every policy that drops none before it, so an answer of one token says nothing.
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
from avl_analysis.evaluation.frontier import EQUAL_BYTES, one_token_tasks, read
from avl_analysis.intervals import Estimate, paired_share_difference, share_interval
from avl_analysis.recordings.origin import Origin

Point = tuple[str, float | None]
"""Policy and the budget it was given: a share of the bytes, or, above 1, image tokens beside all
text; None: its own settings."""


@dataclass(frozen=True)
class Frontier:
    """What a frontier file says.

    `about`: where it comes from; `lines`: one per task, policy and budget.
    """

    about: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]

    @property
    def origin(self) -> Origin:
        """The model it was measured on."""
        # The settings are kept as the text of a call, the model's name among its arguments.
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
    def one_token_tasks(self) -> list[str]:
        """Tasks that cannot show what a policy loses while decoding; see `frontier`."""
        return one_token_tasks(self.lines)

    @property
    def pooled(self) -> list[str]:
        """The tasks that are taken together.

        Those with longer answers, or all if there are none.
        """
        # Where all tasks are answered in one token they are pooled all the same, to have something
        # to show; `telling` is then False, and figures draw no verdict.
        alone = self.one_token_tasks
        return [task for task in self.tasks if task not in alone] or self.tasks

    @property
    def telling(self) -> bool:
        """Whether the pooled tasks can show what a policy loses."""
        return len(self.one_token_tasks) < len(self.tasks)

    @property
    def questions(self) -> int:
        """How many questions of the pooled tasks each point was asked."""
        # Every point is asked the same questions, so the first one stands for all.
        first = self.points[0]
        return int(sum(np.isfinite(self.right(first, [task])).sum() for task in self.pooled))

    def right(self, point: Point, tasks: Sequence[str] | None = None) -> np.ndarray:
        """(questions,) 1 right, 0 wrong, NaN not measured, task after task; None: pooled tasks."""
        # Task after task in the order of `tasks`, each in the order of its questions: two points
        # then have the same question in the same place, which the paired intervals rely on.
        letters = "".join(str(line["right"]) for line in self._cells(point, tasks))
        # “-” stands for a question that was not measured.
        return np.array([{"1": 1.0, "0": 0.0}.get(letter, np.nan) for letter in letters])

    def accuracy(self, point: Point, tasks: Sequence[str] | None = None) -> Estimate[float]:
        """Share of right answers with its Wilson interval; None: pooled tasks."""
        return share_interval(self.right(point, tasks))

    def bytes(self, point: Point, tasks: Sequence[str] | None = None) -> float:
        """Bytes of a row when its answer ended, as a share of those of the full cache.

        Of keys and values, mean over tasks (None: pooled ones); NaN where nothing was measured.

        Keys kept in few bits count with the bytes they take. What other rows of the batch held, and
        empty slots, do not count.
        """
        # Every task weighs the same, however many questions it has.
        known = [line["bytes"] for line in self._cells(point, tasks) if line["bytes"] is not None]
        return float(np.mean(known)) if known else float("nan")

    def cost(self, point: Point, key: str, tasks: Sequence[str] | None = None) -> float:
        """Another cost of a point, mean over tasks; NaN where the file does not say.

        Args:
            point: a policy and its budget.
            key: "attended" (keys read at a decode step / tokens seen) or "attention_time"
                (processor time of attention at a decode step / the full cache's).
            tasks: None: pooled ones.
        """
        cells = self._cells(point, tasks)
        known = [float(line[key]) for line in cells if line.get(key) is not None]
        return float(np.mean(known)) if known else float("nan")

    def difference(
        self, point: Point, to: Point, tasks: Sequence[str] | None = None
    ) -> Estimate[float]:
        """Accuracy of `point` minus that of `to`, paired by question (Newcombe's interval).

        Args:
            point: a policy and its budget.
            to: what it is compared with.
            tasks: which tasks; None takes the pooled ones.
        """
        return paired_share_difference(self.right(point, tasks), self.right(to, tasks))

    def equal_bytes(self, one: Point, other: Point) -> bool:
        """Whether two points use equally many bytes, to within `EQUAL_BYTES` of the smaller."""
        # NaN fails the comparison, so points whose bytes are unknown are not called equal.
        sizes = sorted((self.bytes(one), self.bytes(other)))
        return sizes[1] <= (1 + EQUAL_BYTES) * sizes[0]

    def _cells(self, point: Point, tasks: Sequence[str] | None) -> list[Mapping[str, Any]]:
        wanted = self.pooled if tasks is None else tasks
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
    needed = {"task", "policy", "budget", "right", "bytes"}
    if not lines or not all(needed <= set(line) for line in lines):
        raise InputError(f"{path} holds no points with {', '.join(sorted(needed))}: make it again")
    return Frontier(about, lines)
