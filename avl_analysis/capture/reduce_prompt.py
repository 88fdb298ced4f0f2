"""From the weights of a prompt's rows in one layer and one sample to the numbers that are kept.

Per block of weights only primitive sums are taken (key columns, number of large weights, attention
received per key and by age); formulas run once per group of heads, on the sums of all its rows and
on copies of the few rows whose weights are read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from avl.tokens import Modality
from avl_analysis.capture.plan import CapturePlan, LayerResult
from avl_analysis.capture.reductions import count_above, text_by_age, values_of, weighted_sums
from avl_analysis.capture.sample_call import SampleCall, valid_part
from avl_analysis.capture.softmax import share_of_maps, weight_blocks
from avl_analysis.statistics.ages import AGE_STARTS
from avl_analysis.statistics.inputs import KINDS, QueryRows, key_columns

ROWS_PER_MODALITY = 32
"""Prompt rows of each query modality that `WeightStatistic`s read, evenly spaced; the last row is
always read.
"""

COPIED_BYTES = (3 << 19, 8 << 20)
"""Least and most bytes of copied rows at a time; sorting them takes about three times as much
again.
"""


@dataclass(eq=False)
class _Prompt:
    """What is known of rows and keys before looking at weights.

    Attributes:
        modality: (3, rows) float32, one where the row's query is of that modality.
        groups: (2, rows) float32, one for valid rows, and for text rows.
        picked: rows whose weights are copied, ascending, the last row always; sampled: (3, picked)
            one where such a row counts for the prompt sums of a modality.
        columns: (key sets, columns, keys), the first three of them being the kinds of keys.
        counts: (1 or heads, rows, 3).
        queries: (1 or heads, 2, keys) how many rows of `groups` could see a key; None where nobody
            asks.
        pairs: (1 or heads, ages) number of visible pairs of a text row and a text key; None where
            nobody asks.
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


def _prompt(view: SampleCall, plan: CapturePlan) -> _Prompt:
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


def reduce_prompt(
    view: SampleCall, plan: CapturePlan, value_norm: Tensor | None = None
) -> LayerResult:
    """Everything that is kept of the prompt rows of one layer.

    Args:
        value_norm: (key heads, keys) norms of the value vectors where `plan.reads_values`.

    Raises:
        FloatingPointError: weights of a real token are not numbers.
    """
    prompt = (
        view.memo["prompt"]
        if "prompt" in view.memo
        else view.memo.setdefault("prompt", _prompt(view, plan))
    )
    parts = [
        _reduce_heads(view, plan, prompt, value_norm, some) for some in _head_groups(view, prompt)
    ]
    joined = [None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)]
    sums, counts, step, last, received, ages, raw = joined
    assert step is not None
    assert last is not None
    result = LayerResult(
        view.keys, step, last, sums, counts, received, prompt.queries, ages, prompt.pairs
    )
    if raw is not None and plan.raw is not None:
        visible = view.sight.visible[:, prompt.raw_rows]
        result.raw, result.raw_rows = raw, view.queries.rank[prompt.raw_rows]
        result.raw_visible = visible if len(visible) == 1 else visible[list(plan.raw.heads)]
    result.cache = _cache_values(view, plan)
    return result


def _cache_values(view: SampleCall, plan: CapturePlan) -> dict[str, Tensor]:
    """Statistics of keys and values, a few heads at a time: in half precision they are converted
    first.
    """
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


