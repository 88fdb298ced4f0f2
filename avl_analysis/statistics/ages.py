"""Attention of text queries on text keys by age, the number of tokens between them.

Ages are counted one by one up to 127 and in eight bins per doubling after that, so that profiles of
prompts of any length have the same bins and merge. Age sums are sums along diagonals: where rows
and keys are in order, a block of weights is read with a stride of one row plus one element and its
diagonals become columns.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from avl_analysis.statistics.inputs import for_heads

EXACT = 128
"""Ages below this have a bin each."""
PER_DOUBLING = 8
"""Bins per doubling of the age above."""
LARGEST = 1 << 20
"""Ages from here on share the last bin."""


def _edges() -> np.ndarray:
    steps = np.arange(PER_DOUBLING * int(np.log2(LARGEST / EXACT)) + 1)
    return np.concatenate(
        [np.arange(EXACT), np.round(EXACT * 2.0 ** (steps / PER_DOUBLING)).astype(np.int64)]
    )


AGE_STARTS: np.ndarray = _edges()
"""Smallest age of every bin."""


def by_age(block: Tensor, query_rank: Tensor, key_rank: Tensor) -> Tensor:
    """Sums of a block over equal ages.

    Args:
        key_rank: rank of every key.
        block: (heads, rows, keys) float32, zero wherever it should not count; ages below 0 must be
            zero.
        query_rank: (rows,); key_rank: (key sets, keys).

    Returns:
        (heads, bins) float64; on the CPU where rows and keys are in order.
    """
    # A single row has one key per age: nothing to add up along diagonals.
    several = block.shape[1] > 1 and key_rank.shape[0] == 1
    if not (several and _consecutive(query_rank) and _consecutive(key_rank[0])):
        return _sum_by_age_general(block, query_rank, key_rank)
    heads, rows, keys = block.shape
    # Row i, column j of a block has age a0 + i - j, so equal ages lie on diagonals. Each row is
    # written into a line of `width` numbers, `margin` zeros in front. Read with a stride of one
    # line plus one number, line i is shifted left by i: the diagonals become columns, and summing
    # over rows sums along diagonals. What the shift moves past a line's end falls on the zeros in
    # front of the next line, which is what the margin is for.
    margin, width = rows - 1, keys + rows - 1
    padded = block.new_zeros(heads, rows * width + margin)
    padded[:, : rows * width].view(heads, rows, width)[:, :, margin:] = block
    # Age in the first column; it falls by one per column.
    oldest = int(query_rank[0] - key_rank[0, 0]) + margin
    # Columns with ages below 0 are left out: those keys come after the row and are zero.
    columns = min(width, oldest + 1)
    if columns <= 0:
        return torch.zeros(heads, len(AGE_STARTS), dtype=torch.float64)
    sheared = padded.as_strided((heads, rows, columns), (padded.stride(0), width + 1, 1))
    # (heads, columns); flipped, ages ascend from oldest - columns + 1 to oldest.
    sums = sheared.sum(1).flip(-1).double().cpu().numpy()
    return torch.from_numpy(_bin(sums, oldest - columns + 1))


def bin_ages(sums: Tensor) -> Tensor:
    """(heads, ages from 0 on) into bins, (heads, bins) float64 on the CPU."""
    return torch.from_numpy(_bin(sums.double().cpu().numpy(), 0))


def _consecutive(rank: Tensor) -> bool:
    return bool((rank[1:] - rank[:-1] == 1).all())


def _bin(sums: np.ndarray, first: int) -> np.ndarray:
    """(heads, ages from `first` on) into bins."""
    binned = np.zeros((sums.shape[0], len(AGE_STARTS)))
    if not sums.shape[1]:
        return binned
    # Bins that the ages first ... first + n - 1 fall into, the first and the last perhaps in part.
    low = np.searchsorted(AGE_STARTS, first, "right") - 1
    high = np.searchsorted(AGE_STARTS, first + sums.shape[1] - 1, "right")
    # Where each of these bins begins in `sums`; reduceat adds from one beginning to the next.
    starts = np.maximum(AGE_STARTS[low:high] - first, 0)
    binned[:, low:high] = np.add.reduceat(sums, starts, axis=1)
    return binned


@cache
def _starts(device: torch.device) -> Tensor:
    return torch.from_numpy(AGE_STARTS).to(device)


def _sum_by_age_general(block: Tensor, query_rank: Tensor, key_rank: Tensor) -> Tensor:
    starts = _starts(block.device)
    # Negative ages have zeros in the block; counted as age 0 they add nothing.
    age = (query_rank[:, None] - key_rank[:, None, :]).clamp_min(0)  # (key sets, rows, keys)
    bins = torch.searchsorted(starts, age, right=True) - 1
    heads = block.shape[0]
    sums = block.new_zeros(heads, len(AGE_STARTS), dtype=torch.float64)
    # (heads, rows x keys)
    places = for_heads(bins, heads).expand(heads, -1, -1).flatten(1)
    return sums.scatter_add_(1, places, block.double().flatten(1))
