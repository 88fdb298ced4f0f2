"""Weights whose statistics one can check by eye, and what a statistic makes of them.

rows(weights, kinds)      one head, given rows of weights (rows, keys) over tokens of these kinds
                          ("s", "i", "t"), the queries being the last tokens; keys behind a query
                          are not visible
uniform(n), one_hot(n, k) a row of n equal weights; a row with everything on key k
"""

from __future__ import annotations

import numpy as np
import torch

from avl_analysis.capture.plan import CapturePlan
from avl_analysis.capture.reduce_prompt import reduce_prompt
from avl_analysis.capture.sample_call import SampleCall
from avl_analysis.capture.visibility import VisibleKeys
from avl_analysis.statistics.ages import AGE_STARTS
from avl_analysis.statistics.base import RowStatistic
from avl_analysis.statistics.inputs import TokenInfo

assert AGE_STARTS[0] == 0


def uniform(n: int) -> list[float]:
    return [1.0 / n] * n


def one_hot(n: int, k: int) -> list[float]:
    return [float(i == k) for i in range(n)]


def tokens(kinds: str, columns: int = 0) -> TokenInfo:
    """Tokens of kinds such as "sstiiiitt"; image tokens lie in one picture with rows of `columns`
    patches.
    """
    modality = torch.tensor(["sit".index(kind) for kind in kinds], dtype=torch.int8)
    image = torch.where(modality == 1, 0, -1).to(torch.int16)
    place = ((modality == 1).cumsum(0) - 1).to(torch.int16)
    unknown = torch.full_like(place, -1)
    row = torch.where(modality == 1, place // columns, -1) if columns else unknown
    column = torch.where(modality == 1, place % columns, -1) if columns else unknown
    row, column = row.to(torch.int16), column.to(torch.int16)
    return TokenInfo(torch.arange(len(kinds)), modality, image, row, column, unknown)


def view(weights: list[list[float]], kinds: str, columns: int = 0) -> SampleCall:
    given = torch.tensor(weights, dtype=torch.float32)[None]
    _, rows, keys = given.shape
    all_tokens = tokens(kinds, columns)
    visible = torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None]
    query, key = given.new_empty(1, rows, 0), given.new_empty(1, keys, 0)
    queries = all_tokens.map(lambda t: t[keys - rows :])
    return SampleCall(
        query,
        key,
        key,
        1.0,
        queries,
        all_tokens.map(lambda t: t[None]),
        VisibleKeys.of_matrix(visible[None]),
        weights=given,
    )


def last_row(
    statistic: RowStatistic, weights: list[list[float]], kinds: str, columns: int = 0
) -> np.ndarray:
    """The statistic's value for the last of these rows."""
    shape = tuple(len(labels) for labels in statistic.extra().values())
    return (
        reduce_prompt(view(weights, kinds, columns), CapturePlan(rows=(statistic,)))
        .step[0]
        .numpy()
        .reshape(shape)
    )
