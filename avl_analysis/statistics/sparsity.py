"""Threshold sparsity: how many weights are negligible beside the row's largest.

Speaks about S and C.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from avl_analysis.statistics.base import SumStatistic
from avl_analysis.statistics.inputs import QueryRows


@dataclass(frozen=True)
class ThresholdSparsity(SumStatistic):
    """Share of the keys a row may attend to with `A[q,k] < threshold * max_k' A[q,k']`.

    In [0, 1].
    """

    name = "threshold_sparsity"
    title = "share of negligible weights"
    source = "Tu et al., VL-Cache (ICLR 2025), eq. 1-2"
    justifies = "S, C"

    threshold: float = 0.01

    @property
    def thresholds(self) -> tuple[float, ...]:
        return (self.threshold,)

    def value(self, rows: QueryRows) -> Tensor:
        return 1 - rows.above[self.threshold] / rows.counts.sum(-1)
