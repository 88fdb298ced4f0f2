"""One call of an attention layer, and the softmax weights it implies.

SDPA and flash kernels never return weights. What they do is fully determined by query, key, mask
and scale, so any rows of the weights can be computed beside the kernel, in float32, for as few rows
as one needs: one row costs about as much as a decode step's attention, all rows as much as eager
attention without the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from avl.tokens import TokenLayout

if TYPE_CHECKING:
    from avl.quantized_tier import QuantizedTier


@dataclass(eq=False)
class Forward:
    """One pass through the decoder, as told to observers and interventions.

    Attributes:
        kind: "prefill" (nothing cached before), "extend" (a later turn: several new tokens after
            cached ones) or "decode" (one new token per row).
        step: 0 for prefill, then the number of decode steps so far, this one included; an extension
            keeps the count.
        start: sequence index of this pass's first token = number of tokens seen before, padding
            included.
        tokens: number of new tokens per row.
        layout: layout of all positions 0 .. start + tokens - 1, generated tokens being text.
        cache: the `past_key_values` of the pass, None without a cache.
        rows: sequence index of each query row where it is not simply start, start + 1, ...; (batch,
            rows) or None. Set by a policy that removes hidden states on the way; read it at the
            time of an attention call.
        inputs: keyword arguments of the top-level model call (attention_mask, image grids, ...).
        changed_by: description of the intervention on the model, "" without one.
    """

    kind: str
    step: int
    start: int
    tokens: int
    layout: TokenLayout
    cache: Any
    rows: Tensor | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    changed_by: str = ""


@dataclass(eq=False)
class AttentionCall:
    """What an attention layer was about to compute.

    Attributes:
        layer: index of the decoder layer.
        query: (batch, query heads, rows, head dim), after rotary embedding.
        key, value: (batch, key/value heads, keys, head dim), after the cache update: what is really
            attended.
        mask: as transformers made it for the underlying backend: None (causal if rows > 1), bool
            (True = attend) or additive float, broadcastable to (batch, query heads, rows, keys);
            (batch, keys) for flash kernels.
        scaling: factor on query . key.
        key_positions: sequence index of every key, -1 for a slot that holds nothing; shape (keys,),
            (batch, keys) or (batch, key/value heads, keys). None means key j is position j.
        module: the attention module; `options` all further keyword arguments of the call.
        coded_keys: reads the keys and values that were attended to as they are stored, in few bits,
            and that `key` and `value` leave out in front; None if there are none. See `decode`.
    """

    forward: Forward
    layer: int
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    options: dict[str, Any]
    key_positions: Tensor | None = None
    coded_keys: Callable[[], tuple[Tensor, Tensor]] | None = None

    def decode(self) -> None:
        """Put keys and values that were left out in front of `key` and `value`."""
        if self.coded_keys is not None:
            keys, values = self.coded_keys()
            self.key = torch.cat([keys, self.key], 2)
            self.value = torch.cat([values, self.value], 2)
            self.coded_keys = None

    @property
    def groups(self) -> int:
        """Query heads per key/value head.

        1 is multi-head attention, more is grouped-query attention.
        """
        return self.query.shape[1] // self.key.shape[1]

    @property
    def causal(self) -> bool:
        """Whether a missing mask means causal attention.

        SDPA's `is_causal` compares row i with key i.
        """
        wanted = self.options.get("is_causal")
        wanted = getattr(self.module, "is_causal", True) if wanted is None else wanted
        return self.mask is None and self.query.shape[2] > 1 and bool(wanted)


def for_query_heads(mask: Tensor, call: AttentionCall) -> Tensor:
    """(batch, 1 or key/value heads, keys) -> (batch, 1 or query heads, keys)."""
    return mask if mask.shape[1] == 1 else mask.repeat_interleave(call.groups, 1)


def attention_logits(
    call: AttentionCall, rows: slice = slice(None), keys: int | None = None
) -> Tensor:
    """Masked, scaled query-key products of some rows, before the softmax.

    Args:
        call: the attention call.
        rows: which query rows.
        keys: only the first `keys` keys (the rest must be invisible to these rows, e.g. a causal
            future).

    Returns:
        (batch, query heads, rows, keys) float32, -inf where a key is not attended.
    """
    query = call.query[:, :, rows].float()
    key = call.key[:, :, :keys].float()
    batch, heads, count, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], call.groups * count, dim)
    logits = (
        torch.matmul(grouped, key.transpose(-1, -2))
        .mul_(call.scaling)
        .view(batch, heads, count, key.shape[2])
    )
    if (cap := call.options.get("softcap")) is not None:
        logits = torch.tanh(logits / cap) * cap
    if (
        bias := call.options.get("position_bias")
    ) is not None:  # learned, per relative position (T5, Inkling)
        logits = logits + bias[:, :, rows, : key.shape[2]].float()
    mask = call.mask
    if mask is None:
        if call.causal:
            first = rows.indices(call.query.shape[2])[0]
            row = torch.arange(first, first + count, device=logits.device)
            column = torch.arange(key.shape[2], device=logits.device)
            logits.masked_fill_(column > row[:, None], -torch.inf)
        return logits
    if mask.dim() == 2:  # flash kernels: padding of the keys only; causality is the kernel's
        hidden = ~mask[:, None, None, : key.shape[2]].bool()
        if call.query.shape[2] > 1:
            first = rows.indices(call.query.shape[2])[0] + call.key.shape[2] - call.query.shape[2]
            row = torch.arange(first, first + count, device=logits.device)
            hidden = hidden | (torch.arange(key.shape[2], device=logits.device) > row[:, None])
        return logits.masked_fill_(hidden, -torch.inf)
    mask = mask[:, :, rows if mask.shape[2] > 1 else slice(None), : key.shape[2]]
    if mask.dtype == torch.bool:
        return logits.masked_fill_(~mask, -torch.inf)
    # transformers writes "not attended" as the most negative finite number; as -inf it survives the
    # addition exactly
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return (logits + mask.float()).masked_fill_(hidden, -torch.inf)


def softmax_weights(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the last axis; rows that attend to nothing (padding) give zeros instead of NaN.

    `sinks` are learned logits that take part in the normalisation and hold no value: (query heads,)
    as in gpt-oss, or (batch, query heads, rows, 1) where they depend on the query (Inkling 2).
    """
    top = logits.amax(-1, keepdim=True)
    if sinks is not None:
        sink = (sinks.float().view(1, -1, 1, 1) if sinks.dim() == 1 else sinks.float()).expand_as(
            top
        )
        top = torch.maximum(top, sink)
    top = top.clamp_min(torch.finfo(logits.dtype).min)
    weights = (logits - top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sink - top).exp()
    return weights.div_(total.clamp_min(torch.finfo(logits.dtype).tiny))


