"""Attention of one query row per row of the batch, over keys in full and keys in few bits.

The reference is `avl.attention.row_logits` and `attend_with`, which also take masks, caps and
sinks; here is what an ordinary decode step needs, compiled into one call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avl.kernels.backend import COMPILED, backend_for, on_threads
from avl.kernels.row_products import head_parts


class Codes(NamedTuple):
    """Keys and values in few bits as the compiled function takes them.

    Attributes:
        arrays: codes of keys, groups, limits of keys, codes of values, limits of values.
        key_bits, value_bits: of a code.
        width: keys.
        scratch: float32 numbers that a thread needs beside them.
    """

    arrays: tuple[Any, ...]
    key_bits: int
    value_bits: int
    width: int
    scratch: int

    @classmethod
    def of(
        cls,
        keys: Tensor,
        groups: Tensor,
        key_limits: Tensor,
        values: Tensor,
        value_limits: Tensor,
        bits: tuple[int, int],
    ) -> Codes:
        """Views of these tensors, on a processor, as `avl.kernels.codes` describes them.

        Args:
            keys: (batch, key/value heads, m, bytes).
            groups: (batch, 1 or key/value heads, m).
            key_limits: (batch, key/value heads, groups, 2, width) half precision.
            values: (batch, key/value heads, m, bytes).
            value_limits: (batch, key/value heads, m, groups of channels, 2) half precision.
            bits: of a key's and of a value's code.
        """
        key_groups, width = key_limits.shape[2], key_limits.shape[4]
        value_groups = value_limits.shape[3]
        folded = key_groups * keys.shape[3] * (8 // bits[0])
        limits = key_groups * 2 * width + keys.shape[2] * value_groups * 2
        # numba has no half precision: limits come as their bits, and are converted head by head, so
        # that no second copy of them is ever held.
        halves = (limit.contiguous().view(torch.uint16) for limit in (key_limits, value_limits))
        of_keys, of_values = (limit.numpy() for limit in halves)
        coded = (part.contiguous().numpy() for part in (keys, groups, values))
        stored_keys, group, stored_values = coded
        return cls(
            (stored_keys, group, of_keys, stored_values, of_values),
            *bits,
            keys.shape[2],
            limits + folded + max(key_groups, value_groups),
        )


def _no_codes() -> Codes:
    """Arrays of the same types without a key: numba compiles anew for every other type."""
    with torch.inference_mode(False):
        stored = torch.zeros(1, 1, 0, 1, dtype=torch.uint8)
        limits = torch.zeros(1, 1, 0, 2, 0).half(), torch.zeros(1, 1, 0, 0, 2).half()
        groups = torch.zeros(1, 1, 0, dtype=torch.int16)
        return Codes.of(stored, groups, limits[0], stored, limits[1], (8, 8))


_NO_CODES = _no_codes()
_LIKE = {
    torch.float32: torch.zeros(0).numpy(),
    torch.bfloat16: torch.zeros(0, dtype=torch.uint16).numpy(),
}
"""Arrays that tell the compiled function the type of keys; bfloat16 numbers are their 16 bits."""


def compiled_for(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `row_attention` can run: on a processor, and where no gradients are wanted."""
    if keys.dtype not in _LIKE or keys.dtype != values.dtype:
        return False
    gradients = query.requires_grad or keys.requires_grad or values.requires_grad
    if gradients and torch.is_grad_enabled():
        return False
    return backend_for(keys.device) == COMPILED


def row_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, codes: Codes | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of values by the softmax of the queries' products with keys.

    Args:
        query: (batch, query heads, 1, width), a multiple of the key/value heads.
        keys: (batch, key/value heads, n, width), at least one.
        values: (batch, key/value heads, n, width of a value).
        scaling: factor on the products.
        codes: keys and values in front of these.

    Returns:
        Sums (batch, 1, query heads, width of a value) and weights (batch, key/value heads, query
            heads of each, keys), those of the codes first; float32.
    """
    attend = _attend()
    batch, heads, _, width = query.shape
    kv_heads, full, value_width = keys.shape[1], keys.shape[2], values.shape[3]
    # No copies, where they are as attention layers make them: one row of a head follows another.
    # Held until the call is over: the compiled function gets addresses.
    query = query.float().contiguous()
    keys, key_strides = _in_rows(keys)
    values, value_strides = _in_rows(values)
    own = _NO_CODES if codes is None else codes
    shared = heads // kv_heads
    # Every weight is written; output is added to.
    weights = torch.empty(batch, kv_heads, shared, own.width + full, dtype=torch.float32)
    output = torch.zeros(batch, 1, heads, value_width, dtype=torch.float32)
    arguments = (
        kv_heads,
        shared,
        _LIKE[keys.dtype],
        full,
        query.data_ptr(),
        scaling / math.log(2),
        width,
        keys.data_ptr(),
        key_strides,
        value_width,
        values.data_ptr(),
        value_strides,
        own.arrays,
        own.key_bits,
        own.value_bits,
    )
    results = weights.data_ptr(), output.data_ptr()

    def some(part: Any) -> None:
        scratch = _LIKE[torch.float32]  # nothing
        if own.scratch:
            scratch = torch.zeros(own.scratch, dtype=torch.float32).numpy()
        attend(part, *arguments, scratch, *results)

    # As many threads as there is work for: a small model's step is over before a thread starts.
    size = batch * kv_heads * (own.width + full) * width
    on_threads(some, head_parts(batch * kv_heads, size))
    return output, weights


@cache
def _attend() -> Any:
    """The compiled function; importing numba takes a while."""
    from avl.kernels.row_attention_compiled import attend

    return attend


def _in_rows(tensor: Tensor) -> tuple[Tensor, Sequence[int]]:
    """A tensor whose last numbers lie side by side, and the strides of the other dimensions."""
    if tensor.stride(3) != 1:
        tensor = tensor.contiguous()
    return tensor, tensor.stride()[:3]
