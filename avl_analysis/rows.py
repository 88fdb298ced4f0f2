"""Query rows of one attention call together with what their queries and keys are.

This is what a statistic sees: softmax weights of a block of rows, never a whole map. Sums of the weights over groups of
keys, which most statistics are made of, come out of one matrix product per block (`Rows.sum`).

Positions are *ranks* here: the place of a token among the valid tokens of its sample. A sample in a padded batch
therefore gives the numbers it would give alone. Key j is not assumed to be token j: under a policy the keys of a layer
are whatever the cache holds, in whatever order, possibly different ones per key/value head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from avl.tokens import Modality, TokenLayout


@dataclass(eq=False)
class Tokens:
    """What a set of tokens is; every tensor of the same shape, (batch, rows) for queries, (batch, 1 or key heads, keys)
    for keys.

    Attributes:
        rank: int64 place among the sample's valid tokens; -1 for padding and empty slots.
        modality: int8 code of `Modality`, PADDING where rank is -1.
        image, row, column: int16 picture index and place in its grid, -1 where there is none.
    """

    rank: Tensor
    modality: Tensor
    image: Tensor
    row: Tensor
    column: Tensor

    def __getitem__(self, index: object) -> Tokens:
        return Tokens(*(t[..., index] for t in (self.rank, self.modality, self.image, self.row, self.column)))


def all_tokens(layout: TokenLayout) -> Tokens:
    """The tokens of a layout: (batch, length)."""
    rank = (layout.valid.cumsum(1) - 1).masked_fill(~layout.valid, -1)
    return Tokens(rank, layout.modality, layout.image, layout.row, layout.column)


def at_positions(tokens: Tokens, positions: Tensor) -> Tokens:
    """The tokens at sequence indices `positions`, (batch, ..., n); negative indices give padding."""
    batch = tokens.rank.shape[0]
    flat = positions.clamp_min(0).reshape(batch, -1)
    empty = positions < 0

    def take(source: Tensor) -> Tensor:
        return source.gather(1, flat).view(positions.shape).masked_fill(empty, -1)

    return Tokens(*(take(t) for t in (tokens.rank, tokens.modality, tokens.image, tokens.row, tokens.column)))


def _is(modality: Modality) -> Callable[[Tokens], Tensor]:
    return lambda keys: (keys.modality == modality).float()


COLUMNS: dict[str, Callable[[Tokens], Tensor]] = {
    "system": _is(Modality.SYSTEM),
    "image": _is(Modality.IMAGE),
    "text": _is(Modality.TEXT),
    "first": lambda keys: (keys.rank == 0).float(),
    "text_rank": lambda keys: (keys.modality == Modality.TEXT) * keys.rank.float(),
}
"""Key columns: each gives every key a number, and `Rows.sum(name)` is the attention-weighted sum of them."""


@dataclass(eq=False)
class Rows:
    """A block of query rows.

    Attributes:
        weights: (batch, query heads, rows, keys) float32 softmax weights; 0 where a key is not attended.
        visible: (batch or 1, 1 or query heads, rows, keys) bool, whether the row may attend to the key at all.
        queries: (batch, rows); keys: (batch, 1 or key heads, keys).
    """

    weights: Tensor
    visible: Tensor
    queries: Tokens
    keys: Tokens
    columns: Tensor  # (batch, 1 or key heads, keys, columns)
    column_names: tuple[str, ...]
    _sums: Tensor | None = None
    _cache: dict[str, Tensor] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Query heads per set of keys: all of them where heads share their keys."""
        return self.weights.shape[1] // self.keys.rank.shape[1]

    def sum(self, column: str) -> Tensor:
        """(batch, query heads, rows): sum over keys of weight x column."""
        if self._sums is None:
            self._sums = self.against(self.weights, self.columns)
        return self._sums[..., self.column_names.index(column)]

    def mass(self) -> Tensor:
        """(batch, query heads, rows, 3): weight on system, image and text keys."""
        return torch.stack([self.sum(name) for name in ("system", "image", "text")], -1)

    def against(self, weights: Tensor, columns: Tensor) -> Tensor:
        """(batch, heads, rows, keys) times (batch, 1 or key heads, keys, n): (batch, heads, rows, n)."""
        batch, heads, rows, keys = weights.shape
        sets = columns.shape[1]
        product = torch.matmul(weights.reshape(batch, sets, -1, keys), columns)
        return product.view(batch, heads, rows, columns.shape[-1])

    def count(self) -> Tensor:
        """(batch, 1 or query heads, rows, 3): number of system, image and text keys the row may attend to."""
        if "count" not in self._cache:
            names = [self.column_names.index(name) for name in ("system", "image", "text")]
            kinds = self.columns[..., names]
            visible = self.visible.float()
            if visible.shape[1] == 1 and kinds.shape[1] > 1:
                visible = visible.expand(-1, self.weights.shape[1], -1, -1)
            visible = visible.expand(self.weights.shape[0], -1, -1, -1)
            self._cache["count"] = self.against(visible, kinds)
        return self._cache["count"]

    def take(self, rows: Tensor) -> Rows:
        """Only some rows of the block."""
        sums = None if self._sums is None else self._sums[:, :, rows]
        return Rows(
            self.weights[:, :, rows],
            self.visible[:, :, rows],
            self.queries[rows],
            self.keys,
            self.columns,
            self.column_names,
            sums,
        )
