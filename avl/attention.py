"""One call of an attention layer, and the softmax weights it implies.

SDPA and flash kernels never return weights. What they do is fully determined by query, key, mask
and scale, so any rows of the weights can be computed beside the kernel, in float32, for as few rows
as one needs: one row costs about as much as a decode step's attention, all rows as much as eager
attention without the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from avl.kernels.row_attention import compiled_for, row_attention
from avl.kernels.row_products import row_products, row_sums
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


class _KeyPositions:
    """The attribute `AttentionCall.key_positions`, which may be set to what makes the positions.

    They are made when somebody asks: most decode steps are not recorded.
    """

    def __get__(self, call: AttentionCall | None, owner: type) -> Tensor | None:
        if call is None:
            return None  # what a call has that is made without positions
        if callable(positions := call.__dict__["_positions"]):
            positions = call.__dict__["_positions"] = positions()
        return positions

    def __set__(
        self, call: AttentionCall, positions: Tensor | Callable[[], Tensor | None] | None
    ) -> None:
        call.__dict__["_positions"] = positions


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
            (batch, keys) or (batch, key/value heads, keys). None means key j is position j. May be
            set to a function that returns them; it is called before anything changes the keys.
        module: the attention module; `options` all further keyword arguments of the call.
        all_keys: reads all keys and values that were attended to, where `key` and `value` are some
            of them only: others may have been read where they are stored. None where they are all.
            See `complete`.
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
    key_positions: _KeyPositions = _KeyPositions()
    all_keys: Callable[[], tuple[Tensor, Tensor]] | None = None

    def complete(self) -> None:
        """Have `key` and `value` hold all that was attended to."""
        if self.all_keys is not None:
            self.key, self.value = self.all_keys()
            self.all_keys = None

    @property
    def groups(self) -> int:
        """Query heads per key/value head.

        1 is multi-head attention, more is grouped-query attention.
        """
        return self.query.shape[1] // self.key.shape[1]

    @property
    def softcap(self) -> float | None:
        """Bound of the scaled products, see `soft_cap`."""
        cap: float | None = self.options.get("softcap")
        return cap

    @property
    def position_bias(self) -> Tensor | None:
        """(1 or batch, query heads, rows, keys) learned, per relative position (T5, Inkling)."""
        bias: Tensor | None = self.options.get("position_bias")
        return bias

    @property
    def plain(self) -> bool:
        """Whether a decode step's weights are a softmax of scaled products and nothing else."""
        return self.options.get("softcap") is None and self.options.get("s_aux") is None

    @property
    def causal(self) -> bool:
        """Whether a missing mask means causal attention.

        SDPA's `is_causal` compares row i with key i.
        """
        wanted = self.options.get("is_causal")
        wanted = getattr(self.module, "is_causal", True) if wanted is None else wanted
        return self.mask is None and self.query.shape[2] > 1 and bool(wanted)


def newest_positions(forward: Forward, key: Tensor) -> Tensor | None:
    """Positions of the keys a model's cache handed out, where they are not simply 0, 1, ...

    A sliding window's cache hands out the newest keys only.
    """
    count = key.shape[2]
    if forward.rows is not None and forward.rows.shape[1] == count:
        return forward.rows
    total = forward.start + forward.tokens
    return torch.arange(total - count, total, device=key.device) if count < total else None


class MaskPart(NamedTuple):
    """What a mask says about some rows and keys.

    Attributes:
        visible: (1 or batch, 1 or query heads, 1 or rows, keys) bool, which keys a row may attend
            to; None where every row may attend to every key.
        bias: same shape, float32 that is added to the logits of visible keys; None where nothing
            is.
    """

    visible: Tensor | None
    bias: Tensor | None = None


def read_mask(
    call: AttentionCall,
    rows: slice = slice(None),
    keys: slice = slice(None),
    sample: int | None = None,
) -> MaskPart:
    """The mask of a call in one form, whichever of its own transformers gave it.

    Args:
        call: the attention call.
        rows: which query rows.
        keys: which keys.
        sample: one row of the batch, which then has size 1; None for all.
    """
    mask, count, held = call.mask, call.query.shape[2], call.key.shape[2]
    row = torch.arange(count, device=call.query.device)[rows, None]
    column = torch.arange(held, device=call.query.device)[keys]
    if mask is None:
        return MaskPart((column <= row)[None, None] if call.causal else None)
    if sample is not None:
        mask = mask[min(sample, len(mask) - 1)][None]  # one mask may serve the whole batch
    if mask.dim() == 2:  # flash kernels: padding of the keys only; causality is the kernel's
        visible = mask[:, None, None, keys].bool()
        if count > 1:  # these kernels align the last row with the last key, not the first ones
            visible = visible & (column <= row + (held - count))
        return MaskPart(visible)
    mask = mask[:, :, rows if mask.shape[2] > 1 else slice(None), keys]
    if mask.dtype == torch.bool:
        return MaskPart(mask)
    # transformers writes "not attended" as the most negative finite number; half of it tells it
    # from any bias, also after it was converted or something small was added to it
    return MaskPart(mask > torch.finfo(mask.dtype).min / 2, mask.float())


