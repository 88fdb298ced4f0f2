"""Tensors as compiled functions take them: flat views with strides, bfloat16 as its bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flat_view(tensor: Tensor) -> tuple[Any, Any]:
    """A tensor's memory from its first number on, and the strides of all but its last dimension.

    The numbers of the last dimension lie side by side in the view; a tensor where they do not, or
    that is neither float32 nor bfloat16, is copied. bfloat16 numbers come as their 16 bits.

    Returns:
        Two arrays: (numbers,), and (dimensions - 1,) int64.
    """
    source = tensor.detach()
    if source.dtype not in (torch.float32, torch.bfloat16) or source.stride(-1) != 1:
        source = source.float().contiguous()
    extent = zip(source.shape, source.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in extent) if source.numel() else 0
    flat = source.as_strided((length,), (1,))
    if source.dtype == torch.bfloat16:
        flat = flat.view(torch.uint16)
    return flat.numpy(), torch.tensor(source.stride()[:-1]).numpy()
