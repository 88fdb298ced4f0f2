"""From the weights of one layer and one sample to the numbers that are kept.

Prompts: per block of weights only primitive sums are taken (key columns, number of large weights, attention received
per key and by age); formulas run once per group of heads, on the sums of all its rows and on copies of the few rows
whose weights are read. Decode steps: one row per layer; the rows of all layers are reduced together when the step
ends, since one call on many rows is much cheaper than many calls on one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter

import torch
from torch import Tensor

from avl.tokens import Modality
from avl_analysis.ages import AGE_STARTS, by_age
from avl_analysis.raw import Raw
from avl_analysis.rows import KINDS, Rows, Tokens, key_columns
from avl_analysis.statistics.base import CacheStatistic, RowStatistic, SumStatistic, WeightStatistic
from avl_analysis.view import View, valid_part
from avl_analysis.weights import share_of_maps, weight_blocks

ROWS_PER_MODALITY = 32
"""Prompt rows of each query modality that `WeightStatistic`s read, evenly spaced; the last row is always read."""

COPIED_BYTES = (3 << 19, 8 << 20)
"""Least and most bytes of copied rows at a time; sorting them takes about three times as much again."""


@dataclass(frozen=True)
class Plan:
    """What is wanted of every pass.

    Attributes:
        rows: statistics per query row.
        cache: statistics of keys and values.
        received: whether the attention received per key is wanted; `ages`: that by age of text keys.
        scores: whether the scores of image tokens are wanted.
        raw: which weights are kept as they are, None for none.
    """

    rows: tuple[RowStatistic, ...] = ()
    cache: tuple[CacheStatistic, ...] = ()
    received: bool = False
    ages: bool = False
    scores: bool = False
    raw: Raw | None = None

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
class LayerPass:
    """Numbers of one pass of one sample through one layer; values of all row statistics side by side (`Plan.places`).

    Attributes:
        keys: what the keys are, (key sets, keys).
        step: (heads, values) of the row that produces a token.
        weights: (heads, keys) of that row.
        sums, counts: (heads, 3, values) float64, over prompt rows by query modality; None for a decode step.
        received: (heads, 2, keys) from prompt and prompt text rows, or (heads, 1, keys) from the decode row.
        queries: (1 or heads, 2 or 1, keys) how many of those rows could see the key.
        ages: (heads, ages) float64 attention of text rows on text keys by age.
        pairs: (1 or heads, ages) how many weights that sums.
        cache: statistic -> (key heads, ...).
        raw: (kept heads, kept rows, keys) weights; raw_visible: (1 or kept heads, kept rows, keys) bool; raw_rows:
            ranks of these rows.
    """

    keys: Tokens
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


# -- prompts -----


@dataclass(eq=False)
class _Prompt:
    """What is known of rows and keys before looking at weights.

    Attributes:
        modality: (3, rows) float32, one where the row's query is of that modality.
        groups: (2, rows) float32, one for valid rows, and for text rows.
        picked: rows whose weights are copied, ascending, the last row always; sampled: (3, picked) one where such a row
            counts for the prompt sums of a modality.
        columns: (key sets, columns, keys), the first three of them being the kinds of keys.
        counts: (1 or heads, rows, 3).
        queries: (1 or heads, 2, keys) how many rows of `groups` could see a key; None where nobody asks.
        pairs: (1 or heads, ages) number of visible pairs of a text row and a text key; None where nobody asks.
        text_rows, text_keys: from the first to the last of them.
        raw_rows: rows whose weights are kept as they are.
    """

    modality: Tensor
    groups: Tensor
    picked: Tensor
    sampled: Tensor
    columns: Tensor
    counts: Tensor
    queries: Tensor | None
    pairs: Tensor | None
    text_rows: slice
    text_keys: slice
    raw_rows: Tensor


def _prompt(view: View, plan: Plan) -> _Prompt:
    modality = torch.stack([view.queries.modality == code for code in range(3)]).float()
    chosen = torch.zeros_like(modality)
    for code in range(3):
        at = modality[code].nonzero().flatten()
        chosen[code, at[evenly_spaced(len(at), ROWS_PER_MODALITY).to(at.device)]] = 1.0
    wanted = chosen.any(0) & bool(plan.weights)
    wanted[-1] = True
    picked = wanted.nonzero().flatten()
    groups = torch.stack([modality.sum(0), modality[Modality.TEXT]])
    columns = key_columns(view.keys, plan.columns)
    text_rows = valid_part(view.queries.modality == Modality.TEXT)
    text_keys = valid_part((view.keys.modality == Modality.TEXT).any(0))
    return _Prompt(
        modality,
        groups,
        picked,
        chosen[:, picked],
        columns,
        view.sight.keys_per_row(columns[:, : len(KINDS)]),
        view.sight.rows_per_key(groups) if plan.received else None,
        _pairs(view, text_rows, text_keys) if plan.ages else None,
        text_rows,
        text_keys,
        picked[:0] if plan.raw is None else plan.raw.prompt_rows(view.queries.rank, produces=True),
    )


def evenly_spaced(count: int, most: int) -> Tensor:
    """Indices of at most `most` of `count` things, the first and the last among them."""
    wanted = min(count, most)
    return torch.arange(wanted) * (count - 1) // max(1, wanted - 1)


def reduce_prompt(view: View, plan: Plan, value_norm: Tensor | None = None) -> LayerPass:
    """Everything that is kept of the prompt rows of one layer.

    Args:
        value_norm: (key heads, keys) norms of the value vectors where `plan.reads_values`.

    Raises:
        FloatingPointError: weights of a real token are not numbers.
    """
    prompt = view.memo["prompt"] if "prompt" in view.memo else view.memo.setdefault("prompt", _prompt(view, plan))
    parts = [_reduce_heads(view, plan, prompt, value_norm, some) for some in _head_groups(view, prompt)]
    joined = [None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)]
    sums, counts, step, last, received, ages, raw = joined
    assert step is not None
    assert last is not None
    result = LayerPass(view.keys, step, last, sums, counts, received, prompt.queries, ages, prompt.pairs)
    if raw is not None and plan.raw is not None:
        visible = view.sight.visible[:, prompt.raw_rows]
        result.raw, result.raw_rows = raw, view.queries.rank[prompt.raw_rows]
        result.raw_visible = visible if len(visible) == 1 else visible[list(plan.raw.heads)]
    result.cache = _cache_values(view, plan)
    return result


def _cache_values(view: View, plan: Plan) -> dict[str, Tensor]:
    """Statistics of keys and values, a few heads at a time: in half precision they are converted first."""
    found: dict[str, list[Tensor]] = {statistic.name: [] for statistic in plan.cache}
    each = max(1, view.key.shape[1] * (view.key.shape[2] + view.value.shape[2]) * 4)
    together = max(1, share_of_maps(view, *COPIED_BYTES) // each)
    for first in range(0, view.key.shape[0] if found else 0, together):
        some = slice(first, first + together)
        key, value = view.key[some].float(), view.value[some].float()
        tokens = view.keys if len(view.keys.rank) == 1 else view.keys.map(itemgetter(some))
        for statistic in plan.cache:
            found[statistic.name].append(statistic.value(key, value, tokens))
    return {name: torch.cat(values) for name, values in found.items()}


def _head_groups(view: View, prompt: _Prompt) -> Iterator[slice]:
    """Key heads whose copied rows, for all their query heads, take a bounded part of the memory of the maps."""
    key_heads, keys, _ = view.key.shape
    each = view.groups * len(prompt.picked) * keys * 4
    together = max(1, share_of_maps(view, *COPIED_BYTES) // each)
    return (slice(first, min(first + together, key_heads)) for first in range(0, key_heads, together))


def _reduce_heads(
    view: View, plan: Plan, prompt: _Prompt, value_norm: Tensor | None, key_heads: slice
) -> tuple[Tensor | None, ...]:
    """Sums, counts, step values, last row's weights, attention received and by age, raw weights, of a few heads."""
    heads = slice(key_heads.start * view.groups, key_heads.stop * view.groups)
    tally = _Tally(view, plan, prompt, value_norm, heads)
    for which, rows, span, weights in weight_blocks(view, key_heads):
        tally.add(slice(which.start - heads.start, which.stop - heads.start), rows, span, weights)
        del weights  # and with the last block the buffer of all
    sums = tally.sums.transpose(1, 2)
    if bool(sums[:, prompt.groups[0] > 0].isnan().any()):
        raise FloatingPointError("attention weights are not numbers")
    counts = prompt.counts if len(prompt.counts) == 1 else prompt.counts[heads]
    mass = None if value_norm is None else sums[..., -len(KINDS) :]
    every = Rows(view.queries, tally.keys, counts, sums, plan.columns, tally.above, mass)
    both = _values(plan.sums, every), _values(plan.weights, every.take(prompt.picked, tally.picked))
    grouped = _grouped(both[0], prompt.modality), _grouped(both[1], prompt.sampled)
    totals, counted = (torch.cat(parts, -1) for parts in zip(*grouped, strict=True))
    step = torch.cat([values[:, -1] for values in both], -1)
    return totals, counted, step, tally.picked[:, -1].clone(), tally.received, tally.ages, tally.raw


