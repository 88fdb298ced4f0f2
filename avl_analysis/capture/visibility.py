"""Which keys each query row of one sample may attend to, whatever form transformers gave the mask.

Masks come as nothing at all (causal, or a single row), as booleans, as numbers to add, or, for
flash kernels, as one flag per key. `VisibleKeys` answers for some rows at a time and holds no
matrix of its own: a causal mask is a number, and any other is read where the model keeps it. It is
the same for all layers of a pass that share a mask, so the recorder makes it once per pass; the
number of keys that a row sees, and of rows that see a key, are counted from it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from avl.attention import AttentionCall, read_mask
from avl_analysis.statistics.inputs import for_heads

BLOCK_ROWS = 256
"""Rows of a mask that are looked at together; what is taken of them grows with the keys alone."""


@dataclass(frozen=True)
class VisibleRows:
    """What some rows may attend to.

    Attributes:
        visible: (1 or query heads, rows, keys) bool.
        bias: same shape, float32 added to the logits of visible keys; None if there is none.
    """

    visible: Tensor
    bias: Tensor | None = None


class VisibleKeys:
    """Rows and keys of one sample, cut to the valid ones.

    Attributes:
        causal: whether row i of n sees the leading keys up to the n - i - th last, and no bias: the
            lower triangle that ends in the last corner.
    """

    def __init__(
        self,
        rows: int,
        keys: int,
        device: torch.device,
        read: Callable[[slice], VisibleRows] | None = None,
    ) -> None:
        """Look at the mask once, block by block.

        Args:
            rows: number of query rows.
            keys: number of keys.
            device: of the tensors that are handed out.
            read: what a range of rows sees; None for a causal triangle.
        """
        self._rows, self._keys, self._device = rows, keys, device
        self._offset = keys - rows
        self._read = self._triangle if read is None else read
        # Looked at once per pass and mask. Of a causal triangle nothing needs to be kept: spans,
        # ends and counts follow from row numbers, and kernels need no mask.
        self.causal = self._offset >= 0 and (read is None or self._is_triangle())
        if self.causal:
            self._read = self._triangle
            self._causal_ends = torch.arange(self._offset + 1, keys + 1, device=device)
            return
        first, end, blind = [], [], []
        for _, block in self._blocks():
            # Any head: a span must hold whatever some head of the block may see.
            seen = block.visible.any(0).to(torch.uint8)
            first.append(seen.argmax(1))
            # argmax finds the first 1; of the reversed row that is the last key seen. Rows that see
            # nothing give (0, keys), which is harmless.
            end.append(keys - seen.flip(1).argmax(1))
            blind.append(~block.visible.any(-1))
        # As Python numbers: they become slices, block after block, without waiting for a device.
        self._first, self._end = torch.cat(first).tolist(), torch.cat(end).tolist()
        self._blind = torch.cat(blind, 1)
        self._some_blind = bool(self._blind.any())

    @classmethod
    def of_matrix(cls, visible: Tensor) -> VisibleKeys:
        """What a matrix, (1 or query heads, rows, keys) bool, says."""
        _, rows, keys = visible.shape
        return cls(rows, keys, visible.device, lambda some: VisibleRows(visible[:, some]))

    def of_rows(self, rows: Tensor) -> Tensor:
        """(1 or query heads, n, keys) bool, for rows of these n ascending numbers."""
        wanted = torch.zeros(self._rows, dtype=torch.bool, device=self._device)
        wanted[rows] = True
        parts = [block.visible[:, wanted[at]] for at, block in self._blocks() if wanted[at].any()]
        if not parts:
            return torch.zeros(1, 0, self._keys, dtype=torch.bool, device=self._device)
        return torch.cat(parts, 1)

    @property
    def last_row(self) -> Tensor:
        """(1 or query heads, 1, keys) bool."""
        return self._read(slice(self._rows - 1, self._rows)).visible

    def span(self, rows: slice) -> slice:
        """Keys outside of which none of these rows sees anything."""
        if self.causal:
            return slice(0, rows.stop + self._offset)
        return slice(min(self._first[rows]), max(self._end[rows]))

    def ends(self, rows: slice) -> Tensor:
        """(rows,) int64: the number of leading keys of their span that each row may see."""
        if self.causal:
            return self._causal_ends[rows]
        span = self.span(rows)
        count = rows.stop - rows.start
        return torch.full((count,), span.stop - span.start, device=self._device)

    def hide(self, logits: Tensor, heads: slice, rows: slice, span: slice) -> None:
        """Add the bias and put -inf where a key may not be attended, in place.

        Args:
            logits: (heads, rows, keys of the span).
            heads: which query heads.
            rows: which rows.
            span: which keys.
        """
        if self.causal:
            count = rows.stop - rows.start
            if count > 1:  # the span ends with the last key that the last row sees
                place = torch.arange(count, device=logits.device)
                corner = place > place[:, None]
                logits[..., -count:].masked_fill_(corner, -torch.inf)
            return
        block = self._read(rows)
        shared = len(block.visible) == 1
        if block.bias is not None:
            logits += block.bias[slice(None) if len(block.bias) == 1 else heads, :, span]
        visible = block.visible[slice(None) if shared else heads, :, span]
        logits.masked_fill_(~visible, -torch.inf)

    def clear_blind(self, weights: Tensor, heads: slice, rows: slice) -> None:
        """Rows that see no key at all have zero weights, not NaN; in place."""
        if not self.causal and self._some_blind:
            blind = self._blind[slice(None) if self._blind.shape[0] == 1 else heads, rows]
            weights.masked_fill_(blind[..., None], 0.0)

    # -- counts -----

    def keys_per_row(self, kinds: Tensor) -> Tensor:
        """For every row how many of the marked keys it sees, (1 or heads, rows, n).

        Keys are marked in kinds, (key sets, n, keys).

        Where there are several key sets, what is visible is per head.
        """
        if self.causal:
            # Row i sees the leading keys up to i + offset: one running sum answers for all rows.
            return kinds.cumsum(-1)[..., self._offset :].transpose(1, 2)
        parts = []
        for _, block in self._blocks():
            visible = block.visible.float()
            parts.append(visible @ for_heads(kinds, len(visible)).transpose(1, 2))
        return torch.cat(parts, 1)

    def rows_per_key(self, groups: Tensor) -> Tensor:
        """For every key how many of the marked rows see it, (1 or heads, n, keys).

        Rows are marked in groups, (n, rows).
        """
        if self.causal:
            later = groups.flip(1).cumsum(1).flip(1)  # rows from this one on
            return torch.cat([later[:, :1].expand(-1, self._offset), later], 1)[None]
        total: Tensor | None = None
        for at, block in self._blocks():
            # (n, rows of the block) with (1 or heads, rows of the block, keys).
            seen = groups[:, at] @ block.visible.float()
            total = seen if total is None else total + seen
        assert total is not None
        return total

    def pairs(self, rows: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows and which pairs of a marked row and a marked key are visible.

        Args:
            rows: (rows,) bool; blocks without such a row are left out.
            keys: (1 or query heads, keys) bool.

        Yields:
            The rows, and (1 or query heads, rows, keys) bool.
        """
        for at in self._ranges():
            if bool(rows[at].any()):
                visible = self._read(at).visible
                yield at, visible & rows[at, None] & for_heads(keys, len(visible))[:, None]

    def _blocks(self) -> Iterator[tuple[slice, VisibleRows]]:
        return ((at, self._read(at)) for at in self._ranges())

    def _ranges(self) -> Iterator[slice]:
        starts = range(0, self._rows, BLOCK_ROWS)
        return (slice(start, min(start + BLOCK_ROWS, self._rows)) for start in starts)

    def _triangle(self, rows: slice) -> VisibleRows:
        column = torch.arange(self._keys, device=self._device)
        row = torch.arange(rows.start, rows.stop, device=self._device)
        return VisibleRows((column <= row[:, None] + self._offset)[None])

    def _is_triangle(self) -> bool:
        for at, block in self._blocks():
            if len(block.visible) > 1 or block.bias is not None:
                return False
            if not torch.equal(block.visible, self._triangle(at).visible):
                return False
        return True


