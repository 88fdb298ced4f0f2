"""Tensors as compiled functions take them: flat views with strides, bfloat16 as its bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flat_view(tensor: Tensor) -> tuple[Any, tuple[int, ...]]:
    """A tensor's memory from its first number on, and the strides of all but its last dimension.

    The numbers of the last dimension lie side by side in the view; a tensor where they do not, or
    that is neither float32 nor bfloat16, is copied. bfloat16 numbers come as their 16 bits.

    Returns:
        An array, (numbers,), and as many strides as there are other dimensions.
    """
    source, strides = tensor.detach(), tensor.stride()
    if source.dtype not in (torch.float32, torch.bfloat16) or strides[-1] != 1:
        source = source.float().contiguous()
        strides = source.stride()
    # numba vectorises loops over an array only where it knows that the numbers lie side by side,
    # and of an array of several dimensions it knows that only if all of it does. So the array is
    # one long row, from the first number to the last, and the loops find their way by the strides.
    extent = zip(source.shape, strides, strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in extent) if source.numel() else 0
    flat = source.as_strided((length,), (1,))
    if source.dtype == torch.bfloat16:
        flat = flat.view(torch.uint16)
    return flat.numpy(), strides[:-1]
