"""Baselines under one byte budget: of the keys the stock cache would hold, each row keeps a given
share.

`budget` covers *all* keys, the prompt's and the generated ones, and holds at every moment: with n
true tokens seen (no padding), every row holds `int(budget * n)` keys per layer and key/value head,
at least one; where layers differ, that is their mean. So when the answer grows, the worst-ranked
key gives way now and then, in every policy alike. Most papers compress the prompt once and let
generated keys come on top; at equal bytes that would favour whoever compresses the prompt harder,
so it is changed here for all of them. A later turn ranks all keys that are left anew.

A policy says how important each key of a layer is (`importance`), or, where keys of the prompt and
of the answer compete, what makes them so. Where a method prunes images only, its scores are put in
tiers: image keys go first, then the prompt's other keys, then generated ones, oldest first. Byte
budgets count keys and values; positions and scores are reported beside them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.base import Choice, Counts, Measure, Policy, Prompt, all_keys, sizes
from avl.policies.checks import check_count, check_share
from avl.selection import newest_and_best
from avl.tokens import Modality

_TIER = float(
    2**20
)  # scores of one tier are ranks below this; sums of a few tiers stay exact in float32


@dataclass(frozen=True)
class FullPolicy(Policy):
    """Everything held, everything attended: the neutral element, with this project's buffers
    instead of stock ones.
    """

    def measure(self, prompt: Prompt) -> Measure:
        return Measure(prompt.layer, prompt.positions, prompt.modality, prompt.positions)

    def choose(self, measure: Measure, counts: Sequence[Counts]) -> Choice:
        return Choice(rest=[all_keys(measure)])


@dataclass(frozen=True)
class BudgetPolicy(Policy):
    """Base of the baselines: hold the most important keys, as many as the budget allows.

    Attributes:
        budget: share of the full cache's keys, (0, 1].
    """

    budget: float = 0.5

    def __post_init__(self) -> None:
        check_share("budget", self.budget)

    @abstractmethod
    def importance(self, prompt: Prompt) -> Tensor:
        """(batch, 1 or key/value heads, keys), higher = more important; what is no key may have any
        value.
        """

    def measure(self, prompt: Prompt) -> Measure:
        scores = self.importance(prompt).masked_fill(prompt.positions < 0, -torch.inf)
        return Measure(prompt.layer, prompt.positions, prompt.modality, scores)

    def choose(self, measure: Measure, counts: Sequence[Counts]) -> Choice:
        return self._hold(measure, counts, [self.budget] * len(counts))

    def _hold(self, measure: Measure, counts: Sequence[Counts], share: Sequence[float]) -> Choice:
        allowed = [self.limit(c, s) for c, s in zip(counts, share, strict=True)]
        kept = [min(a, n) for a, n in zip(allowed, sizes(measure.positions >= 0), strict=True)]
        recent = [self.recent(k) for k in kept]
        index = newest_and_best(measure.scores, measure.positions, kept, recent).sort(-1).values
        return Choice(rest=[index], scores=measure.scores, evictable=kept, share=share)

    def limit(self, counts: Counts, share: float) -> int:
        return max(int(share * counts.tokens), 1)

    def arrival(self, position: int) -> float:
        return 2 * _TIER + position


@dataclass(frozen=True)
class RandomPolicy(BudgetPolicy):
    """Image keys drawn at random, another draw for every layer: the floor under every selection.

    Attributes:
        seed: of the draws. A row draws the same in a batch as alone.
    """

    seed: int = 0

    def importance(self, prompt: Prompt) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10_007 + prompt.layer)
        draws = torch.rand(int(prompt.positions.max()) + 1, generator=generator).to(
            prompt.positions.device
        )
        return tiered(draws[prompt.places], prompt)


@dataclass(frozen=True)
class StridePolicy(BudgetPolicy):
    """Image keys at even distances: what simply showing a coarser picture would keep.

    Keys are kept in the order of the base-2 radical inverse of their number, so that for every
    budget they are spread evenly (every second for 1/2, every fourth for 1/4), and stay so when
    keys give way one by one.
    """

    def importance(self, prompt: Prompt) -> Tensor:
        image = prompt.modality == Modality.IMAGE
        place = torch.where(
            image.any(-1, keepdim=True) & image, image.long().cumsum(-1) - 1, prompt.places
        )
        inverse = torch.zeros_like(place, dtype=torch.float32)
        for bit in range(20):
            inverse += ((place >> bit) & 1) * 0.5 ** (bit + 1)
        return tiered(-inverse, prompt)


@dataclass(frozen=True)
class StreamingPolicy(BudgetPolicy):
    """The first tokens and the newest ones (StreamingLLM, Xiao et al., ICLR 2024, arXiv
    2309.17453).

    Deviation: keys keep the rotary position they were computed at, where the paper renumbers them
    within the cache.

    Attributes:
        sinks: first tokens that are always held (4 in the paper).
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sinks", self.sinks, 0, "0 keeps only the newest tokens")

    def importance(self, prompt: Prompt) -> Tensor:
        first = 4 * _TIER - prompt.places
        return torch.where(prompt.places < self.sinks, first, prompt.positions.float())

    def arrival(self, position: int) -> float:
        return float(position)


