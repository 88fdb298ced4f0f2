"""VL-Cache (Tu et al., ICLR 2025, arXiv 2410.23317)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.base import Choice, Measure
from avl.policies.budget import BudgetPolicy
from avl.policies.checks import check_share
from avl.policies.prompt import Counts, Prompt


@dataclass(frozen=True, kw_only=True)
class VLCachePolicy(BudgetPolicy):
    """More keys for denser layers, chosen by what the text sees (VL-Cache).

    Tu et al., ICLR 2025, arXiv 2410.23317.

    A layer's share is in proportion to its density, one minus the share of causal weights below
    `threshold` times the row's largest, over the text rows (post-vision attention), between 1 % and
    all keys. Within a layer keys are ranked by their weights summed over the text rows, per
    key/value head, beside the newest tenth. Deviations: shares are rescaled where the bounds cut
    them, so that their mean is the budget; a prompt without text rows is judged by its last row;
    with grouped-query attention the heads of a group are summed.

    Attributes:
        threshold: p of the paper, 1 %.
    """

    name: ClassVar[str] = "vl-cache"
    label: ClassVar[str] = "VL-Cache"
    color_slot: ClassVar[int] = 0
    deferred: ClassVar[bool] = True

    threshold: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("threshold", self.threshold)

    @property
    def per_head(self) -> bool:
        return True

    def recent(self, limit: int) -> int:
        return max(limit // 10, 1)

    def importance(self, prompt: Prompt) -> Tensor:
        return prompt.row_sums(prompt.text_rows())

    def measure(self, prompt: Prompt) -> Measure:
        return replace(super().measure(prompt), extra=self._density(prompt))

    def choices(self, measures: Sequence[Measure], counts: Sequence[Counts]) -> list[Choice]:
        # (layers, batch)
        density = torch.stack([m.extra for m in measures if m.extra is not None])
        budget = torch.tensor(self.shares_of_all(counts), device=density.device)
        shares = proportional_shares(density, budget).tolist()
        return [
            self._hold(measure, counts, self.as_shares(share, counts))
            for measure, share in zip(measures, shares, strict=True)
        ]

    def _density(self, prompt: Prompt) -> Tensor:
        """(batch,) share of weights that reach `threshold` times their row's largest.

        Over causal weights of the text rows.
        """
        rows, keys = prompt.text_rows(), prompt.positions[:, 0]
        # (batch, rows): causal keys of each row, by position, so padding and order do not matter.
        visible = ((keys[:, None] <= prompt.rows[..., None]) & (keys[:, None] >= 0)).sum(2)
        reached = torch.zeros(len(prompt.counts), device=rows.device)
        for block, weights in prompt.weights(rows):
            # Keys that a row cannot see have weight 0 and never reach the threshold.
            large = weights >= self.threshold * weights.amax(-1, keepdim=True)
            reached += (large.sum(-1).float().mean(1) * rows[:, block]).sum(1)
        return reached / (visible * rows).sum(1).clamp_min(1)


def proportional_shares(density: Tensor, budget: Tensor | float, least: float = 0.01) -> Tensor:
    """Shares of layers in proportion to their densities, within bounds and with a given mean.

    Where every share in proportion lies within its bounds, that is the answer. Else the shares that
    do not are set to their bounds, and what is left of the total is divided anew among the others.
    Setting a share to the upper bound leaves more for the others, setting one to the lower bound
    leaves less; a share bounded in one round could therefore come to lie within bounds in a later
    one. To bound only what stays bounded, each round bounds one side alone: the one on which more
    is cut off in sum (the argument is that of water-filling, or projection onto a simplex with
    bounds). A round bounds at least one layer, so there are at most as many rounds as layers.

    Args:
        density: (layers, batch), not negative.
        budget: mean share of a row over its layers, (0, 1]; (batch,), or one for all rows.
        least: lower bound of a share; the upper one is 1.

    Returns:
        (layers, batch), each in [least, 1], or in [budget, 1] where the budget is smaller.
    """
    budget = torch.as_tensor(budget, device=density.device).expand(density.shape[1])
    lower = budget.clamp_max(least)
    layers = density.shape[0]
    shares = budget.expand_as(density).clone()
    free = torch.ones_like(density, dtype=torch.bool)  # layers that are not bounded yet
    for _ in range(layers + 1):
        # What the bounded layers leave of the total, divided among the free ones by density. The
        # densities are raised to a tiny number, so that layers of density 0 share what nobody else
        # can take.
        left = budget * layers - torch.where(free, 0.0, shares).sum(0)
        weight = torch.where(free, density.clamp_min(1e-9), 0.0)
        shares = torch.where(free, weight / weight.sum(0).clamp_min(1e-9) * left, shares)
        bounded = shares.clamp_max(1.0).maximum(lower)
        # Per row: if more is cut off above than is lifted below, bounding gives budget back to the
        # others, whose shares rise: none of those above can come back within bounds. Otherwise the
        # same holds below.
        cuts_more_above = (bounded - shares).sum(0) <= 0
        newly_bounded = free & torch.where(cuts_more_above, shares > 1.0, shares < lower)
        if not bool(newly_bounded.any()):
            return bounded
        shares = torch.where(newly_bounded, bounded, shares)
        free = free & ~newly_bounded
    return shares.clamp_max(1.0).maximum(lower)
