"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from avl.policies.base import Choice, Measure
from avl.policies.budget import BudgetPolicy, tiered
from avl.policies.checks import check_count
from avl.policies.prompt import Counts, Prompt


@dataclass(frozen=True, kw_only=True)
class FastVPolicy(BudgetPolicy):
    """Image tokens leave the prompt after an early layer (FastV).

    Chen et al., ECCV 2024, arXiv 2403.06764.

    Ranked by the last row's weights in that layer, mean over heads, as in the released program.
    Deviations: the early layers' caches are cut to the tokens that go on, too, so that a budget
    means the same in every layer; a later turn's prompt passes in full and each layer ranks for
    itself.

    Attributes:
        prefill_layer: number of layers that see the whole prompt (K = 2 in the paper).
    """

    name: ClassVar[str] = "fastv"
    label: ClassVar[str] = "FastV"
    color_slot: ClassVar[int] = 7
    deferred: ClassVar[bool] = True

    prefill_layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(
            "prefill_layer",
            self.prefill_layer,
            1,
            "the ranking needs at least one layer's attention",
        )

    @property
    def filter_layer(self) -> int:
        return self.prefill_layer

    def filter_count(self, counts: Counts) -> int:
        return self.images_beside_text(counts)

    def importance(self, prompt: Prompt) -> Tensor:
        return tiered(self.rank(prompt.last_row())[:, None], prompt)

    def choices(self, measures: Sequence[Measure], counts: Sequence[Counts]) -> list[Choice]:
        # The layers before the filter hold keys of tokens that later leave; by the filter layer's
        # ranking they drop the same ones.
        ranking = {m.layer: m.scores for m in measures}.get(self.prefill_layer - 1)
        early = [m.layer < self.prefill_layer - 1 and ranking is not None for m in measures]
        return [
            self.choose(replace(m, scores=ranking) if e else m, counts)
            for m, e in zip(measures, early, strict=True)
        ]
