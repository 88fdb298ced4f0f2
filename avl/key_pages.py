"""Bounds on the keys of pages: what a query can at most make of any key in it.

Consecutive tokens of a row form pages of equal size, numbered from the row's first true token. For
each page the smallest and largest number of every channel of its keys is kept (Quest, Tang et al.,
ICML 2024, arXiv 2406.10774); a query's product with any key of the page is at most the sum over
channels of the larger of its products with the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class KeyPages:
    """Smallest and largest numbers of the pages of one layer.

    Attributes:
        size: keys of a page.
        first: (batch, 1, 1) sequence index of each row's first token.
        low: (batch, key/value heads, pages, key width), infinite where a page has no key yet.
        high: the same, minus infinity where a page has no key yet.
    """

    size: int
    first: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, keys: Tensor, positions: Tensor, size: int) -> KeyPages:
        """Pages of keys of which none is missing.

        Args:
            keys: (batch, key/value heads, n, width).
            positions: (batch, 1, n) sequence index of each, -1 for none.
            size: keys of a page.
        """
        last = torch.iinfo(positions.dtype).max
        first = positions.masked_fill(positions < 0, last).amin(2, keepdim=True)
        count = int((positions - first).amax()) // size + 1
        shape = (*keys.shape[:2], count, keys.shape[3])
        pages = cls(size, first, keys.new_full(shape, torch.inf), keys.new_full(shape, -torch.inf))
        pages._include(keys, positions)
        return pages

    @property
    def count(self) -> int:
        """Pages of the row with most of them."""
        return self.low.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the bounds of all rows."""
        return self.low.nbytes + self.high.nbytes

    def page_of(self, positions: Tensor) -> Tensor:
        """Number of the page of each position, (batch, 1, n); -1 for none."""
        pages = torch.div(positions - self.first, self.size, rounding_mode="floor")
        return pages.masked_fill(positions < 0, -1)

    def add(self, key: Tensor, position: int) -> None:
        """Take the key of a new token, (batch, key/value heads, 1, width), into its page."""
        positions = torch.full_like(self.first, position)
        needed = int(self.page_of(positions).amax()) + 1
        if needed > self.count:
            shape = (*self.low.shape[:2], needed - self.count, self.low.shape[3])
            self.low = torch.cat([self.low, self.low.new_full(shape, torch.inf)], 2)
            self.high = torch.cat([self.high, self.high.new_full(shape, -torch.inf)], 2)
        self._include(key, positions)

    def _include(self, keys: Tensor, positions: Tensor) -> None:
        # Reducing into (batch, heads, pages, width); keys that are none go to page 0 with numbers
        # that change neither its least nor its largest.
        page = self.page_of(positions)
        none = (page < 0)[..., None]
        index = page.clamp_min(0)[..., None].expand_as(keys)
        self.low.scatter_reduce_(2, index, keys.masked_fill(none, torch.inf), "amin")
        self.high.scatter_reduce_(2, index, keys.masked_fill(none, -torch.inf), "amax")

    def bounds(self, query: Tensor) -> Tensor:
        """Upper bound of the products of queries with any key of each page.

        Args:
            query: (batch, query heads, width), a multiple of the key/value heads.

        Returns:
            (batch, key/value heads, pages) float32, the largest over the query heads of a group;
            minus infinity for pages without a key.
        """
        heads = self.low.shape[1]
        # (batch, key/value heads, group, 1, width) against (batch, key/value heads, 1, pages,
        # width)
        grouped = query.float().view(query.shape[0], heads, -1, 1, query.shape[2])
        low, high = self.low.float()[:, :, None], self.high.float()[:, :, None]
        empty = torch.isinf(self.low[..., 0])
        # 0 * inf is not a number; pages without a key are left out below.
        low, high = low.nan_to_num(0, 0, 0), high.nan_to_num(0, 0, 0)
        # A channel's product with any key of the page lies between these two; a page is read if it
        # may matter to any head of the group.
        bounds = torch.maximum(grouped * low, grouped * high).sum(-1).amax(2)
        return bounds.masked_fill(empty, -torch.inf)

    def select(self, rows: Tensor) -> None:
        """Row i of the batch now is what was row rows[i]."""
        for name in ("first", "low", "high"):
            setattr(self, name, getattr(self, name).index_select(0, rows))