def attention_weights(
    call: AttentionCall, rows: slice = slice(None), keys: int | None = None
) -> Tensor:
    """Softmax weights of some query rows.

    (batch, query heads, rows, keys) float32, each row summing to 1 (or 0).
    """
    sinks: Tensor | None = call.options.get("s_aux")
    by_row: Tensor | None = call.options.get("sinks")
    if sinks is None and by_row is not None:
        sinks = by_row[:, :, rows]
    return softmax_weights(attention_logits(call, rows, keys), sinks)


def row_logits(call: AttentionCall, tier: QuantizedTier | None = None) -> Tensor:
    """Scaled and capped products of a decode step, reading every key once.

    The products are in the keys' own dtype (as in transformers' eager attention); those with
    quantised keys are in float32.

    Args:
        call: one query row per row of the batch; its mask is not read.
        tier: keys in few bits in front of the call's.

    Returns:
        (batch, key/value heads, groups, keys) float32.
    """
    batch, heads, _, dim = call.query.shape
    shape = (batch, heads // call.groups, call.groups, -1)
    query = call.query.reshape(-1, call.groups, dim).transpose(1, 2)
    logits = _products(call.key.flatten(0, 1), query).transpose(1, 2).float().view(shape)
    if tier is not None:
        logits = torch.cat([tier.products(call.query[:, :, 0]).view(shape), logits], -1)
    logits.mul_(call.scaling)
    if (cap := call.options.get("softcap")) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def attend_with(
    call: AttentionCall,
    logits: Tensor,
    empty: Tensor | None = None,
    tier: QuantizedTier | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and weights of a decode step from its logits, reading every value once.

    The softmax is in float32. The kernels' own single-row path is slower on CPU and keeps the
    weights to itself.

    Args:
        call: one query row per row of the batch; its mask is not read.
        logits: as `row_logits` gives them, unchanged.
        empty: (batch, 1 or key/value heads, keys) bool, slots that hold nothing, or that this step
            leaves out; None if there are none.
        tier: as given to `row_logits`.

    Returns:
        Output (batch, 1, query heads, head dim) and weights (batch, key/value heads, groups, keys)
            float32.
    """
    batch, heads = call.query.shape[:2]
    if empty is not None:
        logits = logits.masked_fill(empty[:, :, None], -torch.inf)
    if (sinks := call.options.get("s_aux")) is None:
        weights = torch.softmax(logits, -1)
    else:
        sunk = softmax_weights(logits.reshape(batch, heads, 1, -1), sinks)
        weights = sunk.view(logits.shape)
    coded = 0 if tier is None else tier.width
    own = weights[..., coded:].to(call.value.dtype).flatten(0, 1)
    output = _products(own, call.value.flatten(0, 1)).reshape(batch, 1, heads, -1)
    if tier is not None:
        few = tier.weighted_values(weights[..., :coded].reshape(batch, heads, coded))
        output = (output.float() + few[:, None]).to(call.value.dtype)
    return output, weights


def attend_one_row(call: AttentionCall, empty: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and weights of a decode step; see `attend_with` for what is given and returned."""
    return attend_with(call, row_logits(call), empty)


_COPIED_BYTES = 2**24


def _products(left: Tensor, right: Tensor) -> Tensor:
    """torch.bmm, (n, a, b) x (n, b, c), that does not suffer from views in half precision on CPU.

    There, oneDNN takes packed batches only: a view of a larger buffer is copied first, and copies
    beyond 32 MB are fresh memory in every call, several times slower than the product. In equal
    pieces below that it costs little.
    """
    if left.device.type != "cpu" or left.dtype == torch.float32:
        return torch.bmm(left, right)
    size = max(left.numel(), right.numel()) * left.element_size()
    calls = -(-size // _COPIED_BYTES)
    if calls <= 1:
        return torch.bmm(left, right)
    each = -(-left.shape[0] // calls)
    return torch.cat(
        [torch.bmm(*pair) for pair in zip(left.split(each), right.split(each), strict=True)]
    )


Attend = Callable[[AttentionCall], Tensor]
"""Computes a call's output, (batch, rows, query heads, head dim), with the model's own backend."""
