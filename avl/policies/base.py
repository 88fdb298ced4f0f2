"""What a policy is asked, and what it may look at.

A policy is a frozen dataclass that decides; it never touches a cache or a model. After a prompt has
passed a layer it is shown that layer once (`Prompt`), measures what it needs (`measure`), and says
which keys to hold (`choose`). While decoding it answers with plain numbers: how many keys a row may
hold (`limit`), how many of the newest are safe (`recent`), whether this step attends to everything
held (`whole`). Everything physical (buffers, masks, rows of unequal length) is the business of
buffer.py, prefill_step.py and decode_step.py, so that a policy stays about as long as its formula.

Order of a layer's keys: `cold` (kept cheaply, attended only at whole steps), `far` (held, attended
only at whole steps), `core`, then `rest`. Most policies know only `rest`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from avl.attention import AttentionCall, attention_weights
from avl.selection import members
from avl.tokens import Modality

PROTECTED = float("inf")
"""Score of a key that is never dropped."""

_BLOCK = 64  # query rows whose weights are in memory at once


@dataclass(frozen=True)
class Counts:
    """True tokens of one row of the batch, padding excluded, generated tokens (text) included.

    Attributes:
        system, image, text: tokens of each modality.
        tail: length of the run of text tokens at the end.
    """

    system: int
    image: int
    text: int
    tail: int

    @property
    def tokens(self) -> int:
        return self.system + self.image + self.text


class Prompt:
    """One layer's attention over a prompt (or a later turn), as shown to a policy.

    Attributes:
        layer: index of the decoder layer.
        layers: number of layers the policy acts on.
        positions: (batch, heads, keys) sequence index of each key, -1 where there is none; heads is
            1 while all key/value heads hold the same keys.
        modality: same shape, int8 codes of `Modality`.
        places: same shape, number of each key among its row's true tokens, from 0; 0 where there is
            none.
        rows: (batch, rows) sequence index of each query row, -1 where it is no token.
        row_modality: (batch, rows) of the query rows.
        counts: true tokens of each row of the batch.
        held: (batch, key/value heads, keys) scores so far of keys held from earlier turns, 0 for
            new ones; or None.
    """

    def __init__(
        self,
        call: AttentionCall,
        layers: int,
        positions: Tensor,
        modality: Tensor,
        places: Tensor,
        rows: Tensor,
        row_modality: Tensor,
        counts: Sequence[Counts],
        held: Tensor | None,
    ) -> None:
        self._call = call
        self.layer = call.layer
        self.layers = layers
        self.positions = positions
        self.modality = modality
        self.places = places
        self.rows = rows
        self.row_modality = row_modality
        self.counts = counts
        self.held = held

    @property
    def keys(self) -> Tensor:
        """(batch, key/value heads, keys, width)."""
        return self._call.key

    @property
    def values(self) -> Tensor:
        """(batch, key/value heads, keys, width)."""
        return self._call.value

    @property
    def widths(self) -> tuple[int, int, int]:
        """Key width, value width, and bytes of a number."""
        return self._call.key.shape[3], self._call.value.shape[3], self._call.key.element_size()

    def last_row(self) -> Tensor:
        """Softmax weights of the last query row, (batch, query heads, keys) float32."""
        rows = self._call.query.shape[2]
        return attention_weights(self._call, slice(rows - 1, rows))[:, :, 0]

    def weights(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Softmax weights of the blocks of query rows that contain any of `rows`, (batch, rows)
        bool.

        Yields: The block and its weights, (batch, query heads, block, keys) float32. Under a purely
            causal mask, keys behind the block are left out.
        """
        call, wanted = self._call, rows.any(0).tolist()
        for start in range(0, len(wanted), _BLOCK):
            stop = min(start + _BLOCK, len(wanted))
            if any(wanted[start:stop]):
                seen = stop if call.causal else call.key.shape[2]
                yield slice(start, stop), attention_weights(call, slice(start, stop), seen)

    def row_sums(self, rows: Tensor) -> Tensor:
        """Softmax weights summed over some query rows and over the query heads that share a
        key/value head.

        Args:
            rows: (batch, rows) bool, which query rows to sum.

        Returns:
            (batch, key/value heads, keys) float32.
        """
        batch, heads, keys, _ = self._call.key.shape
        total = torch.zeros(batch, heads, keys, device=self._call.key.device)
        for block, weights in self.weights(rows):
            summed = weights.mul_(rows[:, None, block, None]).sum(2)
            total[..., : weights.shape[3]] += summed.view(batch, heads, self._call.groups, -1).sum(
                2
            )
        return total

    def newest(self, count: int) -> Tensor:
        """(batch, rows) bool: the last `count` query rows that are tokens."""
        token = self.row_modality != Modality.PADDING
        return token & (token.flip(1).cumsum(1).flip(1) <= count)


