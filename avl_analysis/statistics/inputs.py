"""What a statistic sees of one sample.

Query rows, what their queries and keys are, and sums of their weights.

Positions are *ranks* here: the place of a token among the valid tokens of its sample, so a sample
in a padded batch gives the numbers it would give alone. Key j is not assumed to be token j: under a
policy the keys of a layer are whatever the cache holds, in whatever order, possibly different ones
per key/value head ("key sets": one for all heads, or one per key/value head).

Most statistics are sums of weights over groups of keys. These come for every row out of one matrix
product with `KEY_FEATURES`; the weights themselves are only there for the few rows that
`WeightStatistic`s read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from avl.tokens import Modality, TokenLayout


@dataclass(eq=False)
class TokenInfo:
    """What a set of tokens is.

    Tensors of one shape, e.g. (rows,) for queries, (key sets, keys) for keys.

    Attributes:
        rank: int64 place among the sample's valid tokens; -1 for padding and empty cache slots.
        modality: int8 code of `Modality`, PADDING where rank is -1.
        image, row, column: int16 picture index and place in its grid, -1 where there is none.
        frame: int16 frame or group of frames of a video, -1 for everything else.
    """

    rank: Tensor
    modality: Tensor
    image: Tensor
    row: Tensor
    column: Tensor
    frame: Tensor

    @cached_property
    def in_order(self) -> bool:
        """Of keys: whether key j is token j, for all heads, and none is missing."""
        own = torch.arange(self.rank.shape[-1], device=self.rank.device)
        return len(self.rank) == 1 and bool((self.rank[0] == own).all())

    @cached_property
    def kinds(self) -> tuple[Tensor | slice, ...]:
        """Of keys that are the same for all heads.

        Which are system, image and text, as slices where these have no gaps.
        """
        return tuple(
            as_slice((self.modality[0] == code).nonzero().flatten()) for code in range(len(KINDS))
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenInfo:
        return TokenInfo(*(change(getattr(self, name)) for name in TOKEN_INFO))

    def at(self, index: Tensor) -> TokenInfo:
        """The tokens of one sample, (length,), at sequence indices `index` of any shape.

        Negative ones give padding.
        """
        place, nowhere = index.clamp_min(0), index < 0
        return self.map(lambda source: source[place].masked_fill(nowhere, -1))


def sample_tokens(layout: TokenLayout, sample: int) -> TokenInfo:
    """All tokens of one row of a batch, (length,)."""
    valid = layout.valid[sample]
    rank = torch.where(valid, valid.cumsum(0) - 1, -1)
    return TokenInfo(
        rank,
        layout.modality[sample],
        layout.image[sample],
        layout.row[sample],
        layout.column[sample],
        layout.frame[sample],
    )


TOKEN_INFO = tuple(field.name for field in fields(TokenInfo))
"""Names of the tensors of a `TokenInfo`, in order."""


def last_rank(keys: TokenInfo) -> Tensor:
    """(key sets, 1): rank of the newest key.

    Distances are counted from there, so that recent ones stay exact.
    """
    return keys.rank.amax(-1, keepdim=True)


def _kind(modality: Modality) -> Callable[[TokenInfo], Tensor]:
    return lambda keys: (keys.modality == modality).float()


KEY_FEATURES: Mapping[str, Callable[[TokenInfo], Tensor]] = {
    "system": _kind(Modality.SYSTEM),
    "image": _kind(Modality.IMAGE),
    "text": _kind(Modality.TEXT),
    "first": lambda keys: (keys.rank == 0).float(),
    "text_back": lambda keys: (
        (keys.modality == Modality.TEXT) * (last_rank(keys) - keys.rank).float()
    ),
}
"""Numbers that every key carries, (key sets, keys); `QueryRows.sum(name)` is their sum weighted by
attention.
"""

KINDS = ("system", "image", "text")


def key_columns(keys: TokenInfo, names: tuple[str, ...]) -> Tensor:
    """(key sets, columns, keys) float32."""
    return torch.stack([KEY_FEATURES[name](keys) for name in names], 1)


@dataclass(eq=False)
class QueryRows:
    """Query rows of one sample.

    `heads` are query heads of one layer, or of several layers one after another.

    Attributes:
        queries: what the queries are, (rows,). keys: what the keys are, (key sets, keys).
        counts: (1 or heads, rows, 3) float32, number of system, image and text keys the row may
        attend to. sums: (heads, rows, columns) weighted sums of the key columns named in `columns`.
        value_mass: (heads, rows, 3) sums over system, image and text keys of weight x norm of the
        key's value vector,
            or None where no statistic asked for it. above: threshold -> (heads, rows), number of
        weights of at least threshold x the row's largest. given: (heads, rows, keys) float32
        softmax weights, 0 where a key is not attended; None if only sums are there.
    """

    queries: TokenInfo
    keys: TokenInfo
    counts: Tensor
    sums: Tensor
    columns: tuple[str, ...]
    above: Mapping[float, Tensor]
    value_mass: Tensor | None = None
    given: Tensor | None = None

    def take(self, rows: Tensor, weights: Tensor) -> QueryRows:
        """Only the rows of these indices, with their weights, (heads, rows, keys)."""
        return QueryRows(
            self.queries.map(lambda t: t[rows]),
            self.keys,
            self.counts[:, rows],
            self.sums[:, rows],
            self.columns,
            {threshold: above[:, rows] for threshold, above in self.above.items()},
            None if self.value_mass is None else self.value_mass[:, rows],
            weights,
        )

    def sum(self, column: str) -> Tensor:
        """(heads, rows): sum over keys of weight x column."""
        return self.sums[..., self.columns.index(column)]

    def mass(self) -> Tensor:
        """(heads, rows, 3): weight on system, image and text keys."""
        return torch.stack([self.sum(kind) for kind in KINDS], -1)

    @property
    def weights(self) -> Tensor:
        """(heads, rows, keys)."""
        if self.given is None:
            raise TypeError(
                "only sums of these rows are there; derive the statistic from WeightStatistic to"
                " read weights"
            )
        return self.given

    def per_head(self, values: Tensor) -> Tensor:
        """(key sets, ...) repeated so that it stands beside weights and sums: (1 or heads, ...)."""
        return for_heads(values, self.sums.shape[0])

    def against(self, values: Tensor) -> Tensor:
        """(heads, rows): sum over keys of weight x values, (key sets, rows, keys)."""
        if len(values) > 1:
            return (self.weights * self.per_head(values)).sum(-1)
        # One product per row, of all heads: (rows, heads, keys) with (rows, keys, 1).
        by_row = self.weights.transpose(0, 1) @ values[0, :, :, None]
        return by_row[..., 0].T

    def on(self, modality: Modality) -> tuple[Tensor, Tensor]:
        """The weights on keys of one modality, (heads, rows, n), and these keys' ranks.

        The ranks are (key sets, n).

        Other keys are left out, or their weights are zero.
        """
        # Key/value heads hold different keys: no columns are the modality's in all of them, so the
        # others are set to zero.
        if len(self.keys.rank) > 1:
            is_kind = self.keys.modality == modality
            return self.weights * self.per_head(is_kind[:, None]), self.keys.rank
        at = self.keys.kinds[modality]
        return self.weights[..., at], self.keys.rank[:, at]

    @cached_property
    def shares(self) -> tuple[Tensor, ...]:
        """Of each modality (heads, rows, n): `on(modality)` divided by its sum, ascending.

        NaN where the sum is 0.
        """
        ascending = [_ascending(self.on(Modality(code))[0]) for code in range(len(KINDS))]
        # 0 / 0 is NaN: a row that gives the modality no weight has no shares.
        return tuple(weights.div_(weights.sum(-1, keepdim=True)) for weights in ascending)

    @cached_property
    def entropy(self) -> Tensor:
        """(heads, rows, 3): `-sum p ln p` of the shares of each modality, in nats.

        NaN where they are undefined.
        """
        return torch.stack([self._entropy(shares) for shares in self.shares], -1)

    @staticmethod
    def _entropy(shares: Tensor) -> Tensor:
        if not shares.shape[-1]:
            return shares.new_full(shares.shape[:-1], torch.nan)
        # 0 ln 0 = 0; torch.xlogy takes twice the time.
        logs = shares.clamp_min(torch.finfo(shares.dtype).tiny).log_()
        return -torch.linalg.vecdot(shares, logs)


def for_heads(values: Tensor, heads: int) -> Tensor:
    """(key sets, ...) repeated to (heads, ...); a single set stands for all heads and stays one."""
    return (
        values if len(values) in (1, heads) else values.repeat_interleave(heads // len(values), 0)
    )


Places = TypeVar("Places", Tensor, np.ndarray)


def as_slice(at: Places) -> Places | slice:
    """Ascending indices, as a slice where they are consecutive: what it takes is no copy."""
    if len(at) and int(at[-1]) - int(at[0]) + 1 == len(at):
        return slice(int(at[0]), int(at[-1]) + 1)
    return at


def _ascending(values: Tensor) -> Tensor:
    """A copy sorted along the last axis.

    Numpy sorts with vector instructions, torch does not on a CPU.
    """
    if values.device.type != "cpu":
        return values.sort(-1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))
