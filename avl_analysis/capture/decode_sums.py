"""What decode steps add up to in one layer, on the device where the layer runs.

A decode step waits for nothing here: its numbers are added to tensors beside the model, and leave
the device when somebody reads the recording.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from avl_analysis.capture.plan import LayerResult
from avl_analysis.statistics.inputs import TokenInfo, for_heads

ROOM = 256
"""Positions for which room is made at a time."""


class DecodeSums:
    """Sums over the decode rows of one layer.

    Attributes:
        received: (heads, positions) attention received; positions behind the last token are 0.
        queries: (1 or heads, positions) how many rows could see each key.
        ages: (heads, ages) float64 attention of text keys by age, None where it is not asked for.
        pairs: (1 or heads, ages) how many weights that sums.
    """

    def __init__(self) -> None:
        self.received: Tensor | None = None
        self.queries: Tensor | None = None
        self.ages: Tensor | None = None
        self.pairs: Tensor | None = None

    def add_received(self, result: LayerResult, length: int) -> None:
        """Add a step's attention to what the keys have received; `length` tokens are known."""
        assert result.received is not None
        assert result.queries is not None
        received = by_rank(result.received, result.keys, length, 0.0)[:, 0]
        queries = by_rank(result.queries, result.keys, length, 0.0)[:, 0]
        self.received, self.queries = _added(self.received, received), _added(self.queries, queries)

    def add_ages(self, result: LayerResult) -> None:
        """Add a step's attention by age."""
        assert result.ages is not None
        assert result.pairs is not None
        self.ages = result.ages if self.ages is None else self.ages + result.ages
        self.pairs = result.pairs if self.pairs is None else self.pairs + result.pairs


def _added(total: Tensor | None, step: Tensor) -> Tensor:
    """Sums with a step added, (heads, positions), which have room for some more positions."""
    heads, count = step.shape
    if total is None:
        total = step.new_zeros(heads, count + ROOM)
    if total.shape[0] < heads:  # the first steps said the same of all heads
        total = total.expand(heads, -1).clone()
    if total.shape[1] < count:
        total = torch.cat([total, total.new_zeros(len(total), count + ROOM - total.shape[1])], 1)
    total[:, :count] += step
    return total


def by_rank(values: Tensor, keys: TokenInfo, length: int, fill: float) -> Tensor:
    """Values per key, (heads, n, keys), put where the keys' tokens stand.

    (heads, n, length), `fill` where there is none.
    """
    heads, n, count = values.shape
    if keys.in_order and count == length:
        return values
    # (key sets, keys), -1 for slots that hold nothing.
    rank = keys.rank
    placed = values.new_full((heads, n, length + 1), fill)
    place = rank.where(rank >= 0, length)  # the last place takes what belongs nowhere
    if len(rank) == 1:
        placed[:, :, place[0]] = values
    else:
        at = for_heads(place, heads)
        placed.scatter_(2, at[:, None].expand(heads, n, count), values)
    return placed[..., :length]


class LayerArrays:
    """One array per step, (layers, ...), from tensors that stay on their layers' devices.

    They leave the devices when they are read.
    """

    def __init__(self) -> None:
        self._steps: list[np.ndarray | tuple[list[Tensor | None], tuple[int, ...]]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def append(self, layers: Sequence[Tensor | None], shape: tuple[int, ...]) -> None:
        """Add a step.

        A tensor of this shape for every layer, None for a layer that was not seen.
        """
        self._steps.append((list(layers), shape))

    def arrays(self) -> list[np.ndarray]:
        """(layers, ...) float32 of every step, NaN for layers that were not seen."""
        arrays = []
        for index, step in enumerate(self._steps):
            array = step if isinstance(step, np.ndarray) else _stacked(*step)
            self._steps[index] = array
            arrays.append(array)
        return arrays


def _stacked(layers: list[Tensor | None], shape: tuple[int, ...]) -> np.ndarray:
    array = np.full((len(layers), *shape), np.nan, np.float32)
    for layer, values in enumerate(layers):
        if values is not None:
            array[layer] = values.cpu().numpy()
    return array