@dataclass(eq=False)
class Measure:
    """What a policy keeps of a `Prompt` until it chooses.

    Attributes:
        layer, positions, modality: as in `Prompt`.
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
    """Which keys of a layer to hold; indices into its keys, (batch, heads, n), -1 for nothing (in
    front).

    Attributes:
        far, core: image keys that take turns, or None; heads is 1 where all key/value heads share
            them.
        cold: image keys that go to a `ColdTier` of this `kind`, or None.
        rest: sets of keys that are attended at every step.
        scores: (batch, heads, keys) what the rest's keys are worth when one must go, `PROTECTED`
            for never; None if nothing is ever dropped while decoding.
        worth: (batch, 1, keys) what keys in `far` are worth, if the policy drops some of them
            later; else None.
        evictable: number of keys in `rest` that may be dropped later, per row.
        share: what `limit` is given for each row; 1.0 if left out.
        few: image keys a sparse whole step attends to, per row; see `Policy.sparse`.
        reference: (batch, heads, keys) importance of image keys now, if the policy wants to be
            asked about drift.
    """

    rest: Sequence[Tensor]
    far: Tensor | None = None
    core: Tensor | None = None
    scores: Tensor | None = None
    worth: Tensor | None = None
    evictable: Sequence[int] = ()
    share: Sequence[float] = ()
    cold: Tensor | None = None
    kind: int | str = 16
    few: Sequence[int] = ()
    reference: Tensor | None = None


@dataclass(frozen=True)
class Policy(ABC):
    """Base of all policies; the methods below describe one that changes nothing."""

    deferred: ClassVar[bool] = False
    """Whether `choices` needs the measures of all layers (the whole prompt's keys stay in memory
    until then).
    """
    evicts_text_only: ClassVar[bool] = False
    """Whether `limit` and `recent` are about text keys rather than all keys in `rest`."""

    @property
    def accumulates(self) -> bool:
        """Whether each step's softmax weights are added to the scores of the keys in `rest`."""
        return False

    @property
    def per_head(self) -> bool:
        """Whether key/value heads of one layer may hold different keys."""
        return False

    @property
    def filter_layer(self) -> int | None:
        """Number of decoder layers a prompt passes in full; after them image tokens leave it. None:
        all layers.
        """
        return None

    def filter_count(self, counts: Counts) -> int:
        """How many image tokens of a row go on after `filter_layer`."""
        return counts.image

    @property
    def rotates(self) -> bool:
        """Whether there are steps that do not attend to all keys held, so that it matters which are
        core.
        """
        return True

    @property
    def sparse(self) -> bool:
        """Whether a whole step ranks all image keys held, and attends to the `few` best of them
        only.
        """
        return False

    @abstractmethod
    def measure(self, prompt: Prompt) -> Measure:
        """Look at one layer after its attention over a prompt."""

    @abstractmethod
    def choose(self, measure: Measure, counts: Sequence[Counts]) -> Choice:
        """Say which keys of one layer to hold."""

    def choices(self, measures: Sequence[Measure], counts: Sequence[Counts]) -> list[Choice]:
        """Say which keys to hold in each of some layers: all of them if `deferred`, else one at a
        time.
        """
        return [self.choose(measure, counts) for measure in measures]

    def whole(self, step: int) -> bool:
        """Whether decode step `step` (1, 2, ...) attends to all keys held, and re-ranks them."""
        return True

    def rank(self, weights: Tensor) -> Tensor:
        """Importance of keys from one query row's weights, (batch, query heads, keys) -> (batch,
        keys).
        """
        return weights.mean(1)

    def core_scores(self, weights: Tensor) -> Tensor:
        """Importance of keys from a decode step's weights, (batch, key/value heads, groups, keys)
        -> (batch, heads, keys), where heads is 1 if all key/value heads share one core.
        """
        return self.rank(weights.flatten(1, 2))[:, None]

    def drifted(self, before: Tensor, now: Tensor) -> Tensor | None:
        """(batch,) bool: rows whose core is outdated; None: none, the core is renewed by `whole`
        alone.

        Args:
            before, now: (batch, heads, core keys) importance of the core's keys when it was chosen
                and at this step; 0 where a row has fewer.
        """
        return None

    def limit(self, counts: Counts, share: float) -> int | None:
        """Most evictable keys a row may hold at this point; None: no limit."""
        return None

    def image_limit(self, counts: Counts, text: int) -> int | None:
        """Most keys a row may hold in `far` and core together while it holds `text` evictable ones;
        None: no limit.
        """
        return None

    def recent(self, limit: int) -> int:
        """How many of the newest evictable keys are safe."""
        return 1

    def arrival(self, position: int) -> float:
        """Score a new key starts with."""
        return 0.0


def all_keys(measure: Measure) -> Tensor:
    """Index set of every key there is, in order."""
    held = measure.positions >= 0
    return members(held, int(held.sum(-1).amax()))


def sizes(mask: Tensor) -> list[int]:
    """Number of True entries of each row of a (batch, heads, keys) mask; equal in all heads."""
    return mask[:, 0].sum(-1).tolist()
