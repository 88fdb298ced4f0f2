"""H2O, heavy hitters (Zhang et al., NeurIPS 2023, arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from avl.policies.budget import BudgetPolicy
from avl.policies.checks import check_share
from avl.policies.prompt import Prompt
from avl.tokens import Modality


@dataclass(frozen=True, kw_only=True)
class H2OPolicy(BudgetPolicy):
    """Keys that gathered most attention, and the newest (H2O, heavy hitters).

    Zhang et al., NeurIPS 2023, arXiv 2306.14048.

    Per key/value head; scores are weights summed over all query rows so far, and of a row's keys
    half are the newest, as in the paper. Deviation: with grouped-query attention the heads of a
    group are summed.

    Attributes:
        recent_share: part of the keys held that are the newest, [0, 1) (0.5 in the paper).
    """

    name: ClassVar[str] = "h2o"
    label: ClassVar[str] = "H2O"
    color_slot: ClassVar[int] = 5

    recent_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("recent_share", self.recent_share, zero=True)
        if self.recent_share == 1:
            raise ValueError(
                "recent_share is 1: nothing would be left to choose by attention; pass less than 1,"
                " or StreamingPolicy(sinks=0)"
            )

    @property
    def accumulates(self) -> bool:
        return True

    @property
    def per_head(self) -> bool:
        return True

    def importance(self, prompt: Prompt) -> Tensor:
        scores = prompt.row_sums(prompt.row_modality != Modality.PADDING)
        return scores if prompt.earlier_scores is None else scores + prompt.earlier_scores

    def recent(self, limit: int) -> int:
        return max(int(self.recent_share * limit), 1)

    def arrival(self, position: int) -> float:
        return 0.0
