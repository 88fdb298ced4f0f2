"""PrefixKV (Wang et al., 2024, arXiv 2412.03409)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.base import Choice, Measure
from avl.policies.budget import TIER, BudgetPolicy
from avl.policies.checks import check_count
from avl.policies.prompt import Counts, Prompt
from avl.tokens import Modality

_HALVINGS = 40  # of the interval of the common share; more than float32 can tell apart


@dataclass(frozen=True, kw_only=True)
class PrefixKVPolicy(BudgetPolicy):
    """Every layer holds the keys of one common share of its attention (PrefixKV).

    Wang et al., 2024, arXiv 2412.03409.

    A key's importance in a layer is its weights summed over all query rows, mean over heads. Each
    layer holds the shortest prefix of its ranking whose importance reaches a share of the sum that
    is common to all layers; the share is found by bisection so that the layers together hold the
    budget. The first `sinks` keys and the newest are held before others, as in the released
    program.

    Deviations: the program finds the sizes beforehand on ten samples and uses them for all prompts,
    here they are found for the prompt at hand; the keys held before others count among a layer's
    keys and are not added to them; while decoding, the worst-ranked key is dropped, where the
    program drops the key at a fixed distance from the end.

    Attributes:
        sinks: first tokens that are held before others (4 in the program).
    """

    name: ClassVar[str] = "prefixkv"
    label: ClassVar[str] = "PrefixKV"
    color_slot: ClassVar[int] = 10
    deferred: ClassVar[bool] = True

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sinks", self.sinks, 0, "0 treats the first keys like others")

    def importance(self, prompt: Prompt) -> Tensor:
        rows = prompt.row_modality != Modality.PADDING
        return prompt.row_sums(rows).mean(1, keepdim=True)

    def measure(self, prompt: Prompt) -> Measure:
        measure = super().measure(prompt)
        mass = measure.scores[:, 0].clamp_min(0.0)  # what is no key has no mass
        # Above all sums of weights, earlier tokens higher.
        first = 2 * TIER - prompt.places
        scores = torch.where(prompt.places < self.sinks, first, measure.scores)
        scores = scores.masked_fill(prompt.positions < 0, -torch.inf)
        return Measure(measure.layer, measure.positions, measure.modality, scores, mass)

    def choices(self, measures: Sequence[Measure], counts: Sequence[Counts]) -> list[Choice]:
        sizes = self._sizes(measures, counts)
        tokens = torch.tensor([row.tokens for row in counts], device=sizes.device)
        shares = ((sizes.double() + 1e-3) / tokens).tolist()  # truncation gives the size again
        return [
            self._hold(measure, counts, self.as_shares(share, counts))
            for measure, share in zip(measures, shares, strict=True)
        ]

    def _sizes(self, measures: Sequence[Measure], counts: Sequence[Counts]) -> Tensor:
        """(layers, batch) keys of each layer."""
        # (layers, batch)
        held = torch.stack([(m.positions[:, 0] >= 0).sum(1) for m in measures])
        shares = torch.tensor(self.shares_of_all(counts), device=held.device)
        tokens = torch.tensor([row.tokens for row in counts], device=held.device)
        budget = (shares * tokens * len(measures)).floor()
        masses = [measure.extra for measure in measures if measure.extra is not None]
        # In double precision: sums of many small weights decide between sizes that differ by one
        # key.
        ranked = [mass.double().sort(-1, descending=True).values.cumsum(-1) for mass in masses]
        cumulative = [mass / mass[:, -1:].clamp_min(1e-12) for mass in ranked]

        def sizes(share: Tensor) -> Tensor:
            """(layers, batch) keys whose importance reaches a share, (batch,), of the sum."""
            below = [(mass < share[:, None]).sum(1) + 1 for mass in cumulative]
            return torch.stack(below).minimum(held)

        low = torch.zeros_like(budget, dtype=torch.float64)
        high = torch.full_like(low, 1.0 + 2.0**-20)  # above 1: all keys, those of no weight too
        for _ in range(_HALVINGS):
            # Sizes grow with the share, so the largest share that fits is found by halving.
            middle = (low + high) / 2
            fits = sizes(middle).sum(0) <= budget
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        everything = held.sum(0) <= budget
        return torch.where(everything, held, sizes(low))
