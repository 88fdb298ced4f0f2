"""Quest (Tang et al., ICML 2024, arXiv 2406.10774)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from avl.policies.base import Choice, Measure, PagedPolicy, all_keys
from avl.policies.checks import check_count, check_share
from avl.policies.prompt import Counts, Prompt


@dataclass(frozen=True, kw_only=True)
class QuestPolicy(PagedPolicy):
    """Everything held; each step reads the pages its query may need (Quest).

    Tang et al., ICML 2024, arXiv 2406.10774.

    A page is `page_size` consecutive tokens; its worth is the largest product the query can have
    with keys between the page's smallest and largest numbers, channel by channel. At every decode
    step a layer reads the newest page and as many of the best others as the budget of keys allows,
    per key/value head. The first `dense_layers` layers read everything, as in the paper. Its budget
    is therefore one of keys read, not of bytes: all keys are held, and the pages' numbers beside
    them.

    Deviations: with grouped-query attention a page's worth is the largest over the query heads of a
    group, where the released program lets every query head choose for itself; the newest page is
    always read, and counts; the program reads at least three pages whatever the budget.

    Attributes:
        budget: share of the keys that a layer reads at a step, (0, 1].
        budget_tokens: image tokens that could be read beside all system and text tokens; takes the
            place of `budget`. None: `budget` counts.
        page_size: tokens of a page (16 in the paper).
        dense_layers: layers that read everything (2 in the paper).
    """

    name: ClassVar[str] = "quest"
    label: ClassVar[str] = "Quest"
    color_slot: ClassVar[int] = 13

    budget: float = 0.5
    budget_tokens: int | None = None
    page_size: int = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        if self.budget_tokens is not None:
            check_count("budget_tokens", self.budget_tokens, 0, "image tokens beside all text")
        check_count("page_size", self.page_size, 1, "1 ranks keys one by one")
        check_count("dense_layers", self.dense_layers, 0, "0 reads pages in every layer")

    @classmethod
    def for_budget(cls, budget: float) -> QuestPolicy:
        return cls(budget=budget)

    @classmethod
    def for_image_tokens(cls, tokens: int, of: int) -> QuestPolicy:
        return cls(budget_tokens=min(tokens, of))

    def measure(self, prompt: Prompt) -> Measure:
        return Measure(prompt.layer, prompt.positions, prompt.modality, prompt.positions)

    def choose(self, measure: Measure, counts: Sequence[Counts]) -> Choice:
        size = 0 if measure.layer < self.dense_layers else self.page_size
        return Choice(always_attended=[all_keys(measure)], page_size=size)

    def read_limit(self, counts: Counts) -> int:
        if self.budget_tokens is None:
            return int(self.budget * counts.tokens)
        return counts.system + counts.text + min(self.budget_tokens, counts.image)
