"""Value-weighted mass: attention times the length of what is read.

A warning that attention is not contribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.tokens import MODALITIES
from avl_analysis.statistics.base import Axes, SumStatistic
from avl_analysis.statistics.inputs import QueryRows


@dataclass(frozen=True)
class ValueWeightedMass(SumStatistic):
    """`sum_{k in M} A[q,k] |v_k| / sum_k A[q,k] |v_k|` for M in system, image, text.

    In [0, 1], adds up to 1.
    """

    name = "value_weighted_mass"
    title = "value-weighted attention mass"
    source = "Guo et al., VATP (EMNLP 2024)"
    justifies = "a warning: attention is not contribution"
    reads_values: ClassVar[bool] = True
    axes: ClassVar[Axes] = {"key_modality": MODALITIES}

    def value(self, rows: QueryRows) -> Tensor:
        mass = rows.value_mass
        if mass is None:
            raise TypeError("value norms were not taken for these rows")
        # Sinks often have short value vectors: what is attended to is then not what is read.
        total = mass.sum(-1, keepdim=True)
        return mass / torch.where(total > 0, total, torch.nan)
