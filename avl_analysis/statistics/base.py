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

Every statistic has two methods. `value` is the formula: it reduces one block of data to numbers.
`finish` turns what was added up over a sample (`SampleTotals`) into the arrays a recording holds;
the base classes have it, a new statistic does not write it.

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

Axes = Mapping[str, Sequence[Any] | str]
"""Dimension -> its labels, or the name of the attribute that holds them."""


@dataclass(eq=False)
class Finished:
    """One array of a statistic as a recording holds it.

    Attributes:
        field: dimensions, labels and meaning.
        values: the numbers, or sums of them.
        count: of sums, how many numbers each adds up, same shape; None for values that are exact
            as they stand.
    """

    field: Field
    values: np.ndarray
    count: np.ndarray | None = None


@dataclass(frozen=True)
class Statistic(ABC):
    """What all statistics say about themselves.

    The class attributes from `reads_values` on tell the recorder which data to collect; each costs
    time or memory, and is collected if any statistic of a recording asks for it.

    Attributes:
        name: under which the recording holds it.
        title: what the numbers are, as an axis label says it.
        unit: their unit, "" for a pure number.
        source: paper and equation.
        justifies: which number of a policy the statistic speaks about (S, C, K, T, P), or which
            choice in words.
        dims: dimensions of the result before those of one value.
        axes: labels of the dimensions that only this statistic has. Those that are not in `dims`
            are the dimensions of one value and stand behind `dims`, in this order. Labels that
            depend on a setting are given by the name of the attribute that holds them:
            `{"key_modality": MODALITIES, "tau": "taus"}`.
        random_baseline: dimension whose label is the value that random choice would give, "" where
            there is none.
        reads_values: whether it reads the value vectors.
        reads_received: whether it reads the attention that each key received.
        needs_ages: whether it reads the attention on text keys by age.
        reads_scores: whether it reads the scores of the image tokens at every step.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str] = ""
    source: ClassVar[str] = ""
    justifies: ClassVar[str] = ""
    dims: ClassVar[tuple[str, ...]] = ()
    axes: ClassVar[Axes] = {}
    random_baseline: ClassVar[str] = ""
    reads_values: ClassVar[bool] = False
    reads_received: ClassVar[bool] = False
    needs_ages: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = False

    @abstractmethod
    def finish(self, totals: SampleTotals) -> Mapping[str, Finished]:
        """The arrays of one sample by name; none where the sample has nothing to finish."""

    def extra(self) -> Mapping[str, Sequence[Any]]:
        """Dimensions of one value and their labels, e.g. `{"tau": (0.5, 0.9)}`.

        Empty for a plain number.
        """
        return {dim: self._labels_of(dim) for dim in self.axes if dim not in self.dims}

    def labels(self) -> Mapping[str, Sequence[Any]]:
        """Labels of dimensions in `dims` that only this statistic has.

        For example `{"lag": range(1, 33)}`.
        """
        return {dim: self._labels_of(dim) for dim in self.axes if dim in self.dims}

    def _labels_of(self, dim: str) -> Sequence[Any]:
        labels = self.axes[dim]
        if not isinstance(labels, str):
            return labels
        named: Sequence[Any] = getattr(self, labels)
        return named

    def field(self, *dims: str, **attrs: Any) -> Field:
        """The stored array with leading dimensions `dims` and those of one value behind them."""
        own = self.extra()
        described = {
            "long_name": self.title,
            "units": self.unit,
            "source": self.source,
            "justifies": self.justifies,
            "settings": repr(self),
            "random_baseline": self.random_baseline,
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
        prompt_rows: of which prompt rows a recording keeps the sums, in words.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    prompt_rows: ClassVar[str] = "all"

    @abstractmethod
    def value(self, rows: QueryRows) -> Tensor:
        """`(heads, rows, *extra)`; NaN where undefined."""

    def finish(self, totals: SampleTotals) -> Mapping[str, Finished]:
        """Sums over the prompt rows by query modality, and the values of token-producing rows."""
        rows = totals.rows[self.name]
        finished = {self.name: Finished(self.field("layer", "head", "step"), rows.steps)}
        if rows.sums is not None and rows.counts is not None:
            by_modality = self.field(
                "layer", "head", "query_modality", prompt_rows=self.prompt_rows
            )
            finished[f"{self.name}_prefill"] = Finished(by_modality, rows.sums, rows.counts)
        return finished


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

    prompt_rows: ClassVar[str] = "at most 32 per modality, evenly spaced"


@dataclass(frozen=True)
class CacheStatistic(Statistic):
    """A number (or small vector) per layer and key/value head of the prompt's keys and values."""

    dims: ClassVar[tuple[str, ...]] = ("layer", "key_head")
    reads_values: ClassVar[bool] = True

    @abstractmethod
    def value(self, key: Tensor, value: Tensor, tokens: TokenInfo) -> Tensor:
        """`(kv heads, *extra)` from keys and values.

        Key and value are (key heads, keys, head dim) float32, tokens (key sets, keys).
        """

    def finish(self, totals: SampleTotals) -> Mapping[str, Finished]:
        """The values of all layers."""
        return {self.name: Finished(self.field(*self.dims), totals.cache[self.name])}


