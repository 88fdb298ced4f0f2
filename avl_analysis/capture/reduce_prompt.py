"""From the weights of a prompt's rows in one layer and one sample to the numbers that are kept.

Per block of weights only primitive sums are taken (`avl.kernels.prompt_rows`: key columns, number
of large weights, attention received per key and by age); formulas run once per group of heads, on
the sums of all its rows and on copies of the few rows whose weights are read. On a processor the
groups of heads are divided among threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor

from avl.kernels.backend import COMPILED, backend_for, on_threads, products_in_float32
from avl.kernels.prompt_rows import RowRequest, RowSums, column_extents
from avl.tokens import Modality
from avl_analysis.capture.plan import CapturePlan, LayerResult
from avl_analysis.capture.reductions import values_of
from avl_analysis.capture.sample_call import SampleCall
from avl_analysis.capture.softmax import product_blocks, share_of_maps
from avl_analysis.statistics.ages import AGE_STARTS, bin_ages, by_age
from avl_analysis.statistics.inputs import KINDS, QueryRows, for_heads, key_columns

ROWS_PER_MODALITY = 32
"""Prompt rows of each query modality that `WeightStatistic`s read, evenly spaced; the last row is
always read.
"""

COPIED_BYTES = (3 << 19, 8 << 20)
"""Least and most bytes of copied rows at a time, over all threads; sorting them takes about three
times as much again.
"""

Result = TypeVar("Result")


@dataclass(eq=False)
class _Prompt:
    """What is known of rows and keys before looking at weights.

    Attributes:
        modality: (3, rows) float32, one where the row's query is of that modality.
        picked: rows whose weights are copied, ascending, the last row always; sampled: (3, picked)
            one where such a row counts for the prompt sums of a modality.
        columns: (key sets, columns, keys), the first three of them being the kinds of keys;
            extents: from where to where each is not 0.
        counts: (1 or heads, rows, 3).
        queries: (1 or heads, 2, keys) how many valid rows and how many text rows could see a key;
            None where it is not asked for.
        pairs: (1 or heads, ages) number of visible pairs of a text row and a text key; None where
            it is not asked for.
        raw_rows: rows whose weights are kept as they are.
        request: what is wanted of the weights.
    """

    modality: Tensor
    picked: Tensor
    sampled: Tensor
    columns: Tensor
    extents: Tensor
    counts: Tensor
    queries: Tensor | None
    pairs: Tensor | None
    raw_rows: Tensor
    request: RowRequest


def _prompt(view: SampleCall, plan: CapturePlan) -> _Prompt:
    modality = torch.stack([view.queries.modality == code for code in range(3)]).float()
    # (3, rows): which rows stand for their modality in statistics that read the weights themselves.
    chosen = torch.zeros_like(modality)
    for code in range(3):
        at = modality[code].nonzero().flatten()
        chosen[code, at[evenly_spaced(len(at), ROWS_PER_MODALITY).to(at.device)]] = 1.0
    # The last row produces the first token and is always read; without a statistic of weights it is
    # the only one.
    wanted = chosen.any(0) & bool(plan.weights)
    wanted[-1] = True
    picked = wanted.nonzero().flatten()
    # (2, rows): rows "prompt" and "prompt text", the first two of `schema.ROWS`.
    groups = torch.stack([modality.sum(0), modality[Modality.TEXT]])
    columns = key_columns(view.keys, plan.columns)
    raw_rows = picked[:0]
    if plan.raw is not None:
        raw_rows = plan.raw.prompt_rows(view.queries.rank, produces=True)
    is_text = view.queries.modality == Modality.TEXT
    text_keys = view.keys.modality == Modality.TEXT
    request = RowRequest(
        plan.thresholds,
        _places(picked, len(is_text)),
        None if plan.raw is None else _places(raw_rows, len(is_text)),
        groups if plan.received else None,
        view.queries.rank.masked_fill(~is_text, -1) if plan.ages else None,
        view.keys.rank.masked_fill(~text_keys, -1) if plan.ages else None,
    )
    return _Prompt(
        modality,
        picked,
        chosen[:, picked],
        columns,
        column_extents(columns),
        view.visible_keys.keys_per_row(columns[:, : len(KINDS)]),
        view.visible_keys.rows_per_key(groups) if plan.received else None,
        _pairs(view, is_text, text_keys) if plan.ages else None,
        raw_rows,
        request,
    )


def _places(rows: Tensor, count: int) -> Tensor:
    """(count,) int64: the place of each row among `rows`, -1 where it is not among them."""
    places = torch.full((count,), -1, device=rows.device)
    places[rows] = torch.arange(len(rows), device=rows.device)
    return places


def evenly_spaced(count: int, most: int) -> Tensor:
    """Indices of at most `most` of `count` things: the middle ones of as many equal parts.

    First and last things are not favoured, so that a mean over them is that over all but for the
    draw; the first rows of a prompt see the fewest keys, and the last column of a picture is no
    place like others.
    """
    wanted = min(count, most)
    return (2 * torch.arange(wanted) + 1) * count // max(1, 2 * wanted)


def reduce_prompt(
    view: SampleCall, plan: CapturePlan, value_norm: Tensor | None = None
) -> LayerResult:
    """Everything that is kept of the prompt rows of one layer.

    Args:
        view: one sample of an attention call.
        plan: what is wanted of it.
        value_norm: (key heads, keys) norms of the value vectors where `plan.reads_values`.

    Raises:
        FloatingPointError: weights of a real token are not numbers.
    """
    # The same for all layers that share mask and keys, so it is made once per pass.
    prompt = (
        view.memo["prompt"]
        if "prompt" in view.memo
        else view.memo.setdefault("prompt", _prompt(view, plan))
    )
    with products_in_float32(view.query, view.key):
        parts = _over_heads(
            lambda some: _reduce_heads(view, plan, prompt, value_norm, some),
            view,
            # Bytes of the copied rows of one key head's query heads, in float32.
            view.groups * len(prompt.picked) * view.key.shape[1] * 4,
        )
    joined = [None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)]
    sums, counts, step, last, received, ages, raw = joined
    assert step is not None
    assert last is not None
    result = LayerResult(
        view.keys, step, last, sums, counts, received, prompt.queries, ages, prompt.pairs
    )
    if raw is not None and plan.raw is not None:
        visible = view.visible_keys.of_rows(prompt.raw_rows)
        result.raw, result.raw_rows = raw, view.queries.rank[prompt.raw_rows]
        result.raw_visible = visible if len(visible) == 1 else visible[list(plan.raw.heads)]
    result.cache = _cache_values(view, plan)
    return result


def _cache_values(view: SampleCall, plan: CapturePlan) -> dict[str, Tensor]:
    """Statistics of keys and values; in half precision they are converted first."""
    if not plan.cache:
        return {}

    def values(some: slice) -> list[Tensor]:
        key, value = view.key[some].float(), view.value[some].float()
        tokens = view.keys if len(view.keys.rank) == 1 else view.keys.map(itemgetter(some))
        return [statistic.value(key, value, tokens) for statistic in plan.cache]

    each = view.key.shape[1] * (view.key.shape[2] + view.value.shape[2]) * 4
    parts = _over_heads(values, view, each)
    names = [statistic.name for statistic in plan.cache]
    return {
        name: torch.cat(found) for name, found in zip(names, zip(*parts, strict=True), strict=True)
    }


def _over_heads(
    function: Callable[[slice], Result], view: SampleCall, each: int
) -> Sequence[Result]:
    """The function's results for groups of key heads, on several threads on a processor.

    Args:
        function: called with a range of key heads.
        view: the layer.
        each: bytes that the function takes for a key head; a bounded part of the memory of the maps
            is taken at a time.
    """
    # The compiled kernel releases the interpreter's lock, so groups of heads run beside each other;
    # the plain one would only wait for it.
    kv_heads, parallel = len(view.key), backend_for(view.key.device) == COMPILED
    threads = torch.get_num_threads() if parallel else 1
    room = share_of_maps(view, *COPIED_BYTES) // threads
    # As many heads as fit into the memory, but at least as many groups as threads (rounded up).
    together = max(1, min(room // max(1, each), -(-kv_heads // threads)))
    groups = [
        slice(first, min(first + together, kv_heads)) for first in range(0, kv_heads, together)
    ]
    return on_threads(function, groups) if parallel else [function(some) for some in groups]


def _reduce_heads(
    view: SampleCall, plan: CapturePlan, prompt: _Prompt, value_norm: Tensor | None, kv_heads: slice
) -> tuple[Tensor | None, ...]:
    """What is kept of a prompt's rows, for a few heads.

    Sums, counts, step values, last row's weights, attention received and by age, raw weights.
    """
    heads = slice(kv_heads.start * view.groups, kv_heads.stop * view.groups)
    taken = _sums_of_heads(view, plan, prompt, value_norm, kv_heads)
    # (heads, rows, columns)
    sums = taken.sums.transpose(1, 2)
    # Rows of padding are no rows here; of all others the sums over system, image and text are in,
    # and one weight that is no number makes them so.
    if bool(sums[:, prompt.modality.any(0)].isnan().any()):
        raise FloatingPointError("attention weights are not numbers")
    keys = view.keys
    if len(keys.rank) > 1:
        keys = keys.map(itemgetter(kv_heads))
    every = QueryRows(
        view.queries,
        keys,
        prompt.counts if len(prompt.counts) == 1 else prompt.counts[heads],
        sums,
        plan.columns,
        dict(zip(plan.thresholds, taken.above, strict=True)),
        None if value_norm is None else sums[..., -len(KINDS) :],
    )
    # (heads, rows, values) of all rows, and (heads, picked, values) of the copied ones: values of
    # sum statistics first, then those of weight statistics, as `CapturePlan.places` numbers them.
    both = (
        values_of(plan.sums, every),
        values_of(plan.weights, every.take(prompt.picked, taken.picked)),
    )
    grouped = _grouped(both[0], prompt.modality), _grouped(both[1], prompt.sampled)
    totals, counted = (torch.cat(parts, -1) for parts in zip(*grouped, strict=True))
    return (
        totals,
        counted,
        # The last row is the last of all rows and of the copied ones.
        torch.cat([values[:, -1] for values in both], -1),
        taken.picked[:, -1].clone(),
        taken.received if plan.received else None,
        bin_ages(taken.by_age) if plan.ages else None,
        taken.raw if plan.raw is not None else None,
    )


def _sums_of_heads(
    view: SampleCall, plan: CapturePlan, prompt: _Prompt, value_norm: Tensor | None, kv_heads: slice
) -> RowSums:
    """Primitive sums of a few heads over all rows.

    Those of the key columns, and behind them, where norms of values are wanted, those of the three
    kinds of keys weighted by the norms.
    """
    heads = slice(kv_heads.start * view.groups, kv_heads.stop * view.groups)
    columns, extents = prompt.columns, prompt.extents
    if len(columns) > 1:
        columns = columns[kv_heads]
    if value_norm is not None:
        # Norms of values differ between key heads even where the keys stand in one order for all.
        plain = columns.expand(kv_heads.stop - kv_heads.start, -1, -1)
        columns = torch.cat([plain, plain[:, : len(KINDS)] * value_norm[kv_heads, None]], 1)
        extents = torch.cat([extents, extents[: len(KINDS)]])
    wanted = () if plan.raw is None else plan.raw.heads
    taken = RowSums(
        prompt.request,
        columns,
        heads.stop - heads.start,
        view.groups,
        extents=extents,
        first_set=kv_heads.start,
        raw_heads=[head - heads.start for head in wanted if heads.start <= head < heads.stop],
    )
    if view.weights is not None:
        # A replay: the kernel may overwrite what it is given, and these weights are the caller's.
        own = view.weights[heads].clone(memory_format=torch.contiguous_format)
        every, ends = slice(0, len(own)), prompt.picked
        taken.add(own, every, 0, 0, ends, weights=True)
        return taken
    for block in product_blocks(view, kv_heads):
        # Heads are counted within this group, rows within the sample, keys from the span's first
        # on.
        own = slice(block.heads.start - heads.start, block.heads.stop - heads.start)
        sinks = None if view.sinks is None else view.sinks[block.heads]
        first = block.span.start
        taken.add(block.products, own, block.rows.start, first, block.ends, block.scaling, sinks)
    return taken


def _pairs(view: SampleCall, rows: Tensor, keys: Tensor) -> Tensor:
    """(1 or heads, ages): number of visible pairs of a text row and a text key before it.

    Args:
        view: the layer.
        rows: (rows,) bool, text rows.
        keys: (key sets, keys) bool, text keys.
    """
    total = torch.zeros(1, len(AGE_STARTS), dtype=torch.float64)
    if not bool(rows.any()) or not bool(keys.any()):
        return total
    rank = view.keys.rank
    heads = len(view.query) if len(rank) > 1 else 1
    for at, visible in view.visible_keys.pairs(rows, for_heads(keys, heads)):
        queries = view.queries.rank[at]
        # A bidirectional mask shows later keys, too; those have no age.
        earlier = for_heads(rank, len(visible))[:, None] <= queries[:, None]
        counted = (visible & earlier).float()
        total = total + by_age(counted, queries, for_heads(rank, len(visible))).cpu()
    return total


def _grouped(values: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts of the defined values, (heads, 3, values) float64.

    Over the rows marked in member, (3, rows).
    """
    # One matrix product sums all rows by modality: (3, rows) with (heads, rows, values). In double
    # precision, so that recordings merge to the same sums in any order.
    defined, groups = ~values.isnan(), member.double()
    return groups @ values.where(defined, 0.0).double(), groups @ defined.double()
