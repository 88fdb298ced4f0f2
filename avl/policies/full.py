"""The full cache as a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from avl.policies.base import Choice, Measure, Policy, all_keys
from avl.policies.prompt import Counts, Prompt


@dataclass(frozen=True, kw_only=True)
class FullPolicy(Policy):
    """Everything held, everything attended.

    The neutral element, with this package's buffers instead of stock ones.
    """

    name: ClassVar[str] = "full"
    label: ClassVar[str] = "full cache"
    color_slot: ClassVar[int] = 0

    def measure(self, prompt: Prompt) -> Measure:
        return Measure(prompt.layer, prompt.positions, prompt.modality, prompt.positions)

    def choose(self, measure: Measure, counts: Sequence[Counts]) -> Choice:
        return Choice(always_attended=[all_keys(measure)])