class _Tally:
    """Primitive sums of a few heads over all rows, taken block by block.

    Where norms of values are wanted, the sums weighted by them stand behind those of the key columns.
    """

    def __init__(self, view: View, plan: Plan, prompt: _Prompt, value_norm: Tensor | None, heads: slice) -> None:
        number, rows, keys = heads.stop - heads.start, view.query.shape[1], view.key.shape[1]
        own = slice(heads.start // view.groups, heads.stop // view.groups)
        self.prompt, self.queries, self.groups = prompt, view.queries, view.groups
        self.keys = view.keys if len(view.keys.rank) == 1 else view.keys.map(lambda t: t[own])
        self.columns = prompt.columns if len(prompt.columns) == 1 else prompt.columns[own]
        if value_norm is not None:
            plain = self.columns.expand(own.stop - own.start, -1, -1)
            self.columns = torch.cat([plain, plain[:, : len(KINDS)] * value_norm[own, None]], 1)
        new = view.query.new_zeros
        self.sums = new(number, self.columns.shape[1], rows, dtype=torch.float32)
        self.above = {t: new(number, rows, dtype=torch.float32) for t in plan.thresholds}
        self.picked = new(number, len(prompt.picked), keys, dtype=torch.float32)
        self.received = new(number, 2, keys, dtype=torch.float32) if plan.received else None
        self.ages = torch.zeros(number, len(AGE_STARTS), dtype=torch.float64) if plan.ages else None
        self.raw: Tensor | None = None
        if plan.raw is not None:
            self._kept = [head - heads.start for head in plan.raw.heads if heads.start <= head < heads.stop]
            self.raw = new(len(self._kept), len(prompt.raw_rows), keys, dtype=torch.float32)
            self._raw_places = prompt.raw_rows.tolist()
        self._places = prompt.picked.tolist()

    def add(self, heads: slice, rows: slice, span: slice, weights: Tensor) -> None:
        """Take what is wanted from a block of some of these heads; the block is overwritten."""
        sets = slice(heads.start // self.groups, heads.stop // self.groups)
        columns = self.columns if len(self.columns) == 1 else self.columns[sets]
        self.sums[heads, :, rows] = weighted_sums(weights, columns[:, :, span])
        low, high = bisect_left(self._places, rows.start), bisect_left(self._places, rows.stop)
        if low < high:
            self.picked[heads, low:high, span] = weights[:, self.prompt.picked[low:high] - rows.start]
        if self.received is not None:
            self.received[heads, :, span] += self.prompt.groups[:, rows] @ weights
        if self.ages is not None:
            self._add_ages(self.ages, heads, rows, span, weights)
        if self.raw is not None:
            self._keep(self.raw, heads, rows, span, weights)
        for place, (threshold, above) in enumerate(self.above.items(), 1):
            scratch = weights if place == len(self.above) else torch.empty_like(weights)
            above[heads, rows] = count_above(weights, threshold, scratch)

    def _keep(self, raw: Tensor, heads: slice, rows: slice, span: slice, weights: Tensor) -> None:
        at = [place for place, head in enumerate(self._kept) if heads.start <= head < heads.stop]
        low, high = bisect_left(self._raw_places, rows.start), bisect_left(self._raw_places, rows.stop)
        if at and low < high:
            which = torch.tensor([self._kept[place] - heads.start for place in at], device=weights.device)
            chosen = self.prompt.raw_rows[low:high] - rows.start
            raw[at[0] : at[-1] + 1, low:high, span] = weights[which[:, None], chosen]

    def _add_ages(self, ages: Tensor, heads: slice, rows: slice, span: slice, weights: Tensor) -> None:
        some, keys = _overlap(rows, self.prompt.text_rows), _overlap(span, self.prompt.text_keys)
        if some.start < some.stop and keys.start < keys.stop:
            inner = weights[
                :, some.start - rows.start : some.stop - rows.start, keys.start - span.start : keys.stop - span.start
            ]
            queries, tokens = self.queries.map(lambda t: t[some]), self.keys.map(lambda t: t[:, keys])
            if len(tokens.rank) > 1:
                sets = slice(heads.start // self.groups, heads.stop // self.groups)
                tokens = tokens.map(lambda t: t[sets])
            ages[heads] += text_by_age(inner, queries, tokens)


def _pairs(view: View, rows: slice, keys: slice) -> Tensor:
    """(1 or heads, ages): number of visible pairs of a text row and a text key."""
    if rows.start == rows.stop or keys.start == keys.stop:
        return torch.zeros(1, len(AGE_STARTS), dtype=torch.float64)
    queries, tokens = view.queries.map(lambda t: t[rows]), view.keys.map(lambda t: t[:, keys])
    visible = view.sight.visible[:, rows, keys].float()
    if len(tokens.rank) > 1 and len(visible) == 1:
        visible = visible.expand(len(tokens.rank), -1, -1)
    return text_by_age(visible, queries, tokens)


# -- decode steps -----


@dataclass(eq=False)
class StepRow:
    """The one row of a decode step in one layer, before it is reduced.

    Attributes:
        layer: which.
        view: its keys and what it sees.
        weights: (heads, 1, keys).
        value_norm: (key heads, keys), or None where nobody asks.
    """

    layer: int
    view: View
    weights: Tensor
    value_norm: Tensor | None


def reduce_step(rows: Sequence[StepRow], plan: Plan) -> list[LayerPass]:
    """Everything that is kept of a decode step; `rows` are those of several layers with equally many keys.

    Raises:
        FloatingPointError: weights are not numbers.
    """
    views, layers, heads = [row.view for row in rows], len(rows), rows[0].weights.shape[0]
    queries, shared = views[0].queries, all(view.keys is views[0].keys for view in views)
    keys = views[0].keys if shared else _join([view.keys for view in views])
    visible = views[0].sight.visible
    if not shared:
        visible = torch.cat([view.sight.visible.expand(heads, -1, -1) for view in views])
    weights, value_mass = torch.cat([row.weights for row in rows]), None
    if plan.reads_values:
        norms = torch.cat([row.value_norm for row in rows if row.value_norm is not None])
        by_set = weights.view(len(norms), -1, weights.shape[2]) * norms[:, None]
        value_mass = _by_kind(by_set.view_as(weights), keys)
    sums = weighted_sums(weights, key_columns(keys, plan.columns)).transpose(1, 2)
    if bool((broken := sums.isnan()).any()):
        first = int(broken.flatten(1).any(-1).int().argmax()) // heads
        raise FloatingPointError(f"attention weights are not numbers in layer {rows[first].layer}")
    above = {t: count_above(weights, t, torch.empty_like(weights)) for t in plan.thresholds}
    counts = _by_kind(visible.float(), keys)
    stacked = Rows(queries, keys, counts, sums, plan.columns, above, value_mass, weights)
    step = torch.cat([_values(plan.sums, stacked), _values(plan.weights, stacked)], -1)[:, 0].unflatten(0, (layers, -1))
    ages = pairs = None
    if plan.ages:
        ages, pairs = _step_ages(weights, visible, queries, keys)
        ages = ages.unflatten(0, (layers, -1))
        pairs = pairs.expand(max(len(pairs), layers), -1).unflatten(0, (layers, -1))
    results = []
    for i, row in enumerate(rows):
        one = LayerPass(row.view.keys, step[i], row.weights[:, 0])
        if plan.received:
            one.received, one.queries = row.weights, row.view.sight.visible.float()
        if ages is not None and pairs is not None:
            one.ages, one.pairs = ages[i], pairs[i]
        if plan.raw is not None and plan.raw.decode_rows:
            kept, seen = list(plan.raw.heads), row.view.sight.visible
            one.raw, one.raw_rows = row.weights[kept], queries.rank
            one.raw_visible = seen if len(seen) == 1 else seen[kept]
        results.append(one)
    return results


def _by_kind(values: Tensor, keys: Tokens) -> Tensor:
    """(heads, rows, keys) summed over system, image and text keys: (heads, rows, 3)."""
    if len(keys.rank) > 1:
        return weighted_sums(values, key_columns(keys, KINDS)).transpose(1, 2)
    return torch.stack([values[..., at].sum(-1) for at in keys.kinds], -1)


def _step_ages(weights: Tensor, visible: Tensor, queries: Tokens, keys: Tokens) -> tuple[Tensor, Tensor]:
    """Of a row, a text token, the weights of text keys by age, (heads, ages); how many they are, (1 or heads, ages)."""
    if len(keys.rank) > 1:
        return text_by_age(weights, queries, keys), text_by_age(visible.float(), queries, keys)
    at = keys.kinds[Modality.TEXT]  # few of its keys
    both = torch.cat([weights[..., at], visible[..., at].float()])
    ages = by_age(both, queries.rank, keys.rank[:, at])
    return ages[: len(weights)], ages[len(weights) :]


def _join(keys: Sequence[Tokens]) -> Tokens:
    fields = ("rank", "modality", "image", "row", "column")
    return Tokens(*(torch.cat([getattr(one, name) for one in keys]) for name in fields))


# -- sums -----


def weighted_sums(weights: Tensor, columns: Tensor) -> Tensor:
    """(heads, rows, keys) with (key sets, n, keys): (heads, n, rows).

    As columns x weights transposed, which is several times faster than the transposed product: n is small.
    """
    heads, rows, keys = weights.shape
    sets = len(columns)
    products = columns @ weights.reshape(sets, -1, keys).transpose(1, 2)
    return products.view(sets, -1, heads // sets, rows).transpose(1, 2).flatten(0, 1)


def count_above(weights: Tensor, threshold: float, scratch: Tensor) -> Tensor:
    """(heads, rows): number of weights of at least threshold x the row's largest. In float32: summing bools is slow."""
    limit = weights.amax(-1, keepdim=True).mul_(threshold)
    return torch.ge(weights, limit, out=scratch).sum(-1)


def text_by_age(block: Tensor, queries: Tokens, keys: Tokens) -> Tensor:
    """(heads, rows, keys): sums of the weights of text rows on text keys by age, (heads, ages) float64."""
    return by_age(text_only(block, queries, keys), queries.rank, keys.rank)


def text_only(block: Tensor, queries: Tokens, keys: Tokens) -> Tensor:
    """(heads, rows, keys) with zeros where the query or the key is not text."""
    is_text = (queries.modality == Modality.TEXT)[:, None] & (keys.modality == Modality.TEXT)[:, None, :]
    return block if bool(is_text.all()) else block * _for_sets(is_text, len(block))


def _for_sets(values: Tensor, sets: int) -> Tensor:
    """Repeat a value per key set so that there are `sets` of them; one stands for all and stays one."""
    return values if len(values) in (1, sets) else values.repeat_interleave(sets // len(values), 0)


def _values(statistics: Sequence[RowStatistic], rows: Rows) -> Tensor:
    """(heads, rows, values): the values of all statistics side by side."""
    heads, count = rows.sums.shape[:2]
    values = [statistic.value(rows).reshape(heads, count, -1) for statistic in statistics]
    return torch.cat(values, -1) if values else rows.sums.new_zeros(heads, count, 0)


def _grouped(values: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts of the defined values, (heads, 3, values) float64, over the rows marked in member, (3, rows)."""
    defined, groups = ~values.isnan(), member.double()
    return groups @ values.where(defined, 0.0).double(), groups @ defined.double()


def _overlap(one: slice, other: slice) -> slice:
    return slice(max(one.start, other.start), min(one.stop, other.stop))
