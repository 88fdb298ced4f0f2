"""Gini coefficient, entropy and effective count: how unequally a row's attention is spread over the keys of a modality.

p are the weights on the keys of one modality divided by their sum, n the number of these keys the row may attend to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avl.tokens import MODALITIES, Modality
from avl_analysis.rows import Rows
from avl_analysis.statistics.base import WeightStatistic


@dataclass(frozen=True)
class _Concentration(WeightStatistic):
    justifies = "S, C"

    def extra(self) -> Mapping[str, Sequence[Any]]:
        return {"key_modality": MODALITIES}

    def value(self, rows: Rows) -> Tensor:
        kinds = [Modality(code) for code in range(len(MODALITIES))]
        return torch.stack([self._of(rows.shares(kind), rows.count(kind)) for kind in kinds], -1)

    def _of(self, shares: Tensor, count: Tensor) -> Tensor:
        """(heads, rows) from shares in descending order, (heads, rows, n), NaN where there is no mass; count (1 or
        heads, rows) of keys, which may be smaller than n: what lies behind is zero."""
        raise NotImplementedError


@dataclass(frozen=True)
class Gini(_Concentration):
    """`1 + 1/n - (2/n) sum_i (n + 1 - i) p_(i)`, p ascending; 0 = all equal, 1 - 1/n = all on one key.

    In descending order, as used here, the i-th smallest of n is the (n + 1 - i)-th largest.
    """

    name = "gini"
    title = "Gini coefficient of the attention"
    source = "Wang et al., PrefixKV (2412.03409)"

    def _of(self, shares: Tensor, count: Tensor) -> Tensor:
        place = torch.arange(1, shares.shape[-1] + 1, device=shares.device)
        return 1 + 1 / count - 2 / count * (place * shares).sum(-1) + 0 * _defined(shares)


@dataclass(frozen=True)
class Entropy(_Concentration):
    """`H = -sum p ln p` in nats; in [0, ln n]."""

    name = "entropy"
    title = "entropy of the attention"
    unit = "nat"
    source = "Wan et al., MEDA (2502.17599); Qin et al., CAKE (ICLR 2025)"

    def _of(self, shares: Tensor, count: Tensor) -> Tensor:
        return _entropy(shares)


@dataclass(frozen=True)
class EffectiveCount(_Concentration):
    """`e^H`: how many equally attended keys would have this entropy; in [1, n]."""

    name = "effective_count"
    title = "effective number of attended keys"
    unit = "tokens"
    source = "Wan et al., MEDA (2502.17599); Qin et al., CAKE (ICLR 2025)"

    def _of(self, shares: Tensor, count: Tensor) -> Tensor:
        return _entropy(shares).exp()


def _entropy(shares: Tensor) -> Tensor:
    return -torch.xlogy(shares, shares).sum(-1) + 0 * _defined(shares)


def _defined(shares: Tensor) -> Tensor:
    """(heads, rows): NaN where a row has no key of the modality at all (an empty sum would be 0)."""
    return shares[..., 0] if shares.shape[-1] else shares.new_full(shares.shape[:-1], torch.nan)