def visible_keys(
    call: AttentionCall, sample: int, rows: slice, keys: slice, held: Tensor
) -> VisibleKeys:
    """What the rows of one sample see.

    Args:
        keys: what the keys are.
        call: the attention call.
        sample: which row of the batch.
        rows: the valid part of the call's rows; `keys` of its keys.
        held: (1 or query heads, keys of that part) bool, False for slots that hold nothing.
    """
    device = call.query.device
    size = rows.stop - rows.start, keys.stop - keys.start
    every = len(held) == 1 and bool(held.all())
    # A missing causal mask compares row i with key i. Cut to this sample it is the triangle of
    # `VisibleKeys` only if as many keys as rows are cut off in front of the common corner.
    triangle = call.causal and rows.start - keys.start == size[1] - size[0]
    everything = call.mask is None and not call.causal and size[0] == 1
    if every and (triangle or everything):
        return VisibleKeys(*size, device)
    biased = _has_bias(call, sample, rows, keys)

    def read(some: slice) -> VisibleRows:
        own = slice(rows.start + some.start, rows.start + some.stop)
        shape = (-1, some.stop - some.start, size[1])
        visible, bias = read_mask(call, own, keys, sample)
        if visible is None:
            visible = torch.ones(1, 1, *shape[1:], dtype=torch.bool, device=device)
        visible = visible[0].expand(shape)
        if not every:
            visible = visible & held[:, None]
        return VisibleRows(visible, bias[0].expand(shape) if biased and bias is not None else None)

    return VisibleKeys(*size, device, read)


def _has_bias(call: AttentionCall, sample: int, rows: slice, keys: slice) -> bool:
    """Whether a mask of numbers adds anything to the logits of visible keys."""
    for start in range(rows.start, rows.stop, BLOCK_ROWS):
        own = slice(start, min(start + BLOCK_ROWS, rows.stop))
        visible, bias = read_mask(call, own, keys, sample)
        if bias is None:  # no mask of numbers, whatever the rows
            return False
        assert visible is not None
        if bool((visible & (bias != 0)).any()):
            return True
    return False
