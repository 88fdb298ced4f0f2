"""Observers for tests: what hooks tell of every pass and every attention call.

Notes               keeps what it is told, with the softmax weights of every call
Watch(function)     calls a function with every attention call and its output
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from avl.attention import AttentionCall, Forward, attention_weights
from avl.hooks import Observer
from avl.tokens import TokenLayout


class Noted(NamedTuple):
    """What is kept of a call: weights (batch, query heads, rows, keys), positions of keys, options
    of the attention function.
    """

    weights: Tensor
    key_positions: Tensor | None
    options: dict[str, Any]


class Notes(Observer):
    """Keeps what it is told.

    Attributes:
        begun: (kind, step, start, tokens, length of the layout) of every pass; ended: the steps.
        layouts: of every pass.
        passes: layer -> its call, of every pass.
        weights: (step, layer, weights) of every call.
    """

    def __init__(self) -> None:
        self.begun: list[tuple[str, int, int, int, int]] = []
        self.ended: list[int] = []
        self.layouts: list[TokenLayout] = []
        self.passes: list[dict[int, Noted]] = []
        self.weights: list[tuple[int, int, Tensor]] = []

    def begin(self, forward: Forward) -> None:
        self.layouts.append(forward.layout)
        self.begun.append(
            (forward.kind, forward.step, forward.start, forward.tokens, forward.layout.length)
        )
        self.passes.append({})

    def observe(self, call: AttentionCall, output: Tensor) -> None:
        noted = Noted(attention_weights(call), call.key_positions, dict(call.options))
        self.passes[-1][call.layer] = noted
        self.weights.append((call.forward.step, call.layer, noted.weights))

    def end(self, forward: Forward) -> None:
        self.ended.append(forward.step)

    def of_layer(self, layer: int) -> list[Tensor]:
        """Weights of one layer, of every pass."""
        return [seen[layer].weights for seen in self.passes]


class Watch(Observer):
    """Calls `seen(call, output)` after every attention call."""

    def __init__(self, seen: Callable[[AttentionCall, Tensor], object]) -> None:
        self.seen = seen

    def observe(self, call: AttentionCall, output: Tensor) -> None:
        self.seen(call, output)
