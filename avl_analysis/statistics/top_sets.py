"""Sets of the best-scored image tokens, which the overlap statistics compare.

Not a statistic itself.
"""

from __future__ import annotations

import numpy as np


def top(scores: np.ndarray, fraction: float) -> np.ndarray:
    """Which tokens are among the best `int(fraction * N)`.

    The count is truncated, as A-VL does; of equal scores the earlier tokens are taken. A set of
    fewer than all tokens is undefined where fewer tokens have a score above 0 than it has members:
    which of the others belong to it would be a matter of their order. So a layer that does not see
    the picture, because its window is too short, has no best tokens.

    Args:
        scores: (..., N), not negative; a row with a NaN in it has no defined set.
        fraction: size of the set as a share of all tokens, in [0, 1].

    Returns:
        (..., N) float32 of 0 and 1; all NaN where the set is undefined or would be empty.
    """
    n = scores.shape[-1]
    size = size_of(fraction, n)
    if size == 0:
        return np.full(scores.shape, np.nan, np.float32)
    # The size-th largest score: larger ones are members, equal ones as far as there is room.
    limit = np.partition(scores, n - size, axis=-1)[..., n - size, None]
    above, equal = scores > limit, scores == limit
    room = size - above.sum(-1, keepdims=True)
    chosen = (above | (equal & (equal.cumsum(-1) <= room))).astype(np.float32)
    undefined = np.isnan(scores).any(-1)
    # The set of all tokens needs no ranking, only some attention.
    undefined |= (scores > 0).sum(-1) < (size if size < n else 1)
    chosen[undefined] = np.nan
    return chosen


def size_of(fraction: float, n: int) -> int:
    """`int(fraction * n)`, robust against 0.3 * 10 being 2.9999999999999996."""
    return int(fraction * n + 1e-9)


def overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`|one & other| / |one|` over the last axis of two sets as `top` gives them.

    NaN if either is undefined.
    """
    return (one * other).sum(-1) / one.sum(-1)
