"""What a policy is asked, and what it answers.

A policy is a frozen dataclass that decides; it never touches a cache or a model. After a prompt has
passed a layer the policy is shown that layer once (`Prompt`, in prompt.py), measures what it needs
(`measure`), and says which keys to hold (`choose`). While decoding it answers with plain numbers,
above all how many keys a row may hold (`limit`). Buffers, masks and rows of unequal length are
handled by buffer.py, prefill_step.py and decode_step.py, so that a policy stays about as long as
its formula.

`Policy` is all that most baselines need. `CoredPolicy` adds what a policy is asked that attends to
some of its keys at some steps only, as A-VL does; `PagedPolicy` what one is asked that chooses the
keys to read anew for every query.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from avl.kernels.row_products import head_means
from avl.policies.prompt import Counts, Prompt
from avl.quantized_tier import Storage
from avl.selection import members
from avl.tokens import Modality

PROTECTED = float("inf")
"""Score of a key that is never dropped."""


@dataclass(eq=False)
class Measure:
    """What a policy keeps of a `Prompt` until it chooses.

    Attributes:
        layer: index of the decoder layer.
        positions: (batch, heads, keys) sequence index of each key, as in `Prompt`.
        modality: (batch, heads, keys) codes of `Modality`, as in `Prompt`.
        scores: (batch, heads, keys), higher = more important.
        extra: whatever else the policy needs.
        widths: key width, value width and bytes of a number, of the keys as the model makes them.
    """

    layer: int
    positions: Tensor
    modality: Tensor
    scores: Tensor
    extra: Tensor | None = None
    widths: tuple[int, int, int] = (0, 0, 0)

    def of(self, modality: Modality) -> Tensor:
        """(batch, heads, keys) bool: keys of one modality."""
        return self.modality == modality


@dataclass(eq=False)
class Choice:
    """Which keys of a layer to hold: index sets (batch, heads, n) into its keys, -1 for nothing.

    Entries that are -1 stand in front. Most policies need `always_attended` alone, with `scores`,
    `evictable` and `budget_share` where keys are dropped while decoding.

    Attributes:
        always_attended: sets of keys that are attended at every step.
        secondary: image keys that are attended at refresh steps only, or None.
        core: image keys that are attended at every step until the next refresh, or None.
        quantized: keys that go to a `QuantizedTier`, or None; attended at refresh steps.
        storage: how that tier stores them: 8, 4 or 2 bits (or as many for keys and for values), 16
            (as they are) or "host".
        scores: (batch, heads, keys) worth of the keys in `always_attended` when one must go,
            `PROTECTED` for never; None if nothing is dropped while decoding.
        secondary_scores: (batch, 1, keys) worth of the keys in `secondary`, if the policy drops
            some of them later; else None.
        evictable: number of keys in `always_attended` that may be dropped later, per row.
        budget_share: what `Policy.limit` is given for each row; 1.0 if left out.
        sparse_budget: image keys that a sparse refresh attends to, per row; see
            `CoredPolicy.sparse`.
        core_scores: (batch, 1, keys) importance of image keys now, if the policy wants to be asked
            about drift.
        page_size: tokens of a page of keys, where steps read some pages only and all keys are held;
            0: there are no pages. See `PagedPolicy`.
        ragged_heads: whether key/value heads hold different numbers of keys. Then there is one set
            of `always_attended` keys and nothing else, and `evictable` is the mean over heads.
    """

    always_attended: Sequence[Tensor]
    secondary: Tensor | None = None
    core: Tensor | None = None
    quantized: Tensor | None = None
    storage: Storage = 16
    scores: Tensor | None = None
    secondary_scores: Tensor | None = None
    evictable: Sequence[int] = ()
    budget_share: Sequence[float] = ()
    sparse_budget: Sequence[int] = ()
    core_scores: Tensor | None = None
    page_size: int = 0
    ragged_heads: bool = False


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Base of all policies. A subclass must say `measure` and `choose`, and usually `limit`.

    The other members have defaults that change nothing. A policy that is to be named on the command
    line and drawn in figures also sets the three class attributes below.
    """

    name: ClassVar[str] = ""
    """Name on the command line; empty: the policy cannot be named there."""
    label: ClassVar[str] = ""
    """Name in figures, tables and the dashboard; empty: the name of the class."""
    color_slot: ClassVar[int] = 0
    """Number of the palette's style in figures (colour, dash and marker)."""
    deferred: ClassVar[bool] = False
    """Whether `choices` needs the measures of all layers; the whole prompt's keys stay in memory
    until then.
    """
    evicts_text_only: ClassVar[bool] = False
    """Whether `limit` and `recent` count text keys only, not all keys in `always_attended`."""

    @classmethod
    def for_budget(cls, budget: float) -> Policy:
        """The policy that stays within a share of the full cache's bytes, or of its keys read.

        Raises:
            TypeError: a policy without a budget.
        """
        raise TypeError(f"{cls.__name__} has no budget: leave out :{budget:g}")

    @classmethod
    def for_image_tokens(cls, tokens: int, of: int) -> Policy:
        """The policy that holds, or reads, as many keys as image tokens were left beside all text.

        By default the share `tokens / of` is the budget.

        Args:
            tokens: image tokens that could be left.
            of: image tokens of the prompt, at least 1.

        Raises:
            TypeError: a policy without a budget.
        """
        return cls.for_budget(min(tokens / of, 1.0))

    @abstractmethod
    def measure(self, prompt: Prompt) -> Measure:
        """Look at one layer after its attention over a prompt."""

    @abstractmethod
    def choose(self, measure: Measure, counts: Sequence[Counts]) -> Choice:
        """Say which keys of one layer to hold."""

    def limit(self, counts: Counts, share: float) -> int | None:
        """Most evictable keys a row may hold at this point; None: no limit.

        Args:
            counts: tokens of the row so far.
            share: what `choose` gave for this row as `budget_share`.
        """
        return None

    # Optional, for policies that need them.

    def choices(self, measures: Sequence[Measure], counts: Sequence[Counts]) -> list[Choice]:
        """Say which keys to hold in each of some layers.

        All of them if `deferred`, else one at a time.
        """
        return [self.choose(measure, counts) for measure in measures]

    @property
    def accumulates(self) -> bool:
        """Whether each step's softmax weights are added to the scores of the keys attended."""
        return False

    @property
    def per_head(self) -> bool:
        """Whether key/value heads of one layer may hold different keys."""
        return False

    def recent(self, limit: int) -> int:
        """How many of the newest evictable keys are safe."""
        return 1

    def arrival(self, position: int) -> float:
        """Score a new key starts with."""
        return 0.0

    @property
    def newest_in_full(self) -> int | None:
        """How many of the newest keys stay in full precision.

        Older ones are quantised, block by block, in the tier's own way. None: nothing is quantised
        while decoding.
        """
        return None

    def rank(self, weights: Tensor) -> Tensor:
        """Importance of keys from one query row's weights.

        Args:
            weights: (batch, query heads, keys).

        Returns:
            (batch, keys).
        """
        return head_means(weights)

    @property
    def filter_layer(self) -> int | None:
        """Number of decoder layers a prompt passes in full; after them image tokens leave it.

        None: all layers; 0: before the first (see before_decoder.py).
        """
        return None

    def filter_count(self, counts: Counts) -> int:
        """How many image tokens of a row go on after `filter_layer`."""
        return counts.image


