"""Coverage: which share of the keys holds a given share of the attention. Speaks about S, C and T."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avl.tokens import MODALITIES, Modality
from avl_analysis.rows import Rows
from avl_analysis.statistics.base import WeightStatistic

SLACK = 1e-6
"""Rounding allowed when a cumulative share is compared with tau, so that half of ten equal weights reaches 0.5."""


@dataclass(frozen=True)
class Coverage(WeightStatistic):
    """`k(tau) / n` with `k(tau) = min{k : p(1) + ... + p(k) >= tau}`, p the weights on the keys of one modality
    divided by their sum, in descending order, n the number of these keys that the row may attend to; in (0, 1],
    smaller = sparser."""

    name = "coverage"
    title = "share of keys that holds tau of the attention"
    source = "He et al., ZipVL (2410.08584); Wang et al., PrefixKV (2412.03409)"
    justifies = "S, C, T"

    taus: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.99)

    def extra(self) -> Mapping[str, Sequence[Any]]:
        return {"key_modality": MODALITIES, "tau": self.taus}

    def value(self, rows: Rows) -> Tensor:
        return torch.stack([self._over(rows, Modality(code)) for code in range(len(MODALITIES))], -2)

    def _over(self, rows: Rows, modality: Modality) -> Tensor:
        """(heads, rows, taus): all keys but the most that together hold no more than 1 - tau."""
        shares = rows.shares(modality)
        rest = 1 + SLACK - shares.new_tensor(self.taus)
        spared = torch.searchsorted(shares.cumsum(-1), rest.expand(*shares.shape[:-1], -1).contiguous(), right=True)
        undefined = rows.sum(MODALITIES[modality]) == 0
        needed = (shares.shape[-1] - spared).clamp_min(1)
        return (needed / rows.count(modality)[..., None]).masked_fill(undefined[..., None], torch.nan)
