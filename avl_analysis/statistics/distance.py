"""Attention distance: how far back a row looks, in tokens over text, in patches within an image.

Speaks about T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl_analysis.statistics.base import SumStatistic, WeightStatistic
from avl_analysis.statistics.inputs import QueryRows, last_rank


@dataclass(frozen=True)
class TextDistance(SumStatistic):
    """`sum_k p_k (q - k)` over text keys, p their weights divided by their sum.

    NaN without text mass.
    """

    name = "text_distance"
    title = "mean distance of attended text"
    unit = "tokens"
    source = "Vig & Belinkov (2019), mean attention distance"
    justifies = "T"
    columns: ClassVar[tuple[str, ...]] = ("text", "text_back")

    def value(self, rows: QueryRows) -> Tensor:
        mass = rows.sum("text")
        # Positions are counted back from the newest key: counted from the first one, the sum over
        # long prompts would lose recent distances of a few tokens to rounding.
        # (1 or heads, rows): how far the newest key is ahead of the query.
        ahead = rows.per_head(last_rank(rows.keys)) - rows.queries.rank
        return rows.sum("text_back") / torch.where(mass > 0, mass, torch.nan) - ahead


@dataclass(frozen=True)
class PatchDistance(WeightStatistic):
    """`sum_k p_k |place(q) - place(k)|`, euclidean, over the query's own image.

    Of a video, over the query's own frame. p are the weights of its keys divided by their sum.

    Places are rows and columns of the image's finest grid, the unit is one of its patches. Defined
    for image queries that have a place there; keys without one (class and newline tokens, a coarser
    view of the whole image) are left out.
    """

    name = "patch_distance"
    title = "mean distance of attended patches"
    unit = "patches"
    source = "Dosovitskiy et al., ViT (ICLR 2021), mean attention distance"
    justifies = "T"

    def value(self, rows: QueryRows) -> Tensor:
        result = rows.sums.new_full(rows.sums.shape[:2], torch.nan)
        placed = (rows.queries.row >= 0).nonzero().flatten()  # no row of a decode step is
        if len(placed):
            some = rows.take(placed, rows.weights[:, placed])
            same, distance = self._distances(some)
            mass = some.against(same)
            result[:, placed] = some.against(distance) / torch.where(mass > 0, mass, torch.nan)
        return result

    @staticmethod
    def _distances(rows: QueryRows) -> tuple[Tensor, Tensor]:
        """Which keys are in the query's picture, as numbers, and how far they are, 0 for others.

        Both (key sets, rows, keys).
        """
        query, key = rows.queries, rows.keys
        same = (query.image[:, None] == key.image[:, None]) & (key.row[:, None] >= 0)
        same &= query.frame[:, None] == key.frame[:, None]
        down = (query.row[:, None] - key.row[:, None]).float()
        right = (query.column[:, None] - key.column[:, None]).float()
        return same.float(), torch.hypot(down, right) * same
