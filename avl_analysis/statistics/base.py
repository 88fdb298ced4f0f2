"""What a statistic is: a name, a formula, and the shape of data it reads.

* `SumStatistic`: from sums of weights, a number (or small vector) per query row and head, for
  every row.
* `WeightStatistic`: the same from the weights themselves (sorting, arg-max), for the last prompt
  row, every decode step and at most 32 prompt rows of each query modality, the middle ones of as
  many equal parts.
* `KeyStatistic`: once per sample, from the attention every key received (`KeyScores`).
* `TrajectoryStatistic`: once per sample, from the scores of the image tokens at every step
  (`Trajectory`).
* `CacheStatistic`: once per sample and layer, from the key and value vectors of the prompt.

Of the first two the recording keeps sums and counts over prompt rows by query modality,
`<name>_prefill`, and the values of token-producing rows, `<name>` with dimension step. The others
return a sum and a count, or values and None. Instances are frozen dataclasses, so a recording can
say with which settings it was made. Undefined is NaN (image coverage of a row that sees no image);
it is left out of sums and counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from avl_analysis.recordings.schema import Field
from avl_analysis.statistics.inputs import QueryRows, TokenInfo

Result = tuple[np.ndarray, np.ndarray | None]
"""Sums and their counts, of one shape; or values and None."""


@dataclass(frozen=True)
class Statistic(ABC):
    """What all statistics say about themselves.

    Attributes:
        name: under which the recording holds it.
        title: what the numbers are, as an axis label says it.
        unit: their unit, "" for a pure number.
        source: paper and equation.
        justifies: which number of a policy the statistic speaks about (S, C, K, T, P), or which
            choice in words.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str] = ""
    source: ClassVar[str] = ""
    justifies: ClassVar[str] = ""

    def extra(self) -> Mapping[str, Sequence[Any]]:
        """Dimensions of one value and their labels, e.g. {"tau".

        (0.5, 0.9)}; empty for a plain number.
        """
        return {}

    def labels(self) -> Mapping[str, Sequence[Any]]:
        """Labels of dimensions in `dims` that only this statistic has, e.g. {"lag".

        Range(1, 33)}.
        """
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
        return Field(
            (*dims, *own),
            coords={**self.labels(), **own},
            attrs={k: v for k, v in described.items() if v != ""},
        )


@dataclass(frozen=True)
class RowStatistic(Statistic):
    """A number (or small vector) per query row and head.

    Attributes:
        columns: key columns (`avl_analysis.statistics.inputs.KEY_FEATURES`) whose weighted sums
            `value` asks for.
        reads_values: whether it asks for `rows.value_mass`.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    reads_values: ClassVar[bool] = False

    @abstractmethod
    def value(self, rows: QueryRows) -> Tensor:
        """`(heads, rows, *extra)`; NaN where undefined."""


@dataclass(frozen=True)
class SumStatistic(RowStatistic):
    """From `rows.sum`, `rows.mass`, `rows.counts` and `rows.above` of `thresholds`.

    `rows.weights` is not there.
    """

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Fractions of a row's largest weight for which `rows.above` is wanted."""
        return ()


@dataclass(frozen=True)
class WeightStatistic(RowStatistic):
    """From `rows.weights`, `rows.on` or `rows.shares` of some rows."""


@dataclass(frozen=True)
class CacheStatistic(Statistic):
    """A number (or small vector) per layer and key/value head of the prompt's keys and values."""

    @abstractmethod
    def value(self, key: Tensor, value: Tensor, tokens: TokenInfo) -> Tensor:
        """`(kv heads, *extra)` from keys and values.

        Key and value are (key heads, keys, head dim) float32, tokens (key sets, keys).
        """


@dataclass(frozen=True)
class KeyStatistic(Statistic):
    """Derived from the attention that each key of a sample received.

    Attributes:
        dims: dimensions of the result before `extra`.
        needs_ages: whether `value` reads the sums by age.
    """

    dims: ClassVar[tuple[str, ...]] = ("layer", "head")
    needs_ages: ClassVar[bool] = False

    @abstractmethod
    def value(self, scores: KeyScores) -> Result:
        """Arrays with dimensions `dims` and `extra`."""


@dataclass(frozen=True)
class TrajectoryStatistic(Statistic):
    """Derived from the image-token scores of one sample over its steps.

    Not called for samples without a picture.

    Attributes:
        dims: dimensions of the result before `extra`.
    """

    dims: ClassVar[tuple[str, ...]] = ("layer",)

    @abstractmethod
    def value(self, trajectory: Trajectory) -> Result:
        """Arrays with dimensions `dims` and `extra`."""


@dataclass(eq=False)
class KeyScores:
    """Attention received, summed over query rows, of one sample.

    Attributes:
        received: (layers, heads, 3, positions) float32; from the rows "prompt", "prompt text",
            "decode" (`schema.ROWS`).
        queries: same shape, number of those rows that could see the key.
        modality: (positions,) int8 codes of `Modality`.
        prompt: number of positions that belong to the prompt.
        by_age: (layers, heads, 2, ages) float64, sum of the weights of text keys by age
            (`ages.AGE_STARTS`), from the rows "prompt text" and "decode"; pairs: same shape, number
            of weights in each sum.
    """

    received: np.ndarray
    queries: np.ndarray
    modality: np.ndarray
    prompt: int
    by_age: np.ndarray | None = None
    pairs: np.ndarray | None = None


@dataclass(eq=False)
class Trajectory:
    """Scores of one sample's image tokens over its steps.

    Attributes:
        scores: (steps, layers, image tokens) float32, mean over heads; step 0 is the last prompt
            row. NaN where no head attended to the token (it was not in the cache).
        last: (layers, heads, image tokens) the last prompt row per head.
        image, row, column: (image tokens,) which picture, and the place in it, -1 where unknown.
        layers: the decoder layers, in their order here.
    """

    scores: np.ndarray
    last: np.ndarray
    image: np.ndarray
    row: np.ndarray
    column: np.ndarray
    layers: tuple[int, ...]
