"""Modality mass: how much of a query's attention goes to system, image and text.

Justifies treating them apart.
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
class ModalityMass(SumStatistic):
    """`sum_{k in M} A[q,k]` for M in system, image, text; in [0, 1], the three add up to 1."""

    name = "modality_mass"
    title = "attention mass"
    source = "Zhang et al., A-VL (AAAI 2025), sec. 3"
    justifies = "treating modalities apart"
    columns: ClassVar[tuple[str, ...]] = MODALITIES
    axes: ClassVar[Axes] = {"key_modality": MODALITIES}

    def value(self, rows: QueryRows) -> Tensor:
        return rows.mass()


@dataclass(frozen=True)
class FirstTokenMass(SumStatistic):
    """`A[q, first token]`, the usual attention sink; in [0, 1]."""

    name = "first_token_mass"
    title = "attention mass on the first token"
    source = "Xiao et al., StreamingLLM (ICLR 2024)"
    justifies = "keeping system tokens"
    columns: ClassVar[tuple[str, ...]] = ("first",)

    def value(self, rows: QueryRows) -> Tensor:
        return rows.sum("first")


@dataclass(frozen=True)
class Efficiency(SumStatistic):
    """Mass per token: `sum_{k in M} A[q,k] / |M|`, with |M| the keys of M that row q can see.

    NaN if there is none.
    """

    name = "efficiency"
    title = "attention mass per visible token"
    source = "Chen et al., FastV (ECCV 2024), attention efficiency"
    justifies = "treating modalities apart"
    columns: ClassVar[tuple[str, ...]] = MODALITIES
    axes: ClassVar[Axes] = {"key_modality": MODALITIES}

    def value(self, rows: QueryRows) -> Tensor:
        count = rows.counts
        return torch.where(count > 0, rows.mass() / count, torch.nan)
