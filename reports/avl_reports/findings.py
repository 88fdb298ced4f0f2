"""What a figure says about A-VL, decided by rule: supported, not supported, or undecided.

Each figure of a report stands for one choice made in A-VL's design. A `Finding` names the choice,
the number that speaks about it, and the threshold it was held against; the verdict follows from the
number's interval alone. It is *supported* if the whole interval lies on the right side of the
threshold, *not supported* if the whole interval lies on the other side, and *undecided* otherwise,
or when nothing could be measured. The thresholds are ours, stated beside every verdict, and a
reader who wants another one finds the interval there too.

A verdict holds for the model and the samples recorded, not for vision-language models at large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Verdict(StrEnum):
    SUPPORTED = "supported"
    NOT_SUPPORTED = "not supported"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Interval:
    """A mean over samples with its bootstrap interval, all in the unit of what was measured."""

    value: float
    low: float
    high: float

    def words(self, unit: str = "", digits: int = 2) -> str:
        """ "0.61 [0.58, 0.64]", "0.61 (no interval)"; with unit "%" as percentages, in whole ones
        from ten per cent on.
        """
        if not math.isfinite(self.value):
            return "(not measured)"
        scale, sign = (100.0, " %") if unit == "%" else (1.0, f" {unit}" if unit else "")
        if unit == "%":
            digits = 0 if abs(self.value) >= 0.1 else 1
        value, low, high = (
            f"{scale * number:.{digits}f}" for number in (self.value, self.low, self.high)
        )
        return f"{value}{sign} [{low}, {high}]" if self.known else f"{value}{sign} (no interval)"

    @property
    def known(self) -> bool:
        return all(math.isfinite(number) for number in (self.value, self.low, self.high))


@dataclass(frozen=True)
class Finding:
    """One answer of the report.

    Attributes:
        choice: the design choice of A-VL the number speaks about.
        measured: what was measured, in words, with number and interval.
        rule: the threshold, in words.
        verdict: what follows from interval and threshold.
    """

    choice: str
    measured: str
    rule: str
    verdict: Verdict

    @property
    def text(self) -> str:
        return f"{self.measured} {self.choice}: {self.verdict.value} ({self.rule})."


def judge(interval: Interval, side: Literal["at least", "at most"], threshold: float) -> Verdict:
    """Verdict on "the number is at least (at most) the threshold" from the number's interval."""
    if not interval.known:
        return Verdict.UNDECIDED
    low, high = interval.low - threshold, interval.high - threshold
    if side == "at most":
        low, high = -high, -low
    if low >= 0:
        return Verdict.SUPPORTED
    return Verdict.NOT_SUPPORTED if high < 0 else Verdict.UNDECIDED


def judge_within(interval: Interval, bound: float) -> Verdict:
    """Verdict on "the number lies between -bound and bound"."""
    below, above = judge(interval, "at most", bound), judge(interval, "at least", -bound)
    if Verdict.NOT_SUPPORTED in (below, above):
        return Verdict.NOT_SUPPORTED
    return Verdict.SUPPORTED if below is above is Verdict.SUPPORTED else Verdict.UNDECIDED