@dataclass(frozen=True)
class KeyStatistic(Statistic):
    """Derived from the attention that each key of a sample received."""

    dims: ClassVar[tuple[str, ...]] = ("layer", "head")
    reads_received: ClassVar[bool] = True

    @abstractmethod
    def value(self, scores: KeyScores) -> Result:
        """Arrays with dimensions `dims` and `extra`."""

    def finish(self, totals: SampleTotals) -> Mapping[str, Finished]:
        """What `value` says; nothing for a sample of which no attention was seen."""
        if totals.keys is None:
            return {}
        return {self.name: Finished(self.field(*self.dims), *self.value(totals.keys))}


@dataclass(frozen=True)
class TrajectoryStatistic(Statistic):
    """Derived from the image-token scores of one sample over its steps."""

    dims: ClassVar[tuple[str, ...]] = ("layer",)
    reads_scores: ClassVar[bool] = True

    @abstractmethod
    def value(self, trajectory: Trajectory) -> Result:
        """Arrays with dimensions `dims` and `extra`."""

    def finish(self, totals: SampleTotals) -> Mapping[str, Finished]:
        """What `value` says; of a sample without a picture NaN, or sums of nothing."""
        values, count = self.value(totals.trajectory)
        if not totals.has_image:
            # The stand-in trajectory of one unknown token gives the right shapes only.
            values = np.full_like(values, np.nan if count is None else 0)
            count = None if count is None else np.zeros_like(count)
        return {self.name: Finished(self.field(*self.dims), values, count)}


@dataclass(eq=False)
class RowTotals:
    """What a `RowStatistic` came to in one sample.

    Attributes:
        steps: (layers, heads, steps, extra ...) values of the rows that produce a token.
        sums: (layers, heads, 3, extra ...) over prompt rows by query modality, NaN left out; None
            where no prompt was seen.
        counts: same shape, how many values each sum adds up.
    """

    steps: np.ndarray
    sums: np.ndarray | None
    counts: np.ndarray | None


@dataclass(eq=False)
class SampleTotals:
    """What was added up over one sample, for `Statistic.finish`.

    Attributes:
        rows: row statistic -> its totals.
        cache: cache statistic -> (layers, key heads, extra ...).
        keys: attention received by key; None where none was seen.
        trajectory: scores of the image tokens; of one token of which nothing is known where
            `has_image` is False.
        has_image: whether the sample has image tokens whose scores were seen.
    """

    rows: Mapping[str, RowTotals]
    cache: Mapping[str, np.ndarray]
    keys: KeyScores | None
    trajectory: Trajectory
    has_image: bool


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
        frame: (image tokens,) of a video's tokens the frame or group of frames, -1 elsewhere.
        layers: the decoder layers, in their order here.
    """

    scores: np.ndarray
    last: np.ndarray
    image: np.ndarray
    row: np.ndarray
    column: np.ndarray
    frame: np.ndarray
    layers: tuple[int, ...]

    @classmethod
    def unknown(cls, steps: int, layers: tuple[int, ...], heads: int) -> Trajectory:
        """Of one image token of which nothing is known."""
        nowhere = np.full(1, -1)
        scores = np.full((steps, len(layers), 1), np.nan, np.float32)
        last = np.full((len(layers), heads, 1), np.nan, np.float32)
        return cls(scores, last, nowhere, nowhere, nowhere, nowhere, layers)
