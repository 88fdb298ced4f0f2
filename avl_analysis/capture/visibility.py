"""Which keys each query row of one sample may attend to, whatever form transformers gave the mask.

Masks come as nothing at all (causal, or a single row), as booleans, as numbers to add, or, for
flash kernels, as one flag per key. All become one boolean matrix here. It is the same for all
layers of a pass that share a mask, so the recorder makes it once per pass; the number of keys that
a row sees, and of rows that see a key, are counted from it once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from avl.attention import AttentionCall
from avl_analysis.statistics.inputs import for_heads


class VisibleKeys:
    """Rows and keys of one sample, cut to the valid ones.

    Attributes:
        visible: (1 or query heads, rows, keys) bool.
        bias: (1 or query heads, rows, keys) float32 added to the logits, None if there is none.
        causal: whether `visible` is exactly the lower triangle that ends in the last corner.
    """

    def __init__(self, visible: Tensor, bias: Tensor | None = None) -> None:
        self.visible, self.bias = visible, bias
        heads, rows, keys = visible.shape
        self._offset = keys - rows
        self.causal = heads == 1 and bias is None and _is_triangle(visible[0], self._offset)
        if not self.causal:
            seen = visible.any(0)
            self._first = seen.int().argmax(1).tolist()
            self._end = (keys - seen.flip(1).int().argmax(1)).tolist()
            self._blind = ~visible.any(-1)
            self._some_blind = bool(self._blind.any())

    def span(self, rows: slice) -> slice:
        """Keys outside of which none of these rows sees anything."""
        if self.causal:
            return slice(0, rows.stop + self._offset)
        return slice(min(self._first[rows]), max(self._end[rows]))

    def hide(self, logits: Tensor, heads: slice, rows: slice, span: slice) -> None:
        """Put -inf where a key may not be attended, in place; logits (heads, rows, keys of the
        span).
        """
        if self.causal:
            if rows.stop - rows.start == 1:  # its span ends with the last key it sees
                return
            corner = ~self.visible[:, rows, span.stop - (rows.stop - rows.start) : span.stop]
            logits[..., -corner.shape[-1] :].masked_fill_(corner, -torch.inf)
            return
        shared = self.visible.shape[0] == 1
        if self.bias is not None:
            logits += self.bias[slice(None) if self.bias.shape[0] == 1 else heads, rows, span]
        logits.masked_fill_(~self.visible[slice(None) if shared else heads, rows, span], -torch.inf)

    def clear_blind(self, weights: Tensor, heads: slice, rows: slice) -> None:
        """Rows that see no key at all have zero weights, not NaN; in place."""
        if not self.causal and self._some_blind:
            blind = self._blind[slice(None) if self._blind.shape[0] == 1 else heads, rows]
            weights.masked_fill_(blind[..., None], 0.0)

    def keys_per_row(self, kinds: Tensor) -> Tensor:
        """(1 or heads, rows, n): for every row how many of the keys marked in kinds, (key sets, n,
        keys), it sees.

        Where there are several key sets, `visible` is per head.
        """
        return torch.cat(
            [block @ for_heads(kinds, len(block)).transpose(1, 2) for block in self._blocks()], 1
        )

    def rows_per_key(self, groups: Tensor) -> Tensor:
        """(1 or heads, n, keys): for every key how many of the rows marked in groups, (n, rows),
        see it.
        """
        total = torch.zeros(
            self.visible.shape[0], groups.shape[0], self.visible.shape[2], device=groups.device
        )
        start = 0
        for block in self._blocks():
            total += groups[:, start : start + block.shape[1]] @ block
            start += block.shape[1]
        return total

    def _blocks(self) -> Iterator[Tensor]:
        return (block.float() for block in self.visible.split(256, 1))


def _is_triangle(visible: Tensor, offset: int) -> bool:
    rows, keys = visible.shape
    if offset < 0:
        return False
    if rows == 1:  # the last row of a triangle is all there is of it
        return bool(visible.all())
    column, row = (
        torch.arange(keys, device=visible.device),
        torch.arange(rows, device=visible.device),
    )
    return bool((visible == (column <= row[:, None] + offset)).all())


def sight(call: AttentionCall, sample: int, rows: slice, keys: slice, held: Tensor) -> VisibleKeys:
    """What the rows of one sample see.

    Args:
        rows, keys: the valid part of the call's rows and keys.
        held: (1 or query heads, keys of that part) bool, False for slots that hold nothing.
    """
    mask, (_, _, count, _) = call.mask, call.query.shape
    row = torch.arange(count, device=call.query.device)[rows, None]
    column = torch.arange(call.key.shape[2], device=call.query.device)[keys]
    bias = None
    if mask is None:
        visible = (column <= row)[None] if call.causal else torch.ones_like(column <= row)[None]
    elif (
        mask.dim() == 2
    ):  # flash kernels: flags of the keys; the kernel itself is causal, aligned at the last corner
        visible = mask[sample, keys].bool().expand(1, len(row), -1)
        if count > 1:
            visible = visible & (column <= row + call.key.shape[2] - count)
    else:
        mine = mask[
            min(sample, mask.shape[0] - 1), :, rows if mask.shape[2] > 1 else slice(None), keys
        ]
        mine = mine.expand(-1, len(row), -1)
        visible = mine if mine.dtype == torch.bool else mine > torch.finfo(mine.dtype).min / 2
        if mine.dtype != torch.bool:
            added = mine.float().masked_fill(~visible, 0.0)
            bias = added if bool(added.any()) else None
    if len(held) > 1 or not bool(held.all()):
        visible = visible & held[:, None]
    return VisibleKeys(visible, bias)
