"""What a recording wants of every pass through the model, and what it gets of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from avl_analysis.capture.raw_slices import Raw
from avl_analysis.statistics.base import (
    CacheStatistic,
    RowStatistic,
    Statistic,
    SumStatistic,
    WeightStatistic,
)
from avl_analysis.statistics.inputs import KINDS, TokenInfo


@dataclass(frozen=True)
class CapturePlan:
    """What is wanted of every pass.

    Attributes:
        rows: statistics per query row. cache: statistics of keys and values. received:
        whether the attention received per key is wanted; `ages`: that by age of text keys. scores:
        whether the scores of image tokens are wanted. raw: which weights are kept as they are, None
        for none.
    """

    rows: tuple[RowStatistic, ...] = ()
    cache: tuple[CacheStatistic, ...] = ()
    received: bool = False
    ages: bool = False
    scores: bool = False
    raw: Raw | None = None

    @classmethod
    def of(
        cls, statistics: Sequence[Statistic], maps: str = "none", raw: Raw | None = None
    ) -> CapturePlan:
        """What these statistics read.

        Args:
            statistics: what a recording computes.
            maps: which image-token scores it keeps besides, one of `recorder.MAPS`.
            raw: which weights it keeps as they are, None for none.
        """
        return cls(
            rows=tuple(s for s in statistics if isinstance(s, RowStatistic)),
            cache=tuple(s for s in statistics if isinstance(s, CacheStatistic)),
            received=any(s.reads_received for s in statistics),
            ages=any(s.needs_ages for s in statistics),
            scores=maps != "none" or any(s.reads_scores for s in statistics),
            raw=raw,
        )

    @cached_property
    def sums(self) -> tuple[SumStatistic, ...]:
        return tuple(s for s in self.rows if isinstance(s, SumStatistic))

    @cached_property
    def weights(self) -> tuple[WeightStatistic, ...]:
        return tuple(s for s in self.rows if isinstance(s, WeightStatistic))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*KINDS, *(c for s in self.rows for c in s.columns)]))

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(t for s in self.sums for t in s.thresholds))

    @cached_property
    def reads_values(self) -> bool:
        return any(s.reads_values for s in self.rows)

    @cached_property
    def places(self) -> dict[str, tuple[slice, tuple[int, ...]]]:
        """Where the values of each row statistic lie among all values of a row, and their shape."""
        places, start = {}, 0
        for statistic in (*self.sums, *self.weights):
            shape = tuple(len(labels) for labels in statistic.extra().values())
            size = torch.Size(shape).numel()
            places[statistic.name] = (slice(start, start + size), shape)
            start += size
        return places


@dataclass(eq=False)
class LayerResult:
    """Numbers of one pass of one sample through one layer.

    Values of all row statistics side by side (`Plan.places`).

    Attributes:
        keys: what the keys are, (key sets, keys).
        step: (heads, values) of the row that produces a token.
        weights: (heads, keys) of that row.
        sums, counts: (heads, 3, values) float64, over prompt rows by query modality; None for a
            decode step.
        received: (heads, 2, keys) from prompt and prompt text rows, or (heads, 1, keys) from the
            decode row.
        queries: (1 or heads, 2 or 1, keys) how many of those rows could see the key.
        ages: (heads, ages) float64 attention of text rows on text keys by age.
        pairs: (1 or heads, ages) how many weights that sums.
        cache: statistic -> (key heads, ...).
        raw: (kept heads, kept rows, keys) weights; raw_visible: (1 or kept heads, kept rows, keys)
            bool; raw_rows: ranks of these rows.
    """

    keys: TokenInfo
    step: Tensor
    weights: Tensor
    sums: Tensor | None = None
    counts: Tensor | None = None
    received: Tensor | None = None
    queries: Tensor | None = None
    ages: Tensor | None = None
    pairs: Tensor | None = None
    cache: dict[str, Tensor] = field(default_factory=dict)
    raw: Tensor | None = None
    raw_visible: Tensor | None = None
    raw_rows: Tensor | None = None
