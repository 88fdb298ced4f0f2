"""StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.budget import TIER, BudgetPolicy
from avl.policies.checks import check_count
from avl.policies.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class StreamingPolicy(BudgetPolicy):
    """The first tokens and the newest ones (StreamingLLM).

    Xiao et al., ICLR 2024, arXiv 2309.17453.

    Deviation: keys keep the rotary position they were computed at, where the paper renumbers them
    within the cache.

    Attributes:
        sinks: first tokens that are always held (4 in the paper).
    """

    name: ClassVar[str] = "streaming"
    label: ClassVar[str] = "StreamingLLM"
    color_slot: ClassVar[int] = 4

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sinks", self.sinks, 0, "0 keeps only the newest tokens")

    def importance(self, prompt: Prompt) -> Tensor:
        first = 4 * TIER - prompt.places
        return torch.where(prompt.places < self.sinks, first, prompt.positions.float())

    def arrival(self, position: int) -> float:
        return float(position)
