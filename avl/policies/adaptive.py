"""A-VL: Adaptive Attention for Large Vision-Language Models.

Zhang et al., AAAI 2025, arXiv 2409.14846.

Three rules, each switched off by `None`. *Vision*: after the prompt a layer keeps the best
`secondary` of the image keys, attends to the best `core` of them, and at every `refresh_every`-th
step attends to all it kept and chooses the core anew. *Text*: heavy-hitter eviction (H2O) among the
text keys, per key/value head. *Prefill filter*: after `prefill_layer` layers only the best
`prefill` of the image tokens travel on; alone it is FastV.

All fractions are fractions *kept* of the original number of image tokens and are truncated; the
numbers below the paper does not print (the floor of 20 text keys, the 70/30 split) are those of the
authors' released program, and the traces in the tests are reproduced only with them. Beyond that
program: batches, several images, later turns, and grouped key/value heads, whose query heads'
scores are summed.

Beyond the paper, off by default: minor image keys held in few bits instead of being dropped
(`cold`), refreshes that attend to the new core only (`sparse_refresh`), refreshes when attention
has drifted (`drift`) and shares per layer. docs/beyond-the-paper.md says what each is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from avl.kernels.codes import BITS
from avl.policies.base import PROTECTED, Choice, CoredPolicy, Measure, sizes
from avl.policies.checks import check_choice, check_count, check_share, check_switch
from avl.policies.prompt import Counts, Prompt
from avl.quantized_tier import HOST, PLAIN, Storage, quantized_cost
from avl.selection import best, between, members, newest_and_best
from avl.tokens import Modality

TEXT_FLOOR = 20
"""Text keys that are always kept, however small the fraction."""
HEAVY_SHARE = 0.7
"""Share of the text budget that goes to the best-scored keys; the rest goes to the newest."""
CORE_OF_SECONDARY = 0.6
"""Core tokens / secondary tokens in the paper's setting, 0.3 / 0.5."""
ANSWER = 64
"""Generated tokens that a budget with a quantised tier leaves room for before it spends on
precision.
"""

Share = float | tuple[float, ...] | None
"""A share for all layers, or one for each; None switches its rule off."""


