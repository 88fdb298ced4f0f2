"""Baselines under one byte budget: of the keys the stock cache would hold, each row keeps a given share.

`budget` covers *all* keys, the prompt's and the generated ones, and holds at every moment: with n true tokens seen (no
padding), every row holds `int(budget * n)` keys per layer and key/value head, at least one; where layers differ, that
is their mean. So when the answer grows, the worst-ranked key gives way now and then, in every policy alike. The papers
mostly compress the prompt once and let generated keys come on top; at equal bytes that would favour whoever compresses
the prompt harder, so it is changed here for all of them.

A policy's score says which key matters more; ties of meaning are settled by tiers: image keys go first where a method
prunes images only, then text and system keys; generated keys go last, oldest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from avl.policies.base import Choice, Counts, Measure, Policy, Prompt, all_keys


@dataclass(frozen=True)
class FullPolicy(Policy):
    """Everything held, everything attended: the neutral element, with this project's buffers instead of stock ones."""

    def measure(self, prompt: Prompt) -> Measure:
        return Measure(prompt.layer, prompt.positions, prompt.modality, prompt.positions)

    def choose(self, measure: Measure, counts: Sequence[Counts], share: Sequence[float]) -> Choice:
        return Choice(rest=[all_keys(measure)], share=share)
