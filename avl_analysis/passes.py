"""One pass through one layer, from queries and keys to the numbers that are kept.

`reduce_call` walks over the query rows of an attention call in blocks. It knows which rows count for what (query
modality, last prompt row, sampled rows) and nothing of samples or files.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from avl.attention import AttentionCall, attention_logits, softmax_weights
from avl_analysis.rows import COLUMNS, Rows, Tokens, at_positions
from avl_analysis.statistics.base import RowStatistic

ROWS_PER_MODALITY = 32
"""Prompt rows of each query modality that statistics with `every_row = False` see, evenly spaced over the prompt."""

BLOCK_ELEMENTS = 1 << 20
"""Weights per block (4 bytes each)."""


@dataclass(frozen=True)
class Plan:
    """What is wanted of every pass: row statistics, attention received per key, scores of the image tokens."""

    rows: tuple[RowStatistic, ...]
    keys: bool = False
    scores: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(["system", "image", "text", *(c for s in self.rows for c in s.columns)]))


@dataclass(eq=False)
class LayerPass:
    """Numbers of one pass through one layer, for a whole batch; the values of a statistic are flattened.

    Attributes:
        sums, counts: statistic -> (batch, heads, 3, values) float64, over prompt rows by query modality.
        steps: statistic -> (batch, heads, values), of the row that produces a token.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class _Role:
    """What each query row counts for: modality (batch, rows, 3) bool, last and sampled (batch, rows) bool."""

    modality: Tensor
    last: Tensor
    sampled: Tensor


def reduce_call(call: AttentionCall, tokens: Tokens, plan: Plan) -> LayerPass:
    """The numbers of one call.

    Args:
        tokens: all tokens of the sequence so far, (batch, length).

    Raises:
        ValueError: if weights of a real token are not numbers; names the layer and the step.
    """
    positions = query_positions(call)
    queries, keys = at_positions(tokens, positions), key_tokens(call, tokens)
    columns = torch.stack([COLUMNS[name](keys) for name in plan.columns], -1)
    role = _roles(queries, prompt=call.forward.kind != "decode")
    result = LayerPass()
    rows = call.query.shape[2]
    size = max(1, BLOCK_ELEMENTS // (call.query.shape[0] * call.query.shape[1] * call.key.shape[2]))
    for start in range(0, rows, size):
        at = slice(start, min(start + size, rows))
        logits = attention_logits(call, at)
        visible = ~torch.isneginf(logits)
        weights = softmax_weights(logits, call.options.get("s_aux"))
        block = Rows(weights, visible, queries[at], keys, columns, plan.columns)
        if bool((block.mass().isnan().any(-1).any(1) & (queries.rank[:, at] >= 0)).any()):
            raise ValueError(
                f"attention weights of layer {call.layer} are not numbers at {call.forward.kind} step {call.forward.step}; "
                "the model computed NaN or infinite queries or keys (half precision often needs bfloat16 or float32)"
            )
        _reduce(block, _Role(role.modality[:, at], role.last[:, at], role.sampled[:, at]), plan, result)
    return result


def query_positions(call: AttentionCall) -> Tensor:
    """(batch, rows) sequence index of every query row."""
    forward, (batch, _, rows, _) = call.forward, call.query.shape
    if forward.rows is not None:
        return forward.rows
    return torch.arange(forward.start, forward.start + rows, device=call.query.device).expand(batch, -1)


def key_tokens(call: AttentionCall, tokens: Tokens) -> Tokens:
    """What every key is: (batch, 1 or key heads, keys)."""
    batch, _, keys, _ = call.key.shape
    positions = call.key_positions
    if positions is None:
        positions = torch.arange(keys, device=call.key.device)
        positions = positions.masked_fill(positions >= tokens.rank.shape[1], -1)
    positions = (
        positions[:, None] if positions.dim() == 2 else positions.view(-1, *positions.shape[-2:-1] or (1,), keys)
    )
    return at_positions(tokens, positions.expand(batch, -1, -1))


def _roles(queries: Tokens, prompt: bool) -> _Role:
    modality = torch.stack([queries.modality == code for code in range(3)], -1)
    rank = queries.rank
    last = (rank == rank.amax(1, keepdim=True)) & (rank >= 0)
    sampled = torch.zeros_like(last)
    if prompt:
        for b in range(len(rank)):
            for code in range(3):
                at = modality[b, :, code].nonzero().flatten()
                pick = torch.linspace(0, len(at) - 1, min(len(at), ROWS_PER_MODALITY), device=at.device).round().long()
                sampled[b, at[pick]] = True
    return _Role(modality, last, sampled)


def _reduce(block: Rows, role: _Role, plan: Plan, result: LayerPass) -> None:
    chosen = (role.last | role.sampled).any(0).nonzero().flatten()
    few = block.take(chosen)
    for statistic in plan.rows:
        if statistic.every_row:
            _accumulate(result, statistic.name, statistic.value(block), role.modality, role.last)
        elif len(chosen):
            member = (role.modality & role.sampled[..., None])[:, chosen]
            _accumulate(result, statistic.name, statistic.value(few), member, role.last[:, chosen])


def _accumulate(result: LayerPass, name: str, value: Tensor, member: Tensor, last: Tensor) -> None:
    """Add a block's values, (batch, heads, rows, ...), to the groups they belong to, member (batch, rows, 3)."""
    flat = value.flatten(3) if value.dim() > 3 else value[..., None]
    batch, heads, _, values = flat.shape
    if name not in result.sums:
        result.sums[name] = flat.new_zeros(batch, heads, 3, values, dtype=torch.float64)
        result.counts[name] = torch.zeros_like(result.sums[name])
        result.steps[name] = flat.new_full((batch, heads, values), torch.nan)
    groups = member.transpose(1, 2)[:, None].double()
    defined = ~flat.isnan()
    result.sums[name] += groups @ flat.where(defined, 0.0).double()
    result.counts[name] += groups @ defined.double()
    b, r = last.nonzero(as_tuple=True)
    result.steps[name][b] = flat[b, :, r]
