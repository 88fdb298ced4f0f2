"""Sums over weights: by key column, by size, by age; and the values of statistics side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avl.tokens import Modality
from avl_analysis.statistics.ages import by_age
from avl_analysis.statistics.base import RowStatistic
from avl_analysis.statistics.inputs import QueryRows, TokenInfo, for_heads


def weighted_sums(weights: Tensor, columns: Tensor) -> Tensor:
    """(heads, rows, keys) with (key sets, n, keys): (heads, n, rows).

    As columns x weights transposed, which is several times faster than the transposed product: n is
    small.
    """
    heads, rows, keys = weights.shape
    sets = len(columns)
    products = columns @ weights.reshape(sets, -1, keys).transpose(1, 2)
    return products.view(sets, -1, heads // sets, rows).transpose(1, 2).flatten(0, 1)


def count_above(weights: Tensor, threshold: float, scratch: Tensor) -> Tensor:
    """(heads, rows): number of weights of at least threshold x the row's largest.

    In float32: summing bools is slow.
    """
    limit = weights.amax(-1, keepdim=True).mul_(threshold)
    return torch.ge(weights, limit, out=scratch).sum(-1)


def text_by_age(block: Tensor, queries: TokenInfo, keys: TokenInfo) -> Tensor:
    """Sums of the weights of text rows on text keys by age, (heads, ages) float64.

    From weights (heads, rows, keys).
    """
    return by_age(text_only(block, queries, keys), queries.rank, keys.rank)


def text_only(block: Tensor, queries: TokenInfo, keys: TokenInfo) -> Tensor:
    """(heads, rows, keys) with zeros where the query or the key is not text."""
    is_text = (queries.modality == Modality.TEXT)[:, None] & (keys.modality == Modality.TEXT)[
        :, None, :
    ]
    return block if bool(is_text.all()) else block * for_heads(is_text, len(block))


def values_of(statistics: Sequence[RowStatistic], rows: QueryRows) -> Tensor:
    """(heads, rows, values): the values of all statistics side by side."""
    heads, count = rows.sums.shape[:2]
    values = [statistic.value(rows).reshape(heads, count, -1) for statistic in statistics]
    return torch.cat(values, -1) if values else rows.sums.new_zeros(heads, count, 0)
