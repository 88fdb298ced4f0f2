"""Key redundancy: how alike the keys of a modality are. Speaks about merging them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.tokens import MODALITIES
from avl_analysis.statistics.base import Axes, CacheStatistic
from avl_analysis.statistics.inputs import TokenInfo


@dataclass(frozen=True)
class KeyRedundancy(CacheStatistic):
    """`(n |mean khat|^2 - 1) / (n - 1)`, khat the unit keys of one modality.

    After rotary embedding: their mean cosine over all pairs. 1 = all alike, 0 = orthogonal on
    average; NaN with fewer than two keys.
    """

    name = "key_redundancy"
    title = "mean cosine between keys"
    source = "MixKV"
    justifies = "merging, diversity"
    axes: ClassVar[Axes] = {"key_modality": MODALITIES}

    def value(self, key: Tensor, value: Tensor, tokens: TokenInfo) -> Tensor:
        # (key sets, 3, keys)
        kinds = torch.stack([tokens.modality == code for code in range(3)], 1).float()
        n = kinds.sum(-1)
        lengths = torch.linalg.vector_norm(key, dim=-1).clamp_min(1e-12)
        # (key heads, 3, width): mean unit key of each modality. |sum of n unit vectors|^2 is n plus
        # the sum of all cosines between different ones, hence the formula.
        mean = kinds / lengths[:, None] @ key / n[..., None]
        return torch.where(n > 1, (n * mean.square().sum(-1) - 1) / (n - 1), torch.nan)
