"""Where tensors lie in memory, as compiled functions read it.

A decode step of a small model is a matter of how often Python is asked, and asking a tensor for its
address, shape and strides takes longer than passing ten numbers on. So what a step reads again and
again is asked once and written into a table of 64-bit numbers, whose address the compiled functions
get. A table is right as long as its tensors are the ones it was made of, and keeps them alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import local
from typing import Any

import torch
from torch import Tensor

from avl.kernels.backend import COMPILED, backend_for

# Places in a table of slots; strides and widths count numbers, addresses bytes.
KV_HEADS, WIDTH, VALUE_WIDTH = 0, 1, 2
KEYS_AT, KEY_STRIDES = 3, 4  # from row to row, head to head, key to key
VALUES_AT, VALUE_STRIDES = 7, 8
POSITIONS_AT, POSITION_HEADS, CAPACITY, SCORES_AT = 11, 12, 13, 14
SLOT_FIELDS = 15

# Places in a table of codes. Only the heads of groups may be fewer than those of keys.
CODED, KEY_BITS, VALUE_BITS = 0, 1, 2
CODED_KEYS_AT, KEY_BYTES = 3, 4
GROUPS_AT, GROUP_HEADS, KEY_GROUPS = 5, 6, 7
KEY_LIMITS_AT = 8
CODED_VALUES_AT, VALUE_BYTES = 9, 10
VALUE_LIMITS_AT, VALUE_GROUPS = 11, 12
CODE_FIELDS = 13


LIKE = {
    torch.float32: torch.zeros(0).numpy(),
    torch.bfloat16: torch.zeros(0, dtype=torch.uint16).numpy(),
}
"""Arrays that tell a compiled function the type of keys; bfloat16 numbers are their 16 bits."""


def readable(keys: Tensor, values: Tensor) -> bool:
    """Whether compiled functions can read keys and values: on a processor, of one known type."""
    known = keys.dtype in LIKE and keys.dtype == values.dtype
    return known and backend_for(keys.device) == COMPILED


class Table:
    """Numbers for compiled functions, and the tensors they were read from.

    Attributes:
        address: of the numbers.
    """

    def __init__(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
        with torch.inference_mode(False):
            self._numbers = torch.tensor(numbers, dtype=torch.int64)
        self._tensors = tensors
        self.address = self._numbers.data_ptr()


class SlotTable(Table):
    """Where keys and values lie, and what is known of them.

    Attributes:
        batch, kv_heads, width, value_width: of the keys and values.
        keys, values, positions, scores: the tensors.
        dtype: of the keys.
        by_head: whether scores are kept for each key/value head.
        compiled: whether compiled functions can read them; see `readable`.
        like: an array of that type.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> None:
        """Read the tensors.

        Args:
            keys: (batch, key/value heads, slots, width); the numbers of a key lie side by side.
            values: (batch, key/value heads, slots, width of a value), likewise.
            positions: (batch, 1 or key/value heads, slots) int32, contiguous; None where nothing is
                to be written.
            scores: same shape, float32, contiguous, or None.
        """
        self.batch, self.kv_heads, _, self.width = keys.shape
        self.value_width = values.shape[3]
        self.keys, self.values, self.positions, self.scores = keys, values, positions, scores
        self.dtype = keys.dtype
        self.by_head = scores is not None and scores.shape[1] == keys.shape[1]
        self.like: Any = LIKE.get(keys.dtype)
        self.compiled = readable(keys, values)
        known = (0, 0, 0)
        if positions is not None:
            known = positions.data_ptr(), positions.shape[1], positions.shape[2]
        numbers = (
            self.kv_heads,
            self.width,
            self.value_width,
            keys.data_ptr(),
            *keys.stride()[:3],
            values.data_ptr(),
            *values.stride()[:3],
            *known,
            0 if scores is None else scores.data_ptr(),
        )
        super().__init__(numbers, ())


class _Scratch(local):
    """Memory of one thread for what lies between the steps of a compiled function."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)
        self.size, self.address = 0, 0


_SCRATCH = _Scratch()


def scratch(size: int) -> int:
    """Address of so many float32 numbers, until this thread asks again.

    The memory is kept: fresh memory for every layer of every step takes longer than what is done
    with it.
    """
    if size > _SCRATCH.size:
        with torch.inference_mode(False):
            _SCRATCH.memory = torch.empty(size)
        _SCRATCH.size, _SCRATCH.address = size, _SCRATCH.memory.data_ptr()
    return _SCRATCH.address