def _head_groups(view: SampleCall, prompt: _Prompt) -> Iterator[slice]:
    """Key heads whose copied rows, for all their query heads, take a bounded part of the memory of
    the maps.
    """
    kv_heads, keys, _ = view.key.shape
    each = view.groups * len(prompt.picked) * keys * 4
    together = max(1, share_of_maps(view, *COPIED_BYTES) // each)
    return (slice(first, min(first + together, kv_heads)) for first in range(0, kv_heads, together))


def _reduce_heads(
    view: SampleCall, plan: CapturePlan, prompt: _Prompt, value_norm: Tensor | None, kv_heads: slice
) -> tuple[Tensor | None, ...]:
    """Sums, counts, step values, last row's weights, attention received and by age, raw weights, of
    a few heads.
    """
    heads = slice(kv_heads.start * view.groups, kv_heads.stop * view.groups)
    tally = _Tally(view, plan, prompt, value_norm, heads)
    for which, rows, span, weights in weight_blocks(view, kv_heads):
        tally.add(slice(which.start - heads.start, which.stop - heads.start), rows, span, weights)
        del weights  # and with the last block the buffer of all
    sums = tally.sums.transpose(1, 2)
    if bool(sums[:, prompt.groups[0] > 0].isnan().any()):
        raise FloatingPointError("attention weights are not numbers")
    counts = prompt.counts if len(prompt.counts) == 1 else prompt.counts[heads]
    mass = None if value_norm is None else sums[..., -len(KINDS) :]
    every = QueryRows(view.queries, tally.keys, counts, sums, plan.columns, tally.above, mass)
    both = (
        values_of(plan.sums, every),
        values_of(plan.weights, every.take(prompt.picked, tally.picked)),
    )
    grouped = _grouped(both[0], prompt.modality), _grouped(both[1], prompt.sampled)
    totals, counted = (torch.cat(parts, -1) for parts in zip(*grouped, strict=True))
    step = torch.cat([values[:, -1] for values in both], -1)
    return totals, counted, step, tally.picked[:, -1].clone(), tally.received, tally.ages, tally.raw


class _Tally:
    """Primitive sums of a few heads over all rows, taken block by block.

    Where norms of values are wanted, the sums weighted by them stand behind those of the key
    columns.
    """

    def __init__(
        self,
        view: SampleCall,
        plan: CapturePlan,
        prompt: _Prompt,
        value_norm: Tensor | None,
        heads: slice,
    ) -> None:
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
            self._kept = [
                head - heads.start for head in plan.raw.heads if heads.start <= head < heads.stop
            ]
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
            self.picked[heads, low:high, span] = weights[
                :, self.prompt.picked[low:high] - rows.start
            ]
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
        low, high = (
            bisect_left(self._raw_places, rows.start),
            bisect_left(self._raw_places, rows.stop),
        )
        if at and low < high:
            which = torch.tensor(
                [self._kept[place] - heads.start for place in at], device=weights.device
            )
            chosen = self.prompt.raw_rows[low:high] - rows.start
            raw[at[0] : at[-1] + 1, low:high, span] = weights[which[:, None], chosen]

    def _add_ages(
        self, ages: Tensor, heads: slice, rows: slice, span: slice, weights: Tensor
    ) -> None:
        some, keys = _overlap(rows, self.prompt.text_rows), _overlap(span, self.prompt.text_keys)
        if some.start < some.stop and keys.start < keys.stop:
            inner = weights[
                :,
                some.start - rows.start : some.stop - rows.start,
                keys.start - span.start : keys.stop - span.start,
            ]
            queries, tokens = (
                self.queries.map(lambda t: t[some]),
                self.keys.map(lambda t: t[:, keys]),
            )
            if len(tokens.rank) > 1:
                sets = slice(heads.start // self.groups, heads.stop // self.groups)
                tokens = tokens.map(lambda t: t[sets])
            ages[heads] += text_by_age(inner, queries, tokens)


def _pairs(view: SampleCall, rows: slice, keys: slice) -> Tensor:
    """(1 or heads, ages): number of visible pairs of a text row and a text key."""
    if rows.start == rows.stop or keys.start == keys.stop:
        return torch.zeros(1, len(AGE_STARTS), dtype=torch.float64)
    queries, tokens = view.queries.map(lambda t: t[rows]), view.keys.map(lambda t: t[:, keys])
    visible = view.sight.visible[:, rows, keys].float()
    if len(tokens.rank) > 1 and len(visible) == 1:
        visible = visible.expand(len(tokens.rank), -1, -1)
    return text_by_age(visible, queries, tokens)


def _grouped(values: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts of the defined values, (heads, 3, values) float64, over the rows marked in
    member, (3, rows).
    """
    defined, groups = ~values.isnan(), member.double()
    return groups @ values.where(defined, 0.0).double(), groups @ defined.double()


def _overlap(one: slice, other: slice) -> slice:
    return slice(max(one.start, other.start), min(one.stop, other.stop))