@dataclass(frozen=True, kw_only=True)
class AdaptivePolicy(CoredPolicy):
    """A-VL with the paper's settings as defaults.

    Attributes:
        secondary: share of the image keys held after the prompt, (0, 1]; None holds all. One
            number, or one per layer. With a quantised tier: the share held in full precision, and 0
            is possible.
        core: share of the image keys attended at ordinary steps, (0, secondary]; None attends to
            all held. One number, or one per layer.
        refresh_every: every how many decode steps all held keys are attended and the core is chosen
            anew; 0: there is no core, every step attends to all held.
        text: share of the text keys held, (0, 1], at least 20 keys; None holds all.
        prefill: share of the image tokens that go on after `prefill_layer`, [secondary, 1]; None:
            all.
        prefill_layer: number of decoder layers that see all image tokens, >= 1.
        budget: share of the full cache's bytes, (0, 1]; then `secondary` only says how large the
            core is beside it, and as many image keys are held after the prompt as the budget
            leaves. See `for_budget` and `with_cold_tier`.
        cold: what becomes of the image keys that are not secondary. None: dropped. 8, 4 or 2: kept
            in that many bits, two numbers being those of keys and of values; "host": kept in host
            memory; 16: kept as they are. Refreshes attend to them, and bring back the best.
        sparse_refresh: a refresh ranks all keys held and attends to the new core alone, not to all
            it ranked.
        drift: refresh a row at any step at which the cosine between its core keys' weights now and
            when they were chosen is at most this, (0, 1]; takes the place of `refresh_every`. 1
            refreshes at every step.

    Raises:
        ValueError, TypeError: a value out of range, said when the policy is made.
    """

    name: ClassVar[str] = "a-vl"
    label: ClassVar[str] = "A-VL"
    color_slot: ClassVar[int] = 1
    evicts_text_only: ClassVar[bool] = True

    secondary: Share = 0.5
    core: Share = 0.3
    refresh_every: int = 3
    text: float | None = 0.7
    prefill: float | None = None
    prefill_layer: int = 2
    budget: float | None = None
    cold: Storage | None = None
    sparse_refresh: bool = False
    drift: float | None = None

    def __post_init__(self) -> None:
        if self.cold is not None:
            _check_storage("cold", self.cold)
        for name in ("text", "prefill", "budget", "drift"):
            check_share(name, getattr(self, name), optional=True)
        for name in ("secondary", "core"):
            _check_layers(
                name, getattr(self, name), zero=self.cold is not None and name == "secondary"
            )
        check_count("refresh_every", self.refresh_every, 0, "0 switches the core off")
        check_count(
            "prefill_layer",
            self.prefill_layer,
            1,
            "the ranking needs at least one layer's attention",
        )
        check_switch("sparse_refresh", self.sparse_refresh)
        self._check_shares()
        if self.sparse_refresh and (self.core is None or self.refresh_every == 0):
            raise ValueError(
                f"sparse_refresh attends to a new core, and core={self.core},"
                f" refresh_every={self.refresh_every} have none; pass e.g. core=0.1,"
                " refresh_every=1"
            )
        if self.drift is not None and (self.core is None or self.refresh_every == 0):
            raise ValueError(
                f"drift={self.drift} watches the core, and there is none; pass core and"
                " refresh_every > 0"
            )

    def _check_shares(self) -> None:
        """Core within secondary within prefill, layer by layer."""
        count = max(len(s) if isinstance(s, tuple) else 1 for s in (self.secondary, self.core))
        for layer in range(count):
            secondary, core = _of_layer(self.secondary, layer), _of_layer(self.core, layer)
            secondary = 1.0 if secondary is None else secondary
            # A sparse policy that refreshes at every step ranks all keys, quantised ones included,
            # so its core need not be held in full precision.
            most = (
                1.0
                if self.cold is not None and self.sparse_refresh and self.refresh_every == 1
                else secondary
            )
            if core is not None and core > most:
                raise ValueError(
                    f"core={core} is larger than secondary={secondary}: core image tokens are"
                    f" chosen among the secondary ones. Pass core <= {secondary}, or core=None to"
                    " attend to all that are held"
                )
            filtered = (
                self.prefill is not None and self.secondary is not None and self.budget is None
            )
            if filtered and secondary > (self.prefill or 1.0):
                raise ValueError(
                    f"secondary={secondary} is larger than prefill={self.prefill}: later layers"
                    " cannot hold image tokens that the prefill filter removed. Pass secondary <="
                    f" {self.prefill}, or prefill=None to let all pass"
                )

    @classmethod
    def for_budget(cls, budget: float, **changes: Any) -> AdaptivePolicy:
        """The paper's policy scaled to at most `budget` of the full cache's keys.

        It holds for every layer, at every moment.

        The text rule keeps at most the share `budget`, and image keys outside the core are dropped,
        worst first, when the text needs their place. System keys, 20 text keys and the core never
        do; where these alone exceed the budget, it is missed. `changes` are further fields, for
        example `refresh_every`.
        """
        check_share("budget", budget)
        text = min(budget, cls.text) if cls.text is not None else budget
        return replace(cls(text=text), budget=budget, **changes)

    @classmethod
    def for_image_tokens(cls, tokens: int, of: int) -> AdaptivePolicy:
        """The paper's policy with `tokens` secondary image keys beside all text.

        The core keeps the paper's proportion to them (`CORE_OF_SECONDARY`).

        Args:
            tokens: secondary image keys, at least 1.
            of: image tokens of the prompt.
        """
        share = min(tokens / of, 1.0)
        return cls(secondary=share, core=CORE_OF_SECONDARY * share, text=None)

    @classmethod
    def with_cold_tier(cls, budget: float | None = None, **changes: Any) -> AdaptivePolicy:
        """Every image key kept in 4 bits and attended at every step, all text kept.

        The preset beyond the paper.

        With a budget a layer holds at most that share of the full cache's bytes at every moment:
        image keys in 8 bits from 0.75 on, in 4 from 0.5 on, in 2 below. What is left beside room
        for an answer of 64 tokens holds the best-ranked in full precision. Where the budget is too
        small for that, text keys are dropped by the text rule once it is reached, down to 20,
        and then the worst-ranked image keys are dropped. `changes` are further fields.
        """
        cold = 4
        if budget is not None:
            check_share("budget", budget)
            cold = 8 if budget >= 0.75 else 4 if budget >= 0.5 else 2
        return replace(
            cls(secondary=0, core=None, refresh_every=0, text=None, cold=cold, budget=budget),
            **changes,
        )

    # -- what a session asks -----------------------------------------------------------------------

    @property
    def accumulates(self) -> bool:
        return self.text is not None or self._tier_budget

    @property
    def per_head(self) -> bool:
        return self.accumulates

    @property
    def filter_layer(self) -> int | None:
        return None if self.prefill is None else self.prefill_layer

    def filter_count(self, counts: Counts) -> int:
        return counts.image if self.prefill is None else int(self.prefill * counts.image)

    @property
    def rotates(self) -> bool:
        return self.cold is None or (
            self.core is not None and (self.refresh_every > 1 or self.drift is not None)
        )

    @property
    def sparse(self) -> bool:
        return self.sparse_refresh

    def is_refresh(self, step: int) -> bool:
        if self.refresh_every == 0 or self.core is None:
            return True
        return self.drift is None and step % self.refresh_every == 0

    def drifted(self, before: Tensor, now: Tensor) -> Tensor | None:
        if self.drift is None:
            return None
        cosine = torch.nn.functional.cosine_similarity(before, now, dim=-1).clamp_max(1.0)
        # Rows with fewer core keys have zeros in both vectors, which leave a cosine as it is.
        has_core = before.ne(0).any(-1)  # a row without a core cannot drift
        return ((cosine <= self.drift) & has_core).any(1)

    def limit(self, counts: Counts, share: float) -> int | None:
        """Most text keys of a row.

        Args:
            counts: tokens of the row so far.
            share: what the row's image keys cost, in full keys.
        """
        limits = [] if self.text is None else [max(round(self.text * counts.text), TEXT_FLOOR)]
        if self.budget is not None and self.cold is not None:
            # Text may take what the budget leaves beside the image keys' cost and the system keys,
            # but never less than the floor: rather miss a budget that is too small than lose all
            # text.
            left = int(self.budget * counts.tokens - share) - counts.system
            limits.append(max(left, self._least_text(counts)))
        return min(limits, default=None)

    def recent(self, limit: int) -> int:
        return limit - int(HEAVY_SHARE * limit)

    def image_limit(self, counts: Counts, text: int) -> int | None:
        if self.budget is None or self.cold is not None:
            return None
        return max(int(self.budget * counts.tokens) - counts.system - text, 0)

    def measure(self, prompt: Prompt) -> Measure:
        """Image keys: the last row's weights.

        Text keys: weights summed over text rows, earlier turns included.
        """
        text = None
        if self.accumulates:
            text = prompt.row_sums(prompt.row_modality == Modality.TEXT)
            if prompt.earlier_scores is not None:
                text = text + prompt.earlier_scores
        image = self.rank(prompt.last_row())[:, None]
        return Measure(prompt.layer, prompt.positions, prompt.modality, image, text, prompt.widths)

    def choose(self, measure: Measure, counts: Sequence[Counts]) -> Choice:
        image = measure.of(Modality.IMAGE)[:, :1]
        system, text = measure.of(Modality.SYSTEM), measure.of(Modality.TEXT)
        images, texts = sizes(image), sizes(text)
        # The order matters: what image keys cost decides how much text may be held, and (without a
        # tier) how much text is held decides how many image keys still fit.
        in_full, quantized, cost = self._tiers(measure, counts, images)
        limits = [self.limit(c, share) for c, share in zip(counts, cost, strict=True)]
        text_kept = [n if k is None else min(n, k) for n, k in zip(texts, limits, strict=True)]
        if self.cold is None:
            in_full = [
                min(self._secondary(measure, c, k), n)
                for c, k, n in zip(counts, text_kept, images, strict=True)
            ]
        core = [self._core(measure, c, n) for c, n in zip(counts, in_full, strict=True)]
        held = [a + b for a, b in zip(in_full, quantized, strict=True)]
        # Best first: the core, then the other secondary keys, then the quantised ones.
        # (batch, 1, most held)
        order = best(measure.scores.masked_fill(~image, -torch.inf), held)
        text_scores = measure.extra
        if text_scores is not None:
            # Whatever is no text key is protected: system keys lie among the always attended, too.
            text_scores = text_scores.masked_fill(~text, PROTECTED)
        system_keys = members(system, max(sizes(system), default=0))
        # With a tier image keys cost little and are planned for a whole answer; without one they
        # are dropped as text grows.
        drops_images = self.budget is not None and self.cold is None
        return Choice(
            always_attended=[system_keys, self._texts(measure, text, text_kept)],
            secondary=between(order, core, in_full),
            core=between(order, [0] * len(core), core),
            quantized=None if self.cold is None else between(order, in_full, held),
            storage=self.cold or PLAIN,
            scores=text_scores,
            secondary_scores=measure.scores if drops_images else None,
            evictable=text_kept,
            budget_share=cost,
            sparse_budget=self._sparse_budget(measure, counts, held),
            core_scores=None if self.drift is None else measure.scores,
        )

    # -- numbers of keys ---------------------------------------------------------------------------

    def _of(self, share: Share, measure: Measure) -> float | None:
        return _of_layer(share, measure.layer)

    def _secondary(self, measure: Measure, counts: Counts, text: int) -> int:
        """Image keys a row holds in full precision.

        Args:
            measure: of the layer.
            counts: tokens of the row.
            text: text keys it holds.
        """
        if (limit := self.image_limit(counts, text)) is not None:
            return limit
        share = self._of(self.secondary, measure)
        return counts.image if share is None else int(share * counts.image)

    def _core(self, measure: Measure, counts: Counts, secondary: int) -> int:
        """Core keys of a row.

        Args:
            measure: of the layer.
            counts: tokens of the row.
            secondary: image keys it holds in full precision, core included.
        """
        share = self._of(self.core, measure)
        if share is None or self.refresh_every == 0:
            return secondary
        if self.budget is not None and self.cold is None:
            # Under a budget `secondary` is what fits; the core keeps its proportion to it.
            return int(share / (self._of(self.secondary, measure) or 1.0) * secondary)
        return min(int(share * counts.image), secondary)

    def _sparse_budget(
        self, measure: Measure, counts: Sequence[Counts], held: Sequence[int]
    ) -> list[int]:
        """Image keys that a sparse refresh attends to, per row.

        Args:
            measure: of the layer.
            counts: tokens of the rows.
            held: image keys the rows hold.
        """
        share = self._of(self.core, measure) or 1.0
        return [min(int(share * c.image), n) for c, n in zip(counts, held, strict=True)]

    # -- the quantised tier ------------------------------------------------------------------------

    @property
    def _tier_budget(self) -> bool:
        return self.cold is not None and self.budget is not None

    def _tiers(
        self, measure: Measure, counts: Sequence[Counts], images: Sequence[int]
    ) -> tuple[list[int], list[int], list[float]]:
        """How the image keys of each row are divided between full precision and the tier.

        Args:
            measure: of the layer.
            counts: tokens of the rows.
            images: image keys of the rows.

        Returns:
            Keys in full precision, keys in the tier, and what both cost, in full keys; 0, 0 and 1
            without a tier.
        """
        if self.cold is None:
            return [0] * len(images), [0] * len(images), [1.0] * len(images)
        if self.budget is None:
            in_full = [
                min(self._secondary(measure, c, 0), n) for c, n in zip(counts, images, strict=True)
            ]
            quantized = [n - k for n, k in zip(images, in_full, strict=True)]
            return in_full, quantized, [1.0] * len(images)
        rows = [self._within(c, n, measure.widths) for c, n in zip(counts, images, strict=True)]
        in_full, quantized, cost = (list(column) for column in zip(*rows, strict=True))
        return in_full, quantized, cost

    def _within(
        self, counts: Counts, images: int, widths: tuple[int, int, int]
    ) -> tuple[int, int, float]:
        """Division of one row's image keys that stays within the budget.

        The unit is a full key with its value. With `T` text tokens the budget allows `budget *
        (system + image + T)`; system and text keys cost one each, and what is left may be spent on
        image keys. Text that is still to come brings `budget` and costs 1, so room shrinks as the
        answer grows: the plan is made for an answer of `ANSWER` tokens.

        1. If all image keys in the tier fit with such an answer, all are held, and as many of the
           best in full precision as still fit.
        2. Else no image key is in full precision, and as many are held as fit beside the fewest
           text keys that are always kept; the text rule makes that room when it is needed.

        Args:
            counts: tokens of the row.
            images: image keys it could hold.
            widths: key width, value width and bytes of a number.

        Returns:
            Keys in full precision, keys in the tier, and what both cost, in full keys.
        """
        assert self.budget is not None
        assert self.cold is not None
        budget, storage = self.budget, self.cold

        def cost(in_full: int, quantized: int) -> float:
            return in_full + quantized_cost(storage, quantized, images, widths[:2], widths[2])

        def room(text: int) -> float:
            return budget * (counts.system + counts.image + text) - counts.system - text

        # Both functions are in full keys. `room(T)` falls in T, since a text token costs 1 and
        # brings `budget` < 1: if it suffices at the end of the answer, it does at every step
        # before.
        spare = room(counts.text + ANSWER)
        if spare >= cost(0, images):
            in_full = _most(images, lambda n: cost(n, images - n) <= spare)
            return in_full, images - in_full, cost(in_full, images - in_full)
        # The text rule will drop text down to this floor when the budget is reached, so the image
        # keys are planned beside the floor.
        spare = room(self._least_text(counts))
        quantized = _most(images, lambda n: cost(0, n) <= spare)
        return 0, quantized, cost(0, quantized)

    def _least_text(self, counts: Counts) -> int:
        """Text keys that are always held under a budget with a quantised tier.

        `TEXT_FLOOR`, but at most half of what the budget leaves of the prompt beside system keys,
        so that a small budget does not go to text alone.
        """
        left = (self.budget or 1.0) * (counts.system + counts.image) - counts.system
        return max(min(TEXT_FLOOR, int(left / 2)), 1)

    def _texts(self, measure: Measure, text: Tensor, kept: list[int]) -> Tensor:
        """Text keys to keep: the newest, and the best-scored of the others.

        Args:
            measure: of the layer.
            text: (batch, heads, keys) bool.
            kept: how many to keep, per row.
        """
        # Nothing is dropped, so no ranking is needed; the order of the keys then is that of the
        # prompt.
        if measure.extra is None or kept == sizes(text):
            return members(text, max(kept, default=0))
        scores = measure.extra.masked_fill(~text, -torch.inf)
        return newest_and_best(scores, measure.positions, kept, [self.recent(k) for k in kept])


