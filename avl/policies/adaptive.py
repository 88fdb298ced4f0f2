"""A-VL: image tokens take turns, text tokens grow old (Zhang et al., AAAI 2025, arXiv 2409.14846).

Three rules, each switched off by `None`. *Vision*: after the prompt a layer keeps the best `secondary` of the image
keys, attends to the best `core` of them, and every `refresh_every`-th step attends to all it kept and chooses the core
anew. *Text*: heavy-hitter eviction (H2O) among the text keys, per key/value head. *Prefill filter*: after
`prefill_layer` layers only the best `prefill` of the image tokens travel on; alone it is FastV.

All fractions are fractions *kept* of the original number of image tokens and are truncated; the numbers below the paper
does not print (the floor of 20 text keys, the 70/30 split) are those of the authors' released program, and the traces
in the tests are reproduced only with them. Beyond that program: batches, several pictures, later turns, and grouped
key/value heads, whose query heads' scores are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from avl.policies.base import PROTECTED, Choice, Counts, Measure, Policy, Prompt
from avl.selection import best, between, members, newest_and_best
from avl.tokens import Modality

TEXT_FLOOR = 20
"""Text keys that are always kept, however small the fraction."""
HEAVY_SHARE = 0.7
"""Share of the text budget that goes to the best-scored keys; the rest goes to the newest."""


@dataclass(frozen=True)
class AdaptivePolicy(Policy):
    """A-VL with the paper's settings as defaults.

    Attributes:
        secondary: share of the image keys held after the prompt, (0, 1]; None holds all.
        core: share of the image keys attended at ordinary steps, (0, secondary]; None attends to all held.
        refresh_every: every how many decode steps all held keys are attended and the core is chosen anew; 0: there is
            no core, every step attends to all held.
        text: share of the text keys held, (0, 1], at least 20 keys; None holds all.
        prefill: share of the image tokens that go on after `prefill_layer`, [secondary, 1]; None: all.
        prefill_layer: number of decoder layers that see all image tokens, >= 1.
        budget: share of the full cache's bytes, (0, 1]; then `secondary` only says how large the core is beside it, and
            as many image keys are held after the prompt as the budget leaves. See `for_budget`.

    Raises:
        ValueError, TypeError: a value out of range, said when the policy is made.
    """

    evicts_text_only: ClassVar[bool] = True

    secondary: float | None = 0.5
    core: float | None = 0.3
    refresh_every: int = 3
    text: float | None = 0.7
    prefill: float | None = None
    prefill_layer: int = 2
    budget: float | None = None

    def __post_init__(self) -> None:
        for name in ("secondary", "core", "text", "prefill", "budget"):
            check_share(name, getattr(self, name), optional=True)
        check_count("refresh_every", self.refresh_every, 0, "0 switches the core off")
        check_count("prefill_layer", self.prefill_layer, 1, "the ranking needs at least one layer's attention")
        secondary = 1.0 if self.secondary is None else self.secondary
        if self.core is not None and self.core > secondary:
            raise ValueError(
                f"core={self.core} is larger than secondary={secondary}: core image tokens are chosen among the "
                f"secondary ones. Pass core <= {secondary}, or core=None to attend to all that are held"
            )
        filtered = self.prefill is not None and self.secondary is not None and self.budget is None
        if filtered and secondary > (self.prefill or 1.0):
            raise ValueError(
                f"secondary={secondary} is larger than prefill={self.prefill}: later layers cannot hold image tokens "
                f"that the prefill filter removed. Pass secondary <= {self.prefill}, or prefill=None to let all pass"
            )

    @classmethod
    def for_budget(cls, budget: float, **changes: Any) -> AdaptivePolicy:
        """The paper's policy scaled so that a layer holds at most `budget` of the full cache's keys at every moment.

        The text rule keeps at most the share `budget`, and image keys outside the core give way, worst first, when
        the text needs their place. System keys, 20 text keys and the core never do; where these alone exceed the
        budget, it is missed. `changes` are further fields, for example `refresh_every`.
        """
        check_share("budget", budget)
        text = min(budget, cls.text) if cls.text is not None else budget
        return replace(cls(text=text), budget=budget, **changes)

    # -- what the machinery asks ------------------------------------------------------------------------------------

    @property
    def accumulates(self) -> bool:
        return self.text is not None

    @property
    def per_head(self) -> bool:
        return self.text is not None

    @property
    def filter_layer(self) -> int | None:
        return None if self.prefill is None else self.prefill_layer

    def filter_count(self, counts: Counts) -> int:
        return counts.image if self.prefill is None else int(self.prefill * counts.image)

    def whole(self, step: int) -> bool:
        return self.refresh_every == 0 or step % self.refresh_every == 0

    def limit(self, counts: Counts, share: float) -> int | None:
        return None if self.text is None else max(round(self.text * counts.text), TEXT_FLOOR)

    def recent(self, limit: int) -> int:
        return limit - int(HEAVY_SHARE * limit)

    def image_limit(self, counts: Counts, text: int) -> int | None:
        return None if self.budget is None else max(int(self.budget * counts.tokens) - counts.system - text, 0)

    def measure(self, prompt: Prompt) -> Measure:
        """Image keys: the last row's weights. Text keys: weights summed over text rows, earlier turns included."""
        text = None
        if self.text is not None:
            text = prompt.row_sums(prompt.row_modality == Modality.TEXT)
            text = text if prompt.held is None else text + prompt.held
        image = self.rank(prompt.last_row())[:, None]
        return Measure(prompt.layer, prompt.positions, prompt.modality, image, text)

    def choose(self, measure: Measure, counts: Sequence[Counts]) -> Choice:
        image = measure.of(Modality.IMAGE)[:, :1]
        system, text = measure.of(Modality.SYSTEM), measure.of(Modality.TEXT)
        kept = [n if (r := self.limit(c, 1.0)) is None else min(n, r) for n, c in zip(sizes(text), counts, strict=True)]
        secondary = [min(self._secondary(c, k), n) for c, k, n in zip(counts, kept, sizes(image), strict=True)]
        core = [self._core(c, n) for c, n in zip(counts, secondary, strict=True)]
        order = best(measure.scores.masked_fill(~image, -torch.inf), secondary)
        scores = None if measure.extra is None else measure.extra.masked_fill(~text, PROTECTED)
        return Choice(
            far=between(order, core, secondary),
            core=between(order, [0] * len(core), core),
            rest=[members(system, max(sizes(system), default=0)), self._texts(measure, text, kept)],
            scores=scores,
            worth=None if self.budget is None else measure.scores,
            evictable=kept,
        )

    # -- the counts -------------------------------------------------------------------------------------------------

    def _secondary(self, counts: Counts, text: int) -> int:
        if (limit := self.image_limit(counts, text)) is not None:
            return limit
        return counts.image if self.secondary is None else int(self.secondary * counts.image)

    def _core(self, counts: Counts, secondary: int) -> int:
        if self.core is None or self.refresh_every == 0:
            return secondary
        if self.budget is not None:
            return int(self.core / (self.secondary or 1.0) * secondary)
        return min(int(self.core * counts.image), secondary)

    def _texts(self, measure: Measure, text: Tensor, kept: list[int]) -> Tensor:
        """Text keys to keep: the newest, and the best-scored of the others."""
        if measure.extra is None or kept == sizes(text):
            return members(text, max(kept, default=0))
        scores = measure.extra.masked_fill(~text, -torch.inf)
        return newest_and_best(scores, measure.positions, kept, [self.recent(k) for k in kept])


def sizes(mask: Tensor) -> list[int]:
    """Number of True entries of each row of a (batch, heads, keys) mask; equal in all heads."""
    return mask[:, 0].sum(-1).tolist()


def check_share(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse what is not a number in (0, 1]."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in (0, 1]{' or None' if optional else ''}; got {value!r}")
    if not 0 < value <= 1:
        hint = ", or None to switch its rule off" if optional else ""
        raise ValueError(f"{name} is the share that is kept, in (0, 1]; got {value!r}. Pass e.g. {name}=0.5{hint}")


def check_count(name: str, value: Any, least: int, why: str) -> None:
    """Refuse what is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number >= {least} ({why}); got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least} ({why}); got {value}")