def soft_cap(products: Tensor, cap: float | None) -> None:
    """`cap * tanh(products / cap)` in place (Gemma 2); unchanged without a cap."""
    if cap is None:
        return
    if products.requires_grad:  # the derivative of tanh needs its result, which mul_ would change
        products.copy_(torch.tanh(products / cap) * cap)
    else:
        products.div_(cap).tanh_().mul_(cap)


def sinks_of(call: AttentionCall, rows: slice = slice(None)) -> Tensor | None:
    """Learned logits that take part in the softmax and stand for no key, None without any.

    gpt-oss has `s_aux`, one per head; Inkling 2 has `sinks`, which depend on the query.

    Returns:
        (1 or batch, query heads, 1 or rows, 1) float32.
    """
    if (by_head := call.options.get("s_aux")) is not None:
        return by_head.float().view(1, -1, 1, 1)
    by_row: Tensor | None = call.options.get("sinks")
    return None if by_row is None else by_row[:, :, rows].float()


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
    soft_cap(logits, call.softcap)
    if call.position_bias is not None:
        logits += call.position_bias[:, :, rows, : key.shape[2]].float()
    visible, bias = read_mask(call, rows, slice(key.shape[2]))
    if bias is not None:
        logits += bias
    return logits if visible is None else logits.masked_fill_(~visible, -torch.inf)


def softmax_weights(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the last axis; rows that attend to nothing (padding) give zeros instead of NaN.

    `sinks` are as `sinks_of` gives them: they take part in the normalisation and hold no value.
    """
    top = logits.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    # A row of nothing but -inf would subtract -inf from -inf; with a finite maximum its weights
    # become exp(-inf) = 0 and their sum 0, which the smallest divisor leaves 0.
    top = top.clamp_min(torch.finfo(logits.dtype).min)
    weights = (logits - top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp()
    return weights.div_(total.clamp_min(torch.finfo(logits.dtype).tiny))


def attention_weights(
    call: AttentionCall, rows: slice = slice(None), keys: int | None = None
) -> Tensor:
    """Softmax weights of some query rows.

    Args:
        call: the attention call.
        rows: which query rows.
        keys: only the first `keys` keys, as in `attention_logits`.

    Returns:
        (batch, query heads, rows, keys) float32, each row summing to 1 (or 0).
    """
    return softmax_weights(attention_logits(call, rows, keys), sinks_of(call, rows))


def row_logits(call: AttentionCall, tier: QuantizedTier | None = None) -> Tensor:
    """Scaled and capped products of a decode step, reading every key once.

    On a processor, float32 and bfloat16 keys are multiplied in float32 (`avl.kernels`), as are
    quantised ones everywhere; otherwise the products are in the keys' own dtype, as in
    transformers' eager attention.

    Args:
        call: one query row per row of the batch; its mask is not read.
        tier: keys in few bits in front of the call's.

    Returns:
        (batch, key/value heads, groups, keys) float32.
    """
    batch, heads, _, dim = call.query.shape
    shape, keys = (batch, heads // call.groups, call.groups, -1), call.key.flatten(0, 1)
    if _in_kernels(call.query, keys):
        logits = row_products(call.query.reshape(-1, dim).float(), keys).view(shape)
    else:
        query = call.query.reshape(-1, call.groups, dim).transpose(1, 2)
        logits = _products(keys, query).transpose(1, 2).float().view(shape)
    if tier is not None:
        logits = torch.cat([tier.products(call.query[:, :, 0]).view(shape), logits], -1)
    soft_cap(logits.mul_(call.scaling), call.softcap)
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
    if (sinks := sinks_of(call)) is None:
        weights = torch.softmax(logits, -1)
    else:
        sunk = softmax_weights(logits.reshape(batch, heads, 1, -1), sinks)
        weights = sunk.view(logits.shape)
    coded = 0 if tier is None else tier.width
    own, values = weights[..., coded:], call.value.flatten(0, 1)
    if _in_kernels(own, values):
        output = row_sums(own.flatten(0, 2), values)
    else:
        output = _products(own.to(values.dtype).flatten(0, 1), values)
    output = output.reshape(batch, 1, heads, -1)
    if tier is not None:
        few = tier.weighted_values(weights[..., :coded].reshape(batch, heads, coded))
        output = output.float() + few[:, None]
    return output.to(values.dtype), weights


def attend_one_row(
    call: AttentionCall, empty: Tensor | None = None, tier: QuantizedTier | None = None
) -> tuple[Tensor, Tensor]:
    """Output and weights of a decode step, in one compiled call where that is possible.

    Args:
        call: one query row per row of the batch; its mask is not read.
        empty: (batch, 1 or key/value heads, keys) bool, keys that are left out; None if there are
            none.
        tier: keys in few bits in front of the call's, or None.

    Returns:
        As of `attend_with`.
    """
    if empty is not None or not call.plain or not compiled_for(call.query, call.key, call.value):
        return attend_with(call, row_logits(call, tier), empty, tier)
    codes = None if tier is None else tier.codes()
    output, weights = row_attention(call.query, call.key, call.value, call.scaling, codes)
    return output.to(call.value.dtype), weights


def _in_kernels(one: Tensor, other: Tensor) -> bool:
    """Whether the kernels of `row_products` multiply these; they cut off gradients."""
    if other.device.type != "cpu" or other.dtype not in (torch.float32, torch.bfloat16):
        return False
    return not (torch.is_grad_enabled() and (one.requires_grad or other.requires_grad))


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
