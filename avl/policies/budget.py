"""Baselines under one byte budget.

Of the keys the stock cache would hold, each row keeps a given share.

`budget` covers *all* keys, the prompt's and the generated ones, and holds at every moment: with n
true tokens seen (no padding), every row holds `int(budget * n)` keys per layer and key/value head,
at least one; where layers differ, that is their mean. So when the answer grows, the worst-ranked
key is dropped now and then, in every policy alike. Most papers compress the prompt once and let
generated keys come on top; at equal bytes that would favour methods which compress the prompt
harder, so it is changed here for all of them. A later turn ranks all keys that are left anew.

`budget_tokens` says the same in image tokens, as papers on pruning them do: every row holds as many
keys as it would if so many of its image tokens were left beside all its text. Which keys these are
is the policy's choice.

A policy says how important each key of a layer is (`importance`), or, where keys of the prompt and
of the answer compete, what makes them so. Where a method prunes images only, its scores are put in
tiers: image keys go first, then the prompt's other keys, then generated ones, oldest first. Byte
budgets count keys and values; positions and scores are reported beside them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avl.policies.base import Choice, Measure, Policy, sizes
from avl.policies.checks import check_count, check_share
from avl.policies.prompt import Counts, Prompt
from avl.selection import newest_and_best
from avl.tokens import Modality

TIER = float(2**20)
"""Distance between tiers of scores: within a tier scores are ranks below it, and sums of a few
tiers stay exact in float32.
"""


@dataclass(frozen=True, kw_only=True)
class BudgetPolicy(Policy):
    """Base of the baselines: hold the most important keys, as many as the budget allows.

    Attributes:
        budget: share of the full cache's keys, (0, 1].
        budget_tokens: image tokens that could be held beside all system and text tokens, >= 0;
            takes the place of `budget`. None: `budget` counts.
    """

    budget: float = 0.5
    budget_tokens: int | None = None

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        if self.budget_tokens is not None:
            check_count("budget_tokens", self.budget_tokens, 0, "image tokens beside all text")

    @classmethod
    def for_budget(cls, budget: float) -> BudgetPolicy:
        return cls(budget=budget)

    @classmethod
    def for_image_tokens(cls, tokens: int, of: int) -> BudgetPolicy:
        return cls(budget_tokens=min(tokens, of))

    @abstractmethod
    def importance(self, prompt: Prompt) -> Tensor:
        """Importance of every key, (batch, 1 or key/value heads, keys); higher is kept longer.

        What is no key may have any value.
        """

    def measure(self, prompt: Prompt) -> Measure:
        scores = self.importance(prompt).masked_fill(prompt.positions < 0, -torch.inf)
        return Measure(prompt.layer, prompt.positions, prompt.modality, scores)

    def choose(self, measure: Measure, counts: Sequence[Counts]) -> Choice:
        return self._hold(measure, counts, [self.mean_share] * len(counts))

    def _hold(self, measure: Measure, counts: Sequence[Counts], share: Sequence[float]) -> Choice:
        """Hold a share of the keys of each row: its newest ones, and the best of the others.

        Args:
            measure: of the layer.
            counts: tokens of the rows.
            share: per row, as `limit` takes it.
        """
        allowed = [self.limit(c, s) for c, s in zip(counts, share, strict=True)]
        kept = [min(a, n) for a, n in zip(allowed, sizes(measure.positions >= 0), strict=True)]
        recent = [self.recent(k) for k in kept]
        # Ascending, which moves -1 to the front and leaves the keys in the order of their tokens.
        index = newest_and_best(measure.scores, measure.positions, kept, recent).sort(-1).values
        return Choice(
            always_attended=[index], scores=measure.scores, evictable=kept, budget_share=share
        )

    @property
    def mean_share(self) -> float:
        """What `limit` is given where all layers hold equally many keys."""
        return self.budget if self.budget_tokens is None else 1.0

    def limit(self, counts: Counts, share: float) -> int:
        """Most keys a row may hold.

        Args:
            counts: tokens of the row so far.
            share: of all its keys; under `budget_tokens`, of the keys it may hold on average.
        """
        return max(int(share * self._basis(counts)), 1)

    def _basis(self, counts: Counts) -> int:
        """What the share of `limit` is a share of."""
        if self.budget_tokens is None:
            return counts.tokens
        return counts.system + counts.text + min(self.budget_tokens, counts.image)

    def shares_of_all(self, counts: Sequence[Counts]) -> list[float]:
        """Share of all its keys that each row may hold, mean over layers."""
        if self.budget_tokens is None:
            return [self.budget] * len(counts)
        return [self._basis(row) / max(row.tokens, 1) for row in counts]

    def as_shares(self, shares_of_all: Sequence[float], counts: Sequence[Counts]) -> list[float]:
        """Shares of all keys of each row as the shares that `limit` takes.

        Args:
            shares_of_all: per row.
            counts: tokens of the rows.
        """
        if self.budget_tokens is None:
            return list(shares_of_all)
        return [
            share * row.tokens / max(self._basis(row), 1)
            for share, row in zip(shares_of_all, counts, strict=True)
        ]

    def images_beside_text(self, counts: Counts) -> int:
        """Image tokens of a row that fit into its budget beside all system and text tokens."""
        left = self.limit(counts, self.mean_share) - counts.system - counts.text
        return min(max(left, 0), counts.image)

    def arrival(self, position: int) -> float:
        # Generated keys rank above both tiers of the prompt and among themselves by age.
        return 2 * TIER + position


def tiered(scores: Tensor, prompt: Prompt) -> Tensor:
    """Ranks instead of scores.

    Image keys below all other keys of the prompt, so that they go first.
    """
    scores = scores.expand(-1, prompt.positions.shape[1], -1)
    # The second argsort turns an order into ranks; stable, so that equal scores keep the earlier
    # token's rank lower.
    rank = scores.argsort(dim=-1, stable=True).argsort(dim=-1).float()
    return rank + TIER * (prompt.modality != Modality.IMAGE)
