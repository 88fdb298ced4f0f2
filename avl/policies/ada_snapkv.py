"""Ada-SnapKV (Feng et al., NeurIPS 2025, arXiv 2407.11550)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.base import Choice, Measure, sizes
from avl.policies.checks import check_share
from avl.policies.prompt import Counts
from avl.policies.snapkv import SnapKVPolicy
from avl.selection import members


@dataclass(frozen=True, kw_only=True)
class AdaSnapKVPolicy(SnapKVPolicy):
    """SnapKV's scores, and a budget that the heads of a layer share (Ada-SnapKV).

    Feng et al., NeurIPS 2025, arXiv 2407.11550.

    Each key/value head holds its best keys up to a guaranteed part of the mean budget; the rest of
    the layer's budget goes to the best of all other keys, whatever their head. Heads whose
    attention is spread out so hold more than those that look at few keys, and what they hold is
    stored without gaps (ragged_buffer.py).

    Deviations: scores are pooled as SnapKV's are, by the mean over five keys (the released
    program's class takes the largest of seven by default); the program takes the best keys of all
    heads first and moves each head's number towards the mean by the guaranteed part, and keeps the
    window beside that; here that part is each head's for certain, the rest is free, and the window
    counts. With grouped-query attention the heads of a group are summed, and a window
    larger than the budget is cut to its newest keys. While decoding every head drops one key when
    the layer's budget is exceeded.

    Attributes:
        guaranteed: part of the mean budget that each head holds, (0, 1] (0.2 in the paper).
    """

    name: ClassVar[str] = "ada-snapkv"
    label: ClassVar[str] = "Ada-SnapKV"
    color_slot: ClassVar[int] = 17

    guaranteed: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("guaranteed", self.guaranteed)

    def choose(self, measure: Measure, counts: Sequence[Counts]) -> Choice:
        share = [self.mean_share] * len(counts)
        allowed = [self.limit(row, part) for row, part in zip(counts, share, strict=True)]
        there = sizes(measure.positions >= 0)
        kept = [min(a, n) for a, n in zip(allowed, there, strict=True)]
        masks = [self._held(scores, n) for scores, n in zip(measure.scores, kept, strict=True)]
        mask = torch.stack(masks)
        return Choice(
            always_attended=[members(mask, int(mask.sum(-1).amax()))],
            scores=measure.scores,
            evictable=kept,
            budget_share=share,
            ragged_heads=True,
        )

    def _held(self, scores: Tensor, count: int) -> Tensor:
        """Which keys of one row to hold, (heads, keys) bool.

        Args:
            scores: (heads, keys), minus infinity for what is no key.
            count: keys to hold per head, on average.
        """
        heads = scores.shape[0]
        # Keys of the window have the same score in all heads: a little less for later heads, so
        # that equal scores are told apart in the same way in every batch.
        order = torch.arange(heads, device=scores.device, dtype=torch.float64)
        ranked = scores.double() - 1e-9 * order[:, None]
        guaranteed = max(int(self.guaranteed * count), 1)
        held = torch.zeros_like(scores, dtype=torch.bool)
        held.scatter_(1, ranked.topk(guaranteed, dim=1).indices, True)
        # One list over all heads of the row: the free part of the budget goes wherever scores are
        # best.
        others = ranked.masked_fill(held, -torch.inf).flatten()
        index = others.topk(heads * (count - guaranteed)).indices
        held.view(-1)[index] = True
        return held
