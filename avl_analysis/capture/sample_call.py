"""One sample's part of an attention call.

Its rows, its keys, what they are and which may attend to which.

Padding is cut off here, so nothing behind this knows of batches. What the keys are comes from the
call (`key_positions`) and what the rows are from the pass (`forward.rows`) wherever a policy has
changed them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from avl.attention import AttentionCall, sinks_of
from avl_analysis.capture.visibility import VisibleKeys, visible_keys
from avl_analysis.statistics.inputs import TokenInfo, for_heads


@dataclass(eq=False)
class SampleCall:
    """One sample's valid part of an attention call.

    Attributes:
        query: (query heads, rows, head dim).
        key, value: (key heads, keys, head dim), in the model's precision.
        scaling: factor on query . key.
        queries, keys: what they are, (rows,) and (key sets, keys).
        visible_keys: which keys the rows may attend to.
        softcap: products are `softcap * tanh(products / softcap)`, None for no cap.
        bias: (1 or query heads, rows, keys) learned, added to the products, or None.
        sinks: (query heads, 1 or rows) learned logits that take part in the softmax and stand for
            no key, or None.
        memo: what was found out about these rows and keys alone, shared by the layers they are the
            same in.
        weights: (query heads, rows, keys) float32 where they are known already (a replay); query
            and key then have the right number of rows and keys, and no content.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    queries: TokenInfo
    keys: TokenInfo
    visible_keys: VisibleKeys
    softcap: float | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    weights: Tensor | None = None

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[0] // self.key.shape[0]


@dataclass(eq=False)
class SampleSlice:
    """Which rows and keys of a call belong to one sample, and what the rows may see."""

    rows: slice
    columns: slice
    queries: TokenInfo
    keys: TokenInfo
    visible_keys: VisibleKeys
    memo: dict[str, Any] = field(default_factory=dict)


def view(
    call: AttentionCall,
    tokens: TokenInfo,
    sample: int,
    parts: dict[tuple[int, ...], SampleSlice | None],
) -> SampleCall | None:
    """Cut a call to one sample; None if none of its rows is a real token.

    Args:
        call: an attention call of a batch.
        sample: row of the batch.
        tokens: all tokens of the sample so far, (length,), padding included.
        parts: those of this pass by mask and size, filled on the way: layers with the same mask
            share them.
    """
    # A mask is alive for the whole pass, so its id names it. Under a policy every layer has keys of
    # its own, and nothing can be shared.
    name = (id(call.mask), sample, call.query.shape[2], call.key.shape[2])
    if call.key_positions is not None or call.forward.rows is not None:
        part = _part(call, tokens, sample)
    else:
        part = parts[name] if name in parts else parts.setdefault(name, _part(call, tokens, sample))
    if part is None:
        return None
    return SampleCall(
        call.query[sample, :, part.rows],
        call.key[sample, :, part.columns],
        call.value[sample, :, part.columns],
        call.scaling,
        part.queries,
        part.keys,
        part.visible_keys,
        call.softcap,
        _of_sample(call.position_bias, sample, part),
        _sinks(call, sample, part.rows),
        part.memo,
    )


def _of_sample(bias: Tensor | None, sample: int, part: SampleSlice) -> Tensor | None:
    return (
        None
        if bias is None
        else bias[min(sample, len(bias) - 1), :, part.rows, part.columns].float()
    )


def _sinks(call: AttentionCall, sample: int, rows: slice) -> Tensor | None:
    """(query heads, 1 or rows) of one sample."""
    sinks = sinks_of(call, rows)
    return None if sinks is None else sinks[min(sample, len(sinks) - 1), :, :, 0]


def _part(call: AttentionCall, tokens: TokenInfo, sample: int) -> SampleSlice | None:
    queries, keys = _queries(call, tokens, sample), _keys(call, tokens, sample)
    held = keys.rank >= 0
    # From the first to the last true token: slices, so that what is cut out of queries and keys is
    # a view. Empty slots in between stay, with rank -1, and are hidden from all rows.
    rows, columns = valid_part(queries.rank >= 0), valid_part(held.any(0))
    if rows.start == rows.stop:
        return None
    queries, keys, held = (
        queries.map(lambda t: t[rows]),
        keys.map(lambda t: t[:, columns]),
        held[:, columns],
    )
    return SampleSlice(
        rows,
        columns,
        queries,
        keys,
        visible_keys(call, sample, rows, columns, for_heads(held, call.query.shape[1])),
    )


def _queries(call: AttentionCall, tokens: TokenInfo, sample: int) -> TokenInfo:
    """What the rows are, (rows,)."""
    if call.forward.rows is not None:
        return tokens.at(call.forward.rows[sample])
    return tokens.map(lambda t: t[call.forward.start : call.forward.start + call.query.shape[2]])


def _keys(call: AttentionCall, tokens: TokenInfo, sample: int) -> TokenInfo:
    """Positions of keys, (1 or key heads, keys).

    Slots behind the last token of the sequence (of a static cache) are empty.
    """
    positions, count = call.key_positions, call.key.shape[2]
    if positions is not None:
        mine = positions if positions.dim() == 1 else positions[sample]
        return tokens.at(mine.reshape(-1, count))
    if count <= len(tokens.rank):
        return tokens.map(lambda t: t[None, :count])
    # A static cache is longer than the sequence; slots behind it hold nothing yet.
    slots = torch.arange(count, device=call.key.device)
    return tokens.at(slots.masked_fill(slots >= len(tokens.rank), -1)[None])


def valid_part(valid: Tensor) -> slice:
    """From the first to the last true place of (n,) bool; empty if there is none."""
    if bool(valid.all()):
        return slice(0, len(valid))
    at = valid.nonzero()
    return slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0)