@dataclass(frozen=True, kw_only=True)
class CoredPolicy(Policy):
    """A policy with a core: some image keys are attended at every step, others at refreshes only.

    A layer's keys lie in the order quantised, secondary, core, always attended; a refresh step
    attends to all of them, any other step to the last two.
    """

    @property
    def rotates(self) -> bool:
        """Whether there are steps that are no refresh, so that it matters which keys are core."""
        return True

    @property
    def sparse(self) -> bool:
        """Whether a refresh attends only to the best `sparse_budget` of the image keys held.

        It ranks all of them first.
        """
        return False

    def is_refresh(self, step: int) -> bool:
        """Whether decode step `step` (1, 2, ...) attends to all keys held, and ranks them anew."""
        return True

    def core_scores(self, weights: Tensor) -> Tensor:
        """Importance of keys from a decode step's weights.

        Args:
            weights: (batch, key/value heads, query heads per key/value head, keys).

        Returns:
            (batch, 1, keys).
        """
        return self.rank(weights.flatten(1, 2))[:, None]

    def drifted(self, before: Tensor, now: Tensor) -> Tensor | None:
        """Rows whose core is outdated, (batch,) bool.

        None: the core is renewed by `is_refresh` alone.

        Args:
            before: (batch, 1, core keys) importance of the core's keys when it was chosen; 0 where
                a row has fewer.
            now: the same at this step.
        """
        return None

    def image_limit(self, counts: Counts, text: int) -> int | None:
        """Most keys a row may hold in secondary and core together; None: no limit.

        Args:
            counts: tokens of the row so far.
            text: evictable keys the row holds.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class PagedPolicy(Policy):
    """A policy that holds all keys in pages and reads the pages a step's query may need.

    Its choice holds all keys in one set of `always_attended` keys and names a `page_size`.
    """

    @abstractmethod
    def read_limit(self, counts: Counts) -> int:
        """Most keys a row may read at a step; its newest page is read in any case."""


def all_keys(measure: Measure) -> Tensor:
    """Index set of every key there is, in order."""
    held = measure.positions >= 0
    return members(held, int(held.sum(-1).amax()))


def sizes(mask: Tensor) -> list[int]:
    """Number of True entries of each row of a (batch, heads, keys) mask; equal in all heads."""
    return mask[:, 0].sum(-1).tolist()
