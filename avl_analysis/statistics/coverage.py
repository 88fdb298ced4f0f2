"""Coverage: which share of the keys holds a given share of the attention.

Speaks about S, C and T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.tokens import MODALITIES
from avl_analysis.statistics.base import Axes, WeightStatistic
from avl_analysis.statistics.inputs import QueryRows

SLACK = 1e-6
"""Rounding allowed when a cumulative share is compared with tau, so that half of ten equal weights
reaches 0.5.
"""


@dataclass(frozen=True)
class Coverage(WeightStatistic):
    """`k(tau) / n` with `k(tau) = min{k : p(1) + ... + p(k) >= tau}`.

    p are the weights on the keys of one modality divided by their sum, in descending order, n the
    number of these keys that the row may attend to. In (0, 1], smaller = sparser.
    """

    name = "coverage"
    title = "share of keys that holds tau of the attention"
    source = "He et al., ZipVL (2410.08584); Wang et al., PrefixKV (2412.03409)"
    justifies = "S, C, T"
    axes: ClassVar[Axes] = {"key_modality": MODALITIES, "tau": "taus"}

    taus: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.99)

    def value(self, rows: QueryRows) -> Tensor:
        # Ascending weights: k(tau) keys hold tau if all the others together hold no more than 1 -
        # tau. One search in the running sum finds how many can be spared, for all taus at once.
        most = 1 + SLACK - rows.sums.new_tensor(self.taus)
        rest = most.expand(*rows.sums.shape[:2], -1).contiguous()
        needed = torch.stack([self._needed(shares, rest) for shares in rows.shares], -2)
        return (needed / rows.counts[..., None]).masked_fill(
            (rows.mass() == 0)[..., None], torch.nan
        )

    @staticmethod
    def _needed(shares: Tensor, rest: Tensor) -> Tensor:
        """(heads, rows, taus): keys but for the most that together hold no more than `rest`."""
        spared = torch.searchsorted(shares.cumsum(-1), rest, right=True)
        return (shares.shape[-1] - spared).clamp_min(1)
