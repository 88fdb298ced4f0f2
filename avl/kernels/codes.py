"""Keys and values in a few bits: storing them, and attending to them as they are stored.

A number is stored as `round((x - low) / step)` in 8, 4 or 2 bits, with one `low` and one `step`, in
half precision, per group (KIVI, Liu et al., ICML 2024, arXiv 2402.02750): for keys a group is a
channel of some tokens, for values some channels of a token. A query is multiplied with codes
directly: with `low` and `step` of a group folded into the query once, `q . k = q . low + (q * step)
. code`; and a value's weight is multiplied with its `step` before its codes. Nothing is decoded.

Several codes share a byte, neighbouring channels lying in neighbouring bytes: with `n` bytes a key,
channel c is in byte c mod n, from bit `bits * (c // n)` on.

Index tensors are (batch, 1 or heads, n), with 1 where all heads are alike; -1 stands for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from avl.kernels.backend import COMPILED, backend_for, on_threads
from avl.kernels.memory import flat_view

BITS = (8, 4, 2)
"""How few bits a stored number may have."""

_LARGEST = torch.finfo(torch.float16).max
_SMALL = 1 << 18
"""Codes that a thread must have to itself to be worth starting."""


def packed_width(width: int, bits: int) -> int:
    """Bytes of `width` codes."""
    return -(-width * bits // 8)


# -- limits ----------------------------------------------------------------------------------------


def key_limits(keys: Tensor, index: Tensor, group_size: int, bits: int) -> Tensor:
    """Low and step of each channel of groups of keys; a group of equal numbers has step 0.

    Args:
        keys: (batch, heads, n, width).
        index: which keys, in order; each `group_size` of them are a group.
        group_size: keys that share limits.
        bits: of a code.

    Returns:
        (batch, heads, groups, 2, width) half precision; 0 for groups of nothing.
    """
    batch, heads, _, width = keys.shape
    shape = (batch, heads, -(-index.shape[2] // group_size), width)
    if _compiled_for(keys):
        # What no key lowers or raises stays infinite, and becomes 0 below: groups of nothing.
        low = keys.new_full(shape, torch.inf, dtype=torch.float32)
        high = torch.full_like(low, -torch.inf)
        _each_pair("channel_extremes", keys, index, (group_size, low.numpy(), high.numpy()), width)
    else:
        empty = (index < 0).expand(-1, heads, -1)[..., None]
        taken = taken_at(keys, index).float()
        parts = list(zip(taken.split(group_size, 2), empty.split(group_size, 2), strict=True))
        low = torch.stack([part.masked_fill(none, torch.inf).amin(2) for part, none in parts], 2)
        high = torch.stack([part.masked_fill(none, -torch.inf).amax(2) for part, none in parts], 2)
    return _low_and_step(low.nan_to_num(0, 0, 0), high.nan_to_num(0, 0, 0), bits, 3)


def value_limits(values: Tensor, index: Tensor, groups: int, bits: int) -> Tensor:
    """Low and step of groups of a value's channels.

    Args:
        values: (batch, heads, n, width).
        index: which values.
        groups: how many groups of channels there are; divides the width.
        bits: of a code.

    Returns:
        (batch, heads, values, groups, 2) half precision.
    """
    batch, heads, _, width = values.shape
    if _compiled_for(values):
        low = torch.empty(batch, heads, index.shape[2], groups, dtype=torch.float32)
        high = torch.empty_like(low)
        _each_pair("value_extremes", values, index, (low.numpy(), high.numpy()), width)
    else:
        grouped = taken_at(values, index).float().unflatten(-1, (groups, -1))
        low, high = grouped.amin(-1), grouped.amax(-1)
    return _low_and_step(low, high, bits, 4)


def _low_and_step(low: Tensor, high: Tensor, bits: int, dim: int) -> Tensor:
    # The step is measured from `low` as it was rounded, not as it was: else the largest number of a
    # group might lie beyond the largest code.
    low = low.clamp(-_LARGEST, _LARGEST).half()
    step = ((high - low.float()) / (2**bits - 1)).clamp_max(_LARGEST).half()
    return torch.stack([low, step], dim)


# -- codes -----------------------------------------------------------------------------------------


def store_keys(keys: Tensor, index: Tensor, groups: Tensor, limits: Tensor, bits: int) -> Tensor:
    """Codes of some keys.

    Args:
        keys: (batch, heads, n, width).
        index: which keys; what is stored for -1 is finite and means nothing.
        groups: (batch, 1 or heads, number of keys) int16, the group of each.
        limits: as `key_limits` gives them.
        bits: of a code.

    Returns:
        (batch, heads, number of keys, bytes) uint8.
    """
    if _compiled_for(keys):
        shape = (*keys.shape[:2], index.shape[2], packed_width(keys.shape[3], bits))
        stored = torch.empty(shape, dtype=torch.uint8)
        rest = (
            groups.contiguous().numpy(),
            limits.float().contiguous().numpy(),
            bits,
            stored.numpy(),
        )
        _each_pair("store_keys", keys, index, rest, keys.shape[3], bits)
        return stored
    low, step = _of_keys(limits, groups, keys.shape[1])
    return pack(_codes(taken_at(keys, index).float(), low, step, bits), bits)


def store_values(values: Tensor, index: Tensor, limits: Tensor, bits: int) -> Tensor:
    """Codes of some values, (batch, heads, number of values, bytes) uint8.

    Arguments as in `store_keys`.
    """
    if _compiled_for(values):
        shape = (*values.shape[:2], index.shape[2], packed_width(values.shape[3], bits))
        stored = torch.empty(shape, dtype=torch.uint8)
        rest = (limits.float().contiguous().numpy(), bits, stored.numpy())
        _each_pair("store_values", values, index, rest, values.shape[3], bits)
        return stored
    grouped = taken_at(values, index).float().unflatten(-1, (limits.shape[3], -1))
    own = limits.float()
    return pack(_codes(grouped, own[..., 0, None], own[..., 1, None], bits).flatten(-2), bits)


def read_keys(stored: Tensor, groups: Tensor, limits: Tensor, bits: int) -> Tensor:
    """Keys again, (batch, heads, n, width) float32."""
    low, step = _of_keys(limits, groups, stored.shape[1])
    return unpack(stored, bits, limits.shape[-1]).float().mul_(step).add_(low)


def read_values(stored: Tensor, limits: Tensor, bits: int, width: int) -> Tensor:
    """Values again, (batch, heads, n, width) float32."""
    own = limits.float()
    grouped = unpack(stored, bits, width).float().unflatten(-1, (limits.shape[3], -1))
    return grouped.mul_(own[..., 1, None]).add_(own[..., 0, None]).flatten(-2)


def _of_keys(limits: Tensor, groups: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Low and step of each key's channels, (batch, heads, n, width) float32."""
    if limits.shape[2] == 1:
        return limits[..., 0, :].float(), limits[..., 1, :].float()
    at = groups.long().expand(-1, heads, -1)[..., None]
    low, step = (
        limits[..., which, :].gather(2, at.expand(-1, -1, -1, limits.shape[-1])) for which in (0, 1)
    )
    return low.float(), step.float()


