"""Sums over the attention weights of a prompt's rows, block by block, without a map.

A block holds the scaled or unscaled products of some query heads and rows with all keys that these
rows may attend to. `RowSums.add` turns it into softmax weights and takes everything that is wanted
of them at once: sums weighted by columns of numbers, how many weights are large, the weights that
keys receive, sums by age, and copies of a few rows. The compiled version (prompt_rows_compiled.py)
does this in one pass per row; the reference below says what it computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from avl.kernels.backend import COMPILED, backend_for


@dataclass(eq=False)
class RowRequest:
    """What is wanted of the rows of all heads; what rows and keys are.

    Key sets: 1 where all heads see the same keys, else one for each key/value head.

    Attributes:
        thresholds: fractions of a row's largest weight; how many weights reach each is counted.
        picked: (rows,) int64, where the weights of a row are to be copied, -1 for rows that are
            not.
        raw: (rows,) int64, the same for the heads whose weights are copied into a place of their
            own; None for no such copies.
        groups: (m, rows) float32, factors with which a row's weights are added to what keys
            receive; None for nothing.
        query_ranks: (rows,) int64, rank of the query where its weights are summed by age, else -1;
            None for no ages.
        key_ranks: (key sets, keys) int64, rank of the key where its weight is summed by age, else
            -1. The age is the difference of the ranks; keys behind the query are left out.
    """

    thresholds: tuple[float, ...]
    picked: Tensor
    raw: Tensor | None = None
    groups: Tensor | None = None
    query_ranks: Tensor | None = None
    key_ranks: Tensor | None = None

    def __post_init__(self) -> None:
        self.picked_places: list[int] = self.picked.tolist()
        self.raw_places: list[int] = [] if self.raw is None else self.raw.tolist()
        self.age_count = 0 if self.query_ranks is None else max(int(self.query_ranks.max()) + 1, 1)
        self.runs = None if self.key_ranks is None else _runs(self.key_ranks)


def column_extents(columns: Tensor) -> Tensor:
    """(n, 2) int64: from where to where any key set's column, (key sets, n, keys), is not 0."""
    used = (columns != 0).any(0)
    marks = used.to(torch.uint8)
    first, stop = marks.argmax(-1), marks.shape[-1] - marks.flip(-1).argmax(-1)
    return torch.stack([first, torch.where(used.any(-1), stop, first)], -1)


def _runs(ranks: Tensor) -> Tensor:
    """Stretches of keys whose ranks follow one another, (key sets, runs, 3) int64.

    Start, stop and first rank of the longest; filled up with empty stretches.
    """
    stretches = []
    for own in ranks:
        counts = own >= 0
        follows = torch.zeros_like(counts)
        follows[1:] = counts[1:] & counts[:-1] & (own[1:] == own[:-1] + 1)
        starts = (counts & ~follows).nonzero().flatten()
        after = torch.zeros_like(counts)
        after[:-1] = follows[1:]
        stops = (counts & ~after).nonzero().flatten() + 1
        stretches.append(torch.stack([starts, stops, own[starts]], 1))
    most = max(len(each) for each in stretches)
    return torch.stack(
        [torch.nn.functional.pad(each, (0, 0, 0, most - len(each))) for each in stretches]
    )


class _Block(NamedTuple):
    """The arguments of `RowSums.add`; `ready` says that products are weights already."""

    products: Tensor
    heads: slice
    start: int
    first: int
    ends: Tensor
    scaling: float
    sinks: Tensor | None
    ready: bool


