"""MixKV (Liu et al., ICLR 2026, arXiv 2510.20707)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.prompt import Prompt
from avl.policies.snapkv import SnapKVPolicy


@dataclass(frozen=True, kw_only=True)
class MixKVPolicy(SnapKVPolicy):
    """Importance mixed with diversity, head by head, by how redundant its keys are (MixKV).

    Liu et al., ICLR 2026, arXiv 2510.20707.

    Importance is SnapKV's pooled weights plus the length of the key's value vector; diversity is
    minus the cosine between a key and the head's mean key. Lengths and diversity are brought to
    [0, 1] by their smallest and largest value in the head and scaled to the mean of the weights.
    With `r` the head's redundancy, the score is `r * diversity + (1 - r) * importance`. The newest
    `window` keys are held before others, and take part in none of these numbers.

    Deviations: `r` is the mean cosine between two keys of the head in the prompt at hand (the
    released program measures it beforehand on samples), at least 0; with grouped-query attention
    the weights of a group's heads are summed; a window larger than the budget is cut to its newest
    keys.
    """

    name: ClassVar[str] = "mixkv"
    label: ClassVar[str] = "MixKV"
    color_slot: ClassVar[int] = 11

    def importance(self, prompt: Prompt) -> Tensor:
        weights = self.window_weights(prompt)
        ranked = (prompt.positions >= 0) & ~self.in_window(prompt)
        ranked = ranked.expand_as(weights)
        # (batch, key/value heads, keys, width)
        unit = torch.nn.functional.normalize(prompt.keys.float(), dim=-1)
        unit = unit.masked_fill(~ranked[..., None], 0.0)
        total = unit.sum(2, keepdim=True)
        diversity = -(unit * torch.nn.functional.normalize(total, dim=-1)).sum(-1)
        lengths = prompt.values.float().norm(dim=-1)
        scale = _mean(weights, ranked)
        importance = weights + _matched(lengths, ranked, scale)
        redundancy = _mean_cosine(total, ranked)
        mixed = redundancy * _matched(diversity, ranked, scale) + (1 - redundancy) * importance
        return self.window_first(prompt, mixed)


def _mean(numbers: Tensor, ranked: Tensor) -> Tensor:
    """(batch, heads, 1) mean over the keys that are ranked, 0 where there are none."""
    total = numbers.masked_fill(~ranked, 0.0).sum(-1, keepdim=True)
    return total / ranked.sum(-1, keepdim=True).clamp_min(1)


def _matched(numbers: Tensor, ranked: Tensor, mean: Tensor) -> Tensor:
    """Numbers brought to [0, 1] and scaled to a mean.

    Args:
        numbers: (batch, heads, keys).
        ranked: (batch, heads, keys) bool, keys that take part.
        mean: (batch, heads, 1).
    """
    low = numbers.masked_fill(~ranked, torch.inf).amin(-1, keepdim=True)
    high = numbers.masked_fill(~ranked, -torch.inf).amax(-1, keepdim=True)
    # Without a ranked key low and high are infinite and the quotient is no number; it is masked
    # next.
    scaled = (numbers - low) / (high - low).clamp_min(1e-12)
    scaled = scaled.masked_fill(~ranked, 0.0)
    return scaled * mean / _mean(scaled, ranked).clamp_min(1e-12)


def _mean_cosine(total: Tensor, ranked: Tensor) -> Tensor:
    """(batch, heads, 1) mean cosine between two different keys, at least 0.

    The squared length of the sum of n unit vectors is n plus the sum over the pairs of different
    ones.

    Args:
        total: (batch, heads, 1, width) sum of the unit keys.
        ranked: (batch, heads, keys) bool, keys that are in the sum.
    """
    count = ranked.sum(-1, keepdim=True)
    pairs = (count * (count - 1)).clamp_min(1)
    return ((total.square().sum(-1) - count) / pairs).clamp(0.0, 1.0)
