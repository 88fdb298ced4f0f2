"""From the weights of a decode step, one row per layer, to the numbers that are kept.

The rows of all layers are reduced together when the step ends: one call on many rows is much
cheaper than many calls on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avl.tokens import Modality
from avl_analysis.capture.plan import CapturePlan, LayerResult
from avl_analysis.capture.reductions import count_above, text_by_age, values_of, weighted_sums
from avl_analysis.capture.sample_call import SampleCall
from avl_analysis.statistics.ages import by_age
from avl_analysis.statistics.inputs import KINDS, TOKEN_INFO, QueryRows, TokenInfo, key_columns


@dataclass(eq=False)
class StepRow:
    """The one row of a decode step in one layer, before it is reduced.

    Attributes:
        layer: which.
        view: its keys and what it sees.
        weights: (heads, 1, keys).
        value_norm: (key heads, keys), or None where it is not asked for.
    """

    layer: int
    view: SampleCall
    weights: Tensor
    value_norm: Tensor | None


def reduce_step(rows: Sequence[StepRow], plan: CapturePlan) -> list[LayerResult]:
    """Everything that is kept of a decode step.

    `rows` are those of several layers with equally many keys.

    Raises:
        FloatingPointError: weights are not numbers.
    """
    views, layers, heads = [row.view for row in rows], len(rows), rows[0].weights.shape[0]
    # Layers without a policy hold the same keys and share one description of them (`SampleSlice`);
    # then masks and columns are made once for all.
    queries, shared = views[0].queries, all(view.keys is views[0].keys for view in views)
    keys = views[0].keys if shared else _join([view.keys for view in views])
    visible = views[0].visible_keys.last_row
    if not shared:
        visible = torch.cat([view.visible_keys.last_row.expand(heads, -1, -1) for view in views])
    # (layers x heads, 1, keys): heads of all layers, one layer behind the other.
    weights, value_mass = torch.cat([row.weights for row in rows]), None
    if plan.reads_values:
        norms = torch.cat([row.value_norm for row in rows if row.value_norm is not None])
        # (layers x key heads, group, keys): query heads that share a key head share its norms.
        by_set = weights.view(len(norms), -1, weights.shape[2]) * norms[:, None]
        value_mass = _by_kind(by_set.view_as(weights), keys)
    sums = weighted_sums(weights, key_columns(keys, plan.columns)).transpose(1, 2)
    if bool((broken := sums.isnan()).any()):
        first = int(broken.flatten(1).any(-1).int().argmax()) // heads
        raise FloatingPointError(f"attention weights are not numbers in layer {rows[first].layer}")
    above = {t: count_above(weights, t, torch.empty_like(weights)) for t in plan.thresholds}
    counts = _by_kind(visible.float(), keys)
    stacked = QueryRows(queries, keys, counts, sums, plan.columns, above, value_mass, weights)
    values = torch.cat([values_of(plan.sums, stacked), values_of(plan.weights, stacked)], -1)
    # (layers, heads, values)
    step = values[:, 0].unflatten(0, (layers, -1))
    ages = pairs = None
    if plan.ages:
        ages, pairs = _step_ages(weights, visible, queries, keys)
        ages = ages.unflatten(0, (layers, -1))
        # One row of numbers for all layers becomes one per layer; one per head stays as it is.
        pairs = pairs.expand(max(len(pairs), layers), -1).unflatten(0, (layers, -1))
    results = []
    for i, row in enumerate(rows):
        one = LayerResult(row.view.keys, step[i], row.weights[:, 0])
        if plan.received:
            one.received, one.queries = row.weights, row.view.visible_keys.last_row.float()
        if ages is not None and pairs is not None:
            one.ages, one.pairs = ages[i], pairs[i]
        if plan.raw is not None and plan.raw.decode_rows:
            kept, seen = list(plan.raw.heads), row.view.visible_keys.last_row
            one.raw, one.raw_rows = row.weights[kept], queries.rank
            one.raw_visible = seen if len(seen) == 1 else seen[kept]
        results.append(one)
    return results


def _by_kind(values: Tensor, keys: TokenInfo) -> Tensor:
    """(heads, rows, keys) summed over system, image and text keys: (heads, rows, 3)."""
    if len(keys.rank) > 1:
        return weighted_sums(values, key_columns(keys, KINDS)).transpose(1, 2)
    return torch.stack([values[..., at].sum(-1) for at in keys.kinds], -1)


def _step_ages(
    weights: Tensor, visible: Tensor, queries: TokenInfo, keys: TokenInfo
) -> tuple[Tensor, Tensor]:
    """Of a text row, the weights of text keys by age, (heads, ages), and their numbers.

    The numbers are (1 or heads, ages).
    """
    if len(keys.rank) > 1:
        return text_by_age(weights, queries, keys), text_by_age(visible.float(), queries, keys)
    at = keys.kinds[Modality.TEXT]  # few of its keys
    # Weights and flags of the text keys in one call: the flags' sums are the numbers of weights.
    both = torch.cat([weights[..., at], visible[..., at].float()])
    ages = by_age(both, queries.rank, keys.rank[:, at])
    return ages[: len(weights)], ages[len(weights) :]


def _join(keys: Sequence[TokenInfo]) -> TokenInfo:
    return TokenInfo(*(torch.cat([getattr(one, name) for one in keys]) for name in TOKEN_INFO))