def _codes(numbers: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    # A group of equal numbers has step 0: all its codes are 0, which reads as `low`.
    codes = ((numbers - low) / step.clamp_min(1e-12)).round_().clamp_(0, 2**bits - 1)
    return codes.nan_to_num_(0.0).to(torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(..., width) uint8 codes, several to a byte: (..., ceil(width * bits / 8))."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (each, -1))
    packed = codes[..., 0, :].clone()
    for place in range(1, each):
        packed |= codes[..., place, :] << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `pack`."""
    each = 8 // bits
    codes = packed.new_empty(*packed.shape[:-1], each, packed.shape[-1])
    for place in range(each):
        torch.bitwise_right_shift(packed, bits * place, out=codes[..., place, :])
    if each > 1:
        codes &= 2**bits - 1
    return codes.flatten(-2)[..., :width]


def taken_at(source: Tensor, index: Tensor) -> Tensor:
    """source[b, h, index[b, h, i]], (batch, heads, n, width); any finite entry where index < 0."""
    at = index.clamp_min(0).expand(-1, source.shape[1], -1)[..., None]
    return source.gather(2, at.expand(-1, -1, -1, source.shape[3]))


# -- attending -------------------------------------------------------------------------------------


def key_products(
    query: Tensor, stored: Tensor, groups: Tensor, limits: Tensor, bits: int
) -> Tensor:
    """Products of queries with stored keys.

    Args:
        query: (batch, query heads, width), a multiple of the key/value heads.
        stored, groups, limits, bits: as in `store_keys`.

    Returns:
        (batch, query heads, n) float32.
    """
    batch, heads, width = query.shape
    query = query.float()
    if not _compiled_for(stored) or _needs_gradient(query):
        keys = read_keys(stored, groups, limits, bits)
        grouped = query.view(batch, keys.shape[1], -1, width)
        return (grouped @ keys.transpose(-1, -2)).view(batch, heads, -1)
    from avl.kernels import codes_compiled

    result = torch.empty(batch, heads, stored.shape[2], dtype=torch.float32)
    arrays = [t.contiguous().numpy() for t in (query, stored, groups, limits.float())]
    filled = stored.shape[3] * (8 // bits)

    def some(pairs: Tensor) -> None:
        folded = torch.zeros(limits.shape[2], filled, dtype=torch.float32)
        constants = torch.empty(limits.shape[2], dtype=torch.float32)
        codes_compiled.scores(
            pairs.numpy(), *arrays, bits, result.numpy(), folded.numpy(), constants.numpy()
        )

    on_threads(some, _shares(batch, heads, stored[0, 0].numel()))
    return result


def weighted_values(
    weights: Tensor, stored: Tensor, limits: Tensor, bits: int, width: int
) -> Tensor:
    """Sums of stored values by attention weights.

    Args:
        weights: (batch, query heads, n) float32; values whose weight is 0 are not read.
        stored, limits, bits: as in `store_values`.
        width: of a value.

    Returns:
        (batch, query heads, width) float32.
    """
    batch, heads, count = weights.shape
    if not _compiled_for(stored) or _needs_gradient(weights):
        values = read_values(stored, limits, bits, width)
        grouped = weights.view(batch, values.shape[1], -1, count)
        return (grouped @ values).view(batch, heads, width)
    from avl.kernels import codes_compiled

    result = torch.zeros(batch, heads, width, dtype=torch.float32)
    arrays = [t.contiguous().numpy() for t in (weights.float(), stored, limits.float())]

    def some(pairs: Tensor) -> None:
        constants = torch.empty(limits.shape[3], dtype=torch.float32)
        codes_compiled.weighted_values(
            pairs.numpy(), *arrays, bits, result.numpy(), constants.numpy()
        )

    on_threads(some, _shares(batch, heads, stored[0, 0].numel()))
    return result


# -- the compiled version --------------------------------------------------------------------------


def _compiled_for(tensor: Tensor) -> bool:
    return backend_for(tensor.device) == COMPILED


def _needs_gradient(tensor: Tensor) -> bool:
    """Whether gradients are to flow through what is computed, which compiled code cuts off."""
    return torch.is_grad_enabled() and tensor.requires_grad


def _each_pair(
    name: str,
    source: Tensor,
    index: Tensor,
    rest: tuple[object, ...],
    width: int,
    bits: int | None = None,
) -> None:
    """Call a compiled function that stores, for all rows and heads of `source`."""
    from avl.kernels import codes_compiled

    function = getattr(codes_compiled, name)
    flat, strides = flat_view(source)
    at = index.long().contiguous().numpy()

    def some(pairs: Tensor) -> None:
        scratch = [torch.empty(width, dtype=torch.float32).numpy()]
        if bits is not None:
            scratch.append(
                torch.zeros(packed_width(width, bits) * (8 // bits), dtype=torch.float32).numpy()
            )
        function(pairs.numpy(), flat, strides, at, *rest, *scratch)

    if index.shape[2]:
        on_threads(some, _shares(source.shape[0], source.shape[1], index.shape[2] * width))


def _shares(batch: int, heads: int, size: int) -> Sequence[Tensor]:
    """(n, 2) pairs of row and head, in as many parts as it pays to have.

    Args:
        batch: rows.
        heads: heads of each.
        size: numbers that one pair has to do with.
    """
    pairs = batch * heads
    parts = max(1, min(torch.get_num_threads(), pairs, pairs * size // _SMALL))
    return _pairs_in_parts(batch, heads, parts)


@lru_cache(64)
def _pairs_in_parts(batch: int, heads: int, parts: int) -> Sequence[Tensor]:
    """All pairs of row and head in this many parts; the same ones at every step of a generation."""
    with torch.inference_mode(False):
        pairs = torch.cartesian_prod(torch.arange(batch), torch.arange(heads))
        return pairs.tensor_split(parts)