class RowSums:
    """What was asked for, of some query heads of one layer; filled block by block.

    Attributes:
        sums: (heads, n, rows) float32, sums of the columns weighted by attention; NaN where weights
            are not numbers.
        above: (thresholds, heads, rows) float32, number of weights of at least the threshold x the
            row's largest.
        picked: (heads, picked, keys) float32 weights.
        raw: (raw heads, raw rows, keys) float32 weights.
        received: (heads, m, keys) float32, weights of all rows times their factor.
    """

    def __init__(
        self,
        request: RowRequest,
        columns: Tensor,
        heads: int,
        groups: int,
        *,
        extents: Tensor | None = None,
        first_set: int = 0,
        raw_heads: Sequence[int] = (),
    ) -> None:
        """Make room.

        Args:
            request: what is wanted.
            columns: (key sets of these heads, n, keys) float32, numbers whose sums, weighted by
                attention, are wanted.
            heads: number of query heads.
            groups: query heads per key/value head.
            extents: `column_extents` of the columns where they are known.
            first_set: the first key set of these heads in `request.key_ranks`.
            raw_heads: which of them are copied whole, where `request.raw` asks for it.
        """
        rows, (_, count, keys), new = len(request.picked), columns.shape, columns.new_zeros
        self.request, self._columns = request, columns
        self.backend = backend_for(columns.device)
        self.sums = new(heads, count, rows)
        self.above = new(len(request.thresholds), heads, rows)
        self.picked = new(heads, 1 + max(request.picked_places), keys)
        self.received = new(heads, 0 if request.groups is None else len(request.groups), keys)
        self._ages = new(heads, request.age_count, dtype=torch.float64)  # the oldest first
        kept = tuple(raw_heads) if request.raw is not None else ()
        self.raw = new(len(kept), 1 + max(request.raw_places, default=-1), keys)
        self._raw_heads = [kept.index(head) if head in kept else -1 for head in range(heads)]
        # Which columns and ranks a query head has: those of its key/value head, or the only ones.
        sets = [head // groups for head in range(heads)]
        self._sets = sets if len(columns) > 1 else [0] * heads
        shared = request.key_ranks is None or len(request.key_ranks) == 1
        self._rank_sets = [0] * heads if shared else [first_set + own for own in sets]
        if self.backend == COMPILED:
            self._prepare(column_extents(columns) if extents is None else extents)

    @property
    def by_age(self) -> Tensor:
        """(heads, ages) float64, sums by age, from age 0 on."""
        return self._ages.flip(1)

    def add(
        self,
        products: Tensor,
        heads: slice,
        start: int,
        first: int,
        ends: Tensor,
        scaling: float = 1.0,
        sinks: Tensor | None = None,
        *,
        weights: bool = False,
    ) -> None:
        """Take what is wanted from a block, which is overwritten.

        Args:
            products: (heads, rows, keys) float32, contiguous; -inf for keys that a row may not
                attend to.
            heads: which of the query heads.
            start: number of the block's first row; `first` of its first key.
            ends: (rows,) int64: each row may attend to so many of the block's keys at most, the
                leading ones.
            scaling: factor on the products, above 0.
            sinks: (query heads of the block, 1 or all rows) float32 logits that take part in the
                softmax and stand for no key; with these, `scaling` must be 1.
            weights: `products` are softmax weights already; the other arguments about them, `ends`
                included, are then not read.
        """
        block = _Block(products, heads, start, first, ends, scaling, sinks, weights)
        if self.backend == COMPILED:
            self._add_compiled(block)
        else:
            self._add_reference(block)

    # -- the reference -----------------------------------------------------------------------------

    def _add_reference(self, block: _Block) -> None:
        request, (_, size, width) = self.request, block.products.shape
        heads = block.heads
        rows, keys = slice(block.start, block.start + size), slice(block.first, block.first + width)
        weights = block.products if block.ready else _softmax(block, rows)
        for place, head in enumerate(range(heads.start, heads.stop)):
            columns = self._columns[self._sets[head]][:, keys]
            self.sums[head, :, rows] = columns @ weights[place].T
        largest = weights.amax(-1, keepdim=True)
        for place, threshold in enumerate(request.thresholds):
            self.above[place, heads, rows] = (weights >= largest * threshold).sum(-1).float()
            self.above[place, heads, rows].masked_fill_(largest[..., 0] == 0, 0.0)
        _copy_rows(weights, request.picked_places[rows], self.picked[heads], keys)
        if request.raw is not None:
            for place, head in enumerate(self._raw_heads[heads]):
                if head >= 0:
                    _copy_rows(weights[place], request.raw_places[rows], self.raw[head], keys)
        if request.groups is not None:
            self.received[heads, :, keys] += request.groups[:, rows] @ weights
        if request.query_ranks is not None:
            self._add_ages(weights, heads, rows, keys)

    def _add_ages(self, weights: Tensor, heads: slice, rows: slice, keys: slice) -> None:
        request = self.request
        assert request.query_ranks is not None
        assert request.key_ranks is not None
        used = (request.query_ranks[rows] >= 0).nonzero().flatten()
        queries = request.query_ranks[rows][used]
        for place, head in enumerate(range(heads.start, heads.stop)):
            ranks = request.key_ranks[self._rank_sets[head], keys]
            columns = (ranks >= 0).nonzero().flatten()
            some = weights[place][used[:, None], columns]
            age = queries[:, None] - ranks[columns]
            some = some.masked_fill(age < 0, 0.0)
            places = request.age_count - 1 - age.clamp_min(0)
            self._ages[head].index_add_(0, places.flatten(), some.double().flatten())

    # -- the compiled version ----------------------------------------------------------------------

    def _prepare(self, extents: Tensor) -> None:
        """Arrays in the form the compiled function takes.

        Contiguous, and empty where nothing is wanted.
        """
        request, keys = self.request, self._columns.shape[2]
        nothing = torch.zeros(0, dtype=torch.int64)
        tensors = (
            torch.tensor(self._sets),
            torch.tensor(self._rank_sets),
            self._columns,
            extents,
            self.sums,
            torch.tensor(request.thresholds, dtype=torch.float32),
            self.above,
            request.picked,
            self.picked,
            nothing if request.raw is None else request.raw,
            torch.tensor(self._raw_heads),
            self.raw,
            torch.zeros(0, 0, dtype=torch.float32) if request.groups is None else request.groups,
            self.received,
            torch.zeros(self.received.shape[1], keys, dtype=torch.float32),
            nothing if request.query_ranks is None else request.query_ranks,
            torch.zeros(1, 0, 3, dtype=torch.int64) if request.runs is None else request.runs,
            self._ages,
        )
        self._no_sinks = torch.zeros(0, 0, dtype=torch.float32).numpy()
        self._arrays = [tensor.contiguous().numpy() for tensor in tensors]

    def _add_compiled(self, block: _Block) -> None:
        from avl.kernels.prompt_rows_compiled import add_rows  # importing numba takes a while

        products, sinks = block.products, block.sinks
        if (
            products.device.type != "cpu"
            or not products.is_contiguous()
            or products.dtype != torch.float32
        ):
            raise ValueError(
                f"the compiled kernel takes contiguous float32 products on a processor; got"
                f" {products.dtype} of strides {products.stride()} on {products.device}"
            )
        add_rows(
            products.numpy(),
            block.ends.numpy(),
            # Powers of two are what the kernel computes: e^x = 2^(x / ln 2).
            block.scaling / math.log(2),
            self._no_sinks if sinks is None else sinks.float().contiguous().numpy(),
            block.first,
            block.start,
            block.heads.start,
            block.ready,
            *self._arrays,
        )


def _softmax(block: _Block, rows: slice) -> Tensor:
    """Weights, (heads, rows, keys), in place of the block's products.

    Rows that see no key have weights of 0.
    """
    products, sinks = block.products, block.sinks
    behind = torch.arange(products.shape[2], device=products.device) >= block.ends[:, None]
    logits = products.mul_(block.scaling).masked_fill_(behind, -torch.inf)
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    share = None
    if sinks is not None:
        # A sink takes its share of the softmax and stands for no key: what the keys keep is the
        # logistic function of how far they are above it.
        own = sinks[:, rows] if sinks.shape[1] > 1 else sinks
        share = torch.sigmoid(logits.logsumexp(-1) - own)[..., None]
    weights = torch.softmax(logits, -1)
    if share is not None:
        weights *= share
    return weights.masked_fill_(blind, 0.0)


def _copy_rows(weights: Tensor, places: Sequence[int], target: Tensor, keys: slice) -> None:
    """Copy rows of weights, (..., rows, keys), to their places in (..., places, keys)."""
    rows = [row for row, place in enumerate(places) if place >= 0]
    if rows:
        target[..., [places[row] for row in rows], keys] = weights[..., rows, :]
