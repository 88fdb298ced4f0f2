"""Gini coefficient, entropy and effective count.

How unequally a row's attention is spread over the keys of a modality.

p are the weights on the keys of one modality divided by their sum, n the number of these keys the
row may attend to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.tokens import MODALITIES
from avl_analysis.statistics.base import Axes, WeightStatistic
from avl_analysis.statistics.inputs import QueryRows


@dataclass(frozen=True)
class _Concentration(WeightStatistic):
    justifies = "S, C"
    axes: ClassVar[Axes] = {"key_modality": MODALITIES}


@dataclass(frozen=True)
class Gini(_Concentration):
    """`1 + 1/n - (2/n) sum_i (n + 1 - i) p_(i)`, p ascending.

    0 = all equal, 1 - 1/n = all on one key.

    Keys the row may not attend to come first, with p = 0, so n + 1 - i is counted from the end.
    """

    name = "gini"
    title = "Gini coefficient of the attention"
    source = "Wang et al., PrefixKV (2412.03409)"

    def value(self, rows: QueryRows) -> Tensor:
        # sum_i (n + 1 - i) p_(i) over ascending p, by modality. Keys that a row cannot see have p =
        # 0 and stand first, with the highest numbers but no weight.
        from_end = torch.stack([self._from_end(shares) for shares in rows.shares], -1)
        gini = 1 + (1 - 2 * from_end) / rows.counts
        return gini.where(rows.counts > 0, torch.nan)

    @staticmethod
    def _from_end(shares: Tensor) -> Tensor:
        """(heads, rows): mean place of the attention among the keys.

        The last and largest is the first.
        """
        return shares @ torch.arange(
            shares.shape[-1], 0, -1, device=shares.device, dtype=shares.dtype
        )


@dataclass(frozen=True)
class Entropy(_Concentration):
    """`H = -sum p ln p` in nats; in [0, ln n]."""

    name = "entropy"
    title = "entropy of the attention"
    unit = "nat"
    source = "Wan et al., MEDA (2502.17599); Qin et al., CAKE (ICLR 2025)"

    def value(self, rows: QueryRows) -> Tensor:
        return rows.entropy


@dataclass(frozen=True)
class EffectiveCount(_Concentration):
    """`e^H`: how many equally attended keys would have this entropy; in [1, n]."""

    name = "effective_count"
    title = "effective number of attended keys"
    unit = "tokens"
    source = "Wan et al., MEDA (2502.17599); Qin et al., CAKE (ICLR 2025)"

    def value(self, rows: QueryRows) -> Tensor:
        return rows.entropy.exp()
