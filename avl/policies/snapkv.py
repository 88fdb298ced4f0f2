"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.budget import TIER, BudgetPolicy
from avl.policies.checks import check_count, warn_if_longer
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
        return self.window_first(prompt, self.window_weights(prompt))

    def window_weights(self, prompt: Prompt) -> Tensor:
        """Weights summed over the window's rows and pooled over neighbouring keys.

        Returns:
            (batch, key/value heads, keys).
        """
        tokens = [row.tokens for row in prompt.counts]
        warn_if_longer("window", self.window, tokens, "its newest keys are held and nothing ranked")
        weights = prompt.row_sums(prompt.newest(self.window))
        return torch.nn.functional.avg_pool1d(
            weights, self.kernel, stride=1, padding=self.kernel // 2
        )

    def window_first(self, prompt: Prompt, scores: Tensor) -> Tensor:
        """Scores by which the window's own keys go last, oldest first among them."""
        return torch.where(self.in_window(prompt), TIER + prompt.positions, scores)

    def in_window(self, prompt: Prompt) -> Tensor:
        """(batch, heads, keys) bool: the newest `window` keys of each row."""
        starts = [row.tokens - self.window for row in prompt.counts]
        return prompt.places >= torch.tensor(starts, device=prompt.places.device)[:, None, None]
