"""What a figure says about A-VL, decided by rule: supported, not supported, or undecided.

Each figure of a report stands for one choice made in A-VL's design. A `Finding` names the choice,
the number that speaks about it, and the threshold it was held against; the verdict follows from the
number's interval alone. It is *supported* if the whole interval lies on the right side of the
threshold, *not supported* if the whole interval lies on the other side, and *undecided* otherwise:
when the interval holds the threshold, when it has no width (samples that all give one number say
nothing about how others would differ), or when nothing could be measured. The thresholds are ours,
stated beside every verdict, and a reader who wants another one finds the interval there too.

A verdict holds for the model and the samples recorded, not for vision-language models at large.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from avl_analysis.intervals import Estimate


class Verdict(StrEnum):
    """What an interval says about a threshold."""

    SUPPORTED = "supported"
    NOT_SUPPORTED = "not supported"
    UNDECIDED = "undecided"


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


def judge(
    interval: Estimate[float], side: Literal["at least", "at most"], threshold: float
) -> Verdict:
    """Verdict on "the number is at least (at most) the threshold" from the number's interval.

    An interval without width is undecided, so that "above 0" and "at least 0" are one question.
    """
    # Samples that all give one number say nothing about how others would differ.
    if not interval.known or interval.low >= interval.high:
        return Verdict.UNDECIDED
    # Moved so that the threshold lies at 0.
    low, high = interval.low - threshold, interval.high - threshold
    if side == "at most":
        # “At most” is “at least” of the mirrored number; mirrored bounds change places.
        low, high = -high, -low
    # A bound exactly at the threshold counts as on the right side.
    if low >= 0:
        return Verdict.SUPPORTED
    return Verdict.NOT_SUPPORTED if high < 0 else Verdict.UNDECIDED


def judge_within(interval: Estimate[float], bound: float) -> Verdict:
    """Verdict on "the number lies between -bound and bound"."""
    return judge_all([judge(interval, "at most", bound), judge(interval, "at least", -bound)])


def judge_all(verdicts: Iterable[Verdict]) -> Verdict:
    """Verdict on several statements together: supported if all are, not supported if one is not."""
    # One statement that fails decides, also beside undecided ones. No statement at all is
    # undecided.
    together = set(verdicts)
    if Verdict.NOT_SUPPORTED in together:
        return Verdict.NOT_SUPPORTED
    return Verdict.SUPPORTED if together == {Verdict.SUPPORTED} else Verdict.UNDECIDED
