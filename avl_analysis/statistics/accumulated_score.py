"""Accumulated score: the attention every token received. What H2O evicts by; speaks about T."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from avl_analysis.statistics.base import KeyScores, KeyStatistic, Result


@dataclass(frozen=True)
class AccumulatedScore(KeyStatistic):
    """`sum_q A[q,k]` over the query rows named in `schema.ROWS`.

    With the number of those rows that could see k.

    `recording["accumulated_score"]` is the quotient, in [0, 1];
    `recording.total("accumulated_score")` the raw sum of H2O.
    """

    name = "accumulated_score"
    title = "attention received per query"
    source = "Zhang et al., H2O (NeurIPS 2023)"
    justifies = "T, H2O"
    dims: ClassVar[tuple[str, ...]] = ("layer", "head", "rows", "position")

    def value(self, scores: KeyScores) -> Result:
        # Undivided: the recording divides where a mean is asked for, and H2O reads the sum.
        return scores.received, scores.queries
