"""Image keys at even distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.budget import BudgetPolicy, tiered
from avl.policies.prompt import Prompt
from avl.tokens import Modality


@dataclass(frozen=True, kw_only=True)
class StridePolicy(BudgetPolicy):
    """Image keys at even distances: what simply showing a coarser picture would keep.

    Keys are kept in the order of the base-2 radical inverse of their number, so that for every
    budget they are spread evenly (every second for 1/2, every fourth for 1/4), and stay so when
    keys are dropped one by one.
    """

    name: ClassVar[str] = "stride"
    label: ClassVar[str] = "stride"
    color_slot: ClassVar[int] = 3

    def importance(self, prompt: Prompt) -> Tensor:
        image = prompt.modality == Modality.IMAGE
        place = torch.where(
            image.any(-1, keepdim=True) & image, image.long().cumsum(-1) - 1, prompt.places
        )
        inverse = torch.zeros_like(place, dtype=torch.float32)
        for bit in range(20):
            inverse += ((place >> bit) & 1) * 0.5 ** (bit + 1)
        return tiered(-inverse, prompt)
