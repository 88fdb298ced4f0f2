"""What a statistic is: a name, a formula, and one of three shapes of data it reads.

* A `RowStatistic` gives every query row and head a number (or a small vector). The recorder calls it on blocks of prompt
  rows and on decode steps; it stores sums and counts over prompt rows by what the query is, and the values of the rows
  that produce a token (`step`) as they are.
* A `KeyStatistic` reads, once per sample, how much attention every key received (`KeyScores`).
* A `TrajectoryStatistic` reads, once per sample, the scores of the image tokens at every step (`Trajectory`).

Instances are frozen dataclasses, so a recording can say with which settings it was made. Undefined is NaN (image
coverage of a row that sees no image); NaN is left out of sums and counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from avl_analysis.rows import Rows
from avl_analysis.schema import Field


@dataclass(frozen=True)
class Statistic(ABC):
    """What all statistics say about themselves.

    Attributes:
        name: under which the recording holds it.
        title: what the numbers are, as an axis label says it.
        unit: their unit, "" for a pure number.
        source: paper and equation.
        justifies: which part of a policy the statistic speaks about (S, C, K, T, P or in words).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str] = ""
    source: ClassVar[str] = ""
    justifies: ClassVar[str] = ""

    def extra(self) -> Mapping[str, Sequence[Any]]:
        """Dimensions of one value and their labels, e.g. {"key_modality": ("system", "image", "text")}; none: a number."""
        return {}

    def field(self, *dims: str, **attrs: Any) -> Field:
        """The stored array with leading dimensions `dims` and this statistic's own behind them."""
        own = self.extra()
        described = {
            "long_name": self.title,
            "units": self.unit,
            "source": self.source,
            "justifies": self.justifies,
            "settings": repr(self),
            **attrs,
        }
        return Field((*dims, *own), coords=own, attrs={k: v for k, v in described.items() if v != ""})


@dataclass(frozen=True)
class RowStatistic(Statistic):
    """A number (or small vector) per query row and head.

    Attributes:
        columns: key columns (`avl_analysis.rows.COLUMNS`) whose weighted sums `value` asks for.
        every_row: whether prompt sums run over every row. Statistics that sort the weights set this to False: their
            prompt sums run over at most `rows_per_modality` evenly spaced rows of each query modality. The last prompt
            row and decode steps are always exact.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    every_row: ClassVar[bool] = True

    @abstractmethod
    def value(self, rows: Rows) -> Tensor:
        """(batch, query heads, rows, *extra) float32; NaN where undefined."""


@dataclass(frozen=True)
class KeyStatistic(Statistic):
    """Numbers derived from the attention that each key of a sample received."""

    @abstractmethod
    def value(self, scores: KeyScores) -> tuple[np.ndarray, np.ndarray | None]:
        """Sum and count, or values and None; dimensions as `dims` says."""

    dims: ClassVar[tuple[str, ...]] = ("layer", "head")


@dataclass(frozen=True)
class TrajectoryStatistic(Statistic):
    """Numbers derived from the image-token scores of one sample over all its steps."""

    dims: ClassVar[tuple[str, ...]] = ("layer",)

    @abstractmethod
    def value(self, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray | None]:
        """Sum and count, or values and None; dimensions as `dims` says."""


@dataclass(eq=False)
class KeyScores:
    """Attention received, summed over query rows, of one sample.

    Attributes:
        received: (layers, heads, 3, positions) float32; rows "prompt", "prompt text", "decode" of `schema.ROWS`.
        queries: same shape (or broadcast to it), number of those query rows that could see the key.
        modality: (positions,) int8 codes of `Modality`.
    """

    received: np.ndarray
    queries: np.ndarray
    modality: np.ndarray


@dataclass(eq=False)
class Trajectory:
    """Scores of one sample's image tokens over its steps.

    Attributes:
        scores: (steps, layers, image tokens) float32, mean over heads; step 0 is the last prompt row. NaN where a token
            was not attended at all (under a policy).
        last: (layers, heads, image tokens) the last prompt row per head.
        row, column: (image tokens,) place in the picture, -1 where unknown; image: which picture.
    """

    scores: np.ndarray
    last: np.ndarray
    image: np.ndarray
    row: np.ndarray
    column: np.ndarray
