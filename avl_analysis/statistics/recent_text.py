"""Recent text: the share of the text attention that falls on the latest tokens. Speaks about T."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.tokens import Modality
from avl_analysis.statistics.base import Axes, WeightStatistic
from avl_analysis.statistics.inputs import QueryRows


@dataclass(frozen=True)
class RecentTextMass(WeightStatistic):
    """`sum_{k in T, q - k < w} A[q,k] / sum_{k in T} A[q,k]`, the row's own token included.

    In [0, 1].
    """

    name = "recent_text_mass"
    title = "share of text attention on the most recent tokens"
    source = "Zhang et al., A-VL (AAAI 2025); windows as in StreamingLLM"
    justifies = "T"
    axes: ClassVar[Axes] = {"window": "windows"}

    windows: tuple[int, ...] = (8, 16, 32, 64)

    def value(self, rows: QueryRows) -> Tensor:
        weights, rank = rows.on(Modality.TEXT)
        # (1 or heads, rows, text keys)
        age = rows.per_head(rows.queries.rank[:, None] - rank[:, None])
        recent = torch.stack([(weights * (age < w)).sum(-1) for w in self.windows], -1)
        mass = rows.sum("text")[..., None]
        return recent / torch.where(mass > 0, mass, torch.nan)
