"""Image keys drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.budget import BudgetPolicy, tiered
from avl.policies.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class RandomPolicy(BudgetPolicy):
    """Image keys drawn at random, another draw for every layer: the floor under every selection.

    Attributes:
        seed: of the draws. A row draws the same in a batch as alone.
    """

    name: ClassVar[str] = "random"
    label: ClassVar[str] = "random"
    color_slot: ClassVar[int] = 2

    seed: int = 0

    def importance(self, prompt: Prompt) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10_007 + prompt.layer)
        draws = torch.rand(int(prompt.positions.max()) + 1, generator=generator).to(
            prompt.positions.device
        )
        return tiered(draws[prompt.places], prompt)