@dataclass(frozen=True)
class H2OPolicy(BudgetPolicy):
    """Keys that gathered most attention, and the newest (heavy hitters, Zhang et al., NeurIPS 2023,
    arXiv 2306.14048).

    Per key/value head; scores are weights summed over all query rows so far, and of a row's keys
    half are the newest, as in the paper. Deviation: with grouped-query attention the heads of a
    group are summed.
    """

    @property
    def accumulates(self) -> bool:
        return True

    @property
    def per_head(self) -> bool:
        return True

    def importance(self, prompt: Prompt) -> Tensor:
        scores = prompt.row_sums(prompt.row_modality != Modality.PADDING)
        return scores if prompt.held is None else scores + prompt.held

    def recent(self, limit: int) -> int:
        return max(limit // 2, 1)

    def arrival(self, position: int) -> float:
        return 0.0


@dataclass(frozen=True)
class SnapKVPolicy(BudgetPolicy):
    """Keys that the prompt's last rows look at (SnapKV, Li et al., NeurIPS 2024, arXiv 2404.14469).

    Per key/value head: weights summed over the rows of the observation window, average-pooled over
    neighbouring keys (the released program's defaults); the window's own keys come first.
    Deviations: with grouped-query attention the heads of a group are summed, and a window larger
    than the budget is cut to its newest keys.

    Attributes:
        window: rows of the observation window.
        kernel: width of the pooling, odd.
    """

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1, "the rows that choose")
        check_count("kernel", self.kernel, 1, "1 does not pool")
        if self.kernel % 2 == 0:
            raise ValueError(
                f"kernel must be odd, so that pooling keeps every key's place; got {self.kernel}"
            )

    @property
    def per_head(self) -> bool:
        return True

    def importance(self, prompt: Prompt) -> Tensor:
        scores = prompt.row_sums(prompt.newest(self.window))
        pooled = torch.nn.functional.avg_pool1d(
            scores, self.kernel, stride=1, padding=self.kernel // 2
        )
        first = torch.tensor([c.tokens - self.window for c in prompt.counts], device=pooled.device)[
            :, None, None
        ]
        own = (prompt.places >= first).expand_as(pooled)
        return torch.where(own, _TIER + prompt.positions, pooled)


@dataclass(frozen=True)
class FastVPolicy(BudgetPolicy):
    """Image tokens leave the prompt after an early layer (FastV, Chen et al., ECCV 2024, arXiv
    2403.06764).

    Ranked by the last row's weights in that layer, mean over heads, as in the released program.
    Deviations: the early layers' caches are cut to the tokens that go on, too, so that a budget
    means the same in every layer; a later turn's prompt passes in full and each layer ranks for
    itself.

    Attributes:
        prefill_layer: number of layers that see the whole prompt (K = 2 in the paper).
    """

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
        return min(
            max(self.limit(counts, self.budget) - counts.system - counts.text, 0), counts.image
        )

    def importance(self, prompt: Prompt) -> Tensor:
        return tiered(self.rank(prompt.last_row())[:, None], prompt)

    def choices(self, measures: Sequence[Measure], counts: Sequence[Counts]) -> list[Choice]:
        ranking = {m.layer: m.scores for m in measures}.get(self.prefill_layer - 1)
        early = [m.layer < self.prefill_layer - 1 and ranking is not None for m in measures]
        return [
            self.choose(replace(m, scores=ranking) if e else m, counts)
            for m, e in zip(measures, early, strict=True)
        ]


