"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.budget import TIER, BudgetPolicy
from avl.policies.checks import check_count
from avl.policies.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class SnapKVPolicy(BudgetPolicy):
    """Keys that the prompt's last rows look at (SnapKV, Li et al., NeurIPS 2024, arXiv 2404.14469).

    Per key/value head: weights summed over the rows of the observation window, average-pooled over
    neighbouring keys (the released program's defaults); the window's own keys come first.
    Deviations: with grouped-query attention the heads of a group are summed, and a window larger
    than the budget is cut to its newest keys.

    Attributes:
        window: rows of the observation window.
        kernel: width of the pooling, odd.
    """

    name: ClassVar[str] = "snapkv"
    label: ClassVar[str] = "SnapKV"
    color_slot: ClassVar[int] = 6

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1, "the rows that choose")
        check_count("kernel", self.kernel, 1, "1 does not pool")
        if self.kernel % 2 == 0:
            raise ValueError(
                f"kernel must be odd, so that pooling keeps every key's place; got {self.kernel}"
            )

    @property
    def per_head(self) -> bool:
        return True

    def importance(self, prompt: Prompt) -> Tensor:
        scores = prompt.row_sums(prompt.newest(self.window))
        pooled = torch.nn.functional.avg_pool1d(
            scores, self.kernel, stride=1, padding=self.kernel // 2
        )
        first = torch.tensor([c.tokens - self.window for c in prompt.counts], device=pooled.device)[
            :, None, None
        ]
        own = (prompt.places >= first).expand_as(pooled)
        return torch.where(own, TIER + prompt.positions, pooled)