def _check_storage(name: str, value: Any) -> None:
    """Refuse what is no way of storing keys that `quantized_tier.Storage` lists."""
    if isinstance(value, tuple) and len(value) == 2:
        for bits, whose in zip(value, ("keys", "values"), strict=True):
            check_choice(f"{name}, of {whose},", bits, BITS, "bits of a number")
        return
    why = "bits of a number, or a pair of bits for keys and values; None drops minor keys"
    check_choice(name, value, (*BITS, PLAIN, HOST), why)


def _most(top: int, fits: Callable[[int], bool]) -> int:
    """The largest of 0 ... top that fits, 0 if none does."""
    # From above: that n fits does not mean that n - 1 does, as the limits of a group of keys are
    # saved only when its last key leaves the tier.
    return next((n for n in range(top, 0, -1) if fits(n)), 0)


def _of_layer(share: Share, layer: int) -> float | None:
    """The share of one decoder layer.

    Raises:
        ValueError: shares for fewer layers than the model has.
    """
    if not isinstance(share, tuple):
        return share
    if layer >= len(share):
        raise ValueError(
            f"shares for {len(share)} layers were given, and the model has a layer {layer}: pass"
            " one each"
        )
    return share[layer]


def _check_layers(name: str, value: Any, *, zero: bool) -> None:
    """Refuse what is neither a share nor a tuple of shares."""
    if not isinstance(value, tuple):
        check_share(name, value, optional=True, zero=zero)
        return
    if not value:
        raise ValueError(
            f"{name} is an empty tuple; pass one share for all layers, or one for each"
        )
    for share in value:
        check_share(name, share, zero=zero)