@dataclass(frozen=True)
class VLCachePolicy(BudgetPolicy):
    """More keys for denser layers, chosen by what the text sees (VL-Cache, Tu et al., ICLR 2025,
    arXiv 2410.23317).

    A layer's share is in proportion to its density, one minus the share of causal weights below
    `threshold` times the row's largest, over the text rows (post-vision attention), between 1 % and
    all keys. Within a layer keys are ranked by their weights summed over the text rows, per
    key/value head, beside the newest tenth. Deviations: shares are rescaled where the bounds cut
    them, so that their mean is the budget; a prompt without text rows is judged by its last row;
    with grouped-query attention the heads of a group are summed.

    Attributes:
        threshold: p of the paper, 1 %.
    """

    deferred: ClassVar[bool] = True

    threshold: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("threshold", self.threshold)

    @property
    def per_head(self) -> bool:
        return True

    def recent(self, limit: int) -> int:
        return max(limit // 10, 1)

    def importance(self, prompt: Prompt) -> Tensor:
        return prompt.row_sums(_post_vision(prompt))

    def measure(self, prompt: Prompt) -> Measure:
        return replace(super().measure(prompt), extra=self._density(prompt))

    def choices(self, measures: Sequence[Measure], counts: Sequence[Counts]) -> list[Choice]:
        density = torch.stack([m.extra for m in measures if m.extra is not None])
        shares = _proportional(density, self.budget).tolist()
        return [self._hold(m, counts, share) for m, share in zip(measures, shares, strict=True)]

    def _density(self, prompt: Prompt) -> Tensor:
        """(batch,) share of causal weights of the text rows that reach `threshold` times their
        row's largest.
        """
        rows, keys = _post_vision(prompt), prompt.positions[:, 0]
        visible = ((keys[:, None] <= prompt.rows[..., None]) & (keys[:, None] >= 0)).sum(2)
        reached = torch.zeros(len(prompt.counts), device=rows.device)
        for block, weights in prompt.weights(rows):
            large = weights >= self.threshold * weights.amax(-1, keepdim=True)
            reached += (large.sum(-1).float().mean(1) * rows[:, block]).sum(1)
        return reached / (visible * rows).sum(1).clamp_min(1)


def tiered(scores: Tensor, prompt: Prompt) -> Tensor:
    """Ranks instead of scores: image keys below all other keys of the prompt, so that they go
    first.
    """
    scores = scores.expand(-1, prompt.positions.shape[1], -1)
    rank = scores.argsort(dim=-1, stable=True).argsort(dim=-1).float()
    return rank + _TIER * (prompt.modality != Modality.IMAGE)


def _post_vision(prompt: Prompt) -> Tensor:
    """(batch, rows) bool: text rows, or the last row where there are none."""
    text = prompt.row_modality == Modality.TEXT
    return torch.where(text.any(1, keepdim=True), text, prompt.newest(1))


def _proportional(density: Tensor, budget: float) -> Tensor:
    """Shares in proportion to `density`, (layers, batch), each in [0.01, 1] and with mean `budget`
    over layers.
    """
    least, share = min(0.01, budget), torch.full_like(density, budget)
    free = torch.ones_like(density, dtype=torch.bool)
    for _ in range(density.shape[0] + 1):
        left = budget * density.shape[0] - torch.where(free, 0.0, share).sum(0)
        weight = torch.where(free, density.clamp_min(1e-9), 0.0)
        share = torch.where(free, weight / weight.sum(0).clamp_min(1e-9) * left, share)
        bounded = share.clamp(least, 1.0)
        over = (bounded - share).sum(
            0
        ) <= 0  # bound the side on which more is cut, then share out the rest anew
        cut = free & torch.where(over, share > 1.0, share < least)
        if not bool(cut.any()):
            return bounded
        share, free = torch.where(cut, bounded, share), free & ~cut
    return share.clamp(least, 1.0)
