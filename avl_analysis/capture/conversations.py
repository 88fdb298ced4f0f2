"""Which samples the passes of a model belong to: those of the KV cache they continue.

A prefill begins a conversation, with one sample per row of its batch. Decode steps and later turns
belong to the conversation of their cache, whichever ran last; so several may run in any order. When
the cache is gone, no pass can follow, and only the finished arrays are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from avl.hooks import HookError
from avl_analysis.capture.accumulator import SampleAccumulator
from avl_analysis.recordings import schema

_MOVES_ROWS = {
    "reorder_cache": "beam search exchanges the rows of the batch between steps",
    "batch_select_indices": "rows of the batch are dropped or exchanged",
    "batch_repeat_interleave": "rows of the batch are repeated",
}
"""Methods of a cache after which row b of the batch is another one than before."""


@dataclass(eq=False)
class FollowedConversation:
    """The samples of one prefill, one per row of its batch.

    Attributes:
        samples: in the making; empty once it is closed.
        cache: the KV cache that later passes continue; None if there was none.
        norms: (row of the batch, layer) -> norms of the value vectors by rank, and how many of them
            are known in order.
        closed: names and arrays of the samples once no pass can follow.
    """

    samples: list[SampleAccumulator]
    cache: ReferenceType[Any] | None = None
    norms: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict)
    closed: list[tuple[str, schema.Part]] = field(default_factory=list)

    def named_parts(self) -> list[tuple[str, schema.Part]]:
        """Names and arrays of the samples as they stand now."""
        running = [(sample.name, sample.part()) for sample in self.samples if sample.phases]
        return [*self.closed, *running]

    def names(self) -> list[str]:
        """Names of the samples."""
        running = [sample.name for sample in self.samples if sample.phases]
        return [*(name for name, _ in self.closed), *running]

    def close(self) -> None:
        """No more passes will follow; let go of working memory and of the cache."""
        self.closed, self.samples = self.named_parts(), []
        self.norms.clear()
        if (cache := None if self.cache is None else self.cache()) is not None:
            _allow_moves(cache)
        self.cache = None

    @property
    def is_over(self) -> bool:
        """Whether no pass can follow."""
        return self.cache is None or self.cache() is None


class Conversations:
    """All conversations of a recording, in the order they began.

    Args:
        first: number of the first sample; names are numbers of six digits.
        make: a sample of that name, without content.
    """

    def __init__(self, first: int, make: Callable[[str], SampleAccumulator]) -> None:
        """Nothing has begun yet."""
        self._first, self._make = first, make
        self._all: list[FollowedConversation] = []
        self._mark: int | None = None

    def begin(self, rows: int, cache: Any) -> FollowedConversation:
        """Begin a conversation with the samples of one prefill."""
        number = self._first + len(self.names())
        samples = [self._make(f"{number + row:06d}") for row in range(rows)]
        # A weak reference: a recording must not keep the keys and values of every answer alive.
        conversation = FollowedConversation(samples, None if cache is None else ref(cache))
        if cache is not None:
            _refuse_moves(cache)
        self._all.append(conversation)
        return conversation

    def of(self, cache: Any) -> FollowedConversation:
        """The conversation that a pass on this cache continues.

        Raises:
            HookError: its prompt was not recorded.
        """
        # The latest first: an answer's passes follow its prompt.
        for conversation in reversed(self._all):
            if conversation.cache is not None and conversation.cache() is cache:
                return conversation
        raise HookError(
            "the prompt of this KV cache ran before the recording began, so its sample is not"
            " there; begin to record before the prompt, with an empty cache"
        )

    def names(self) -> list[str]:
        """Names of the samples so far."""
        return [name for conversation in self._all for name in conversation.names()]

    def parts(self) -> list[schema.Part]:
        """Their arrays, in the same order."""
        return [part for conversation in self._all for _, part in conversation.named_parts()]

    def close(self, *, every: bool) -> None:
        """Close those that are over, or every one."""
        for conversation in self._all:
            if conversation.samples and (every or conversation.is_over):
                conversation.close()

    def mark(self) -> None:
        """Remember where a generation begins."""
        self._mark = len(self._all)

    def end_marked(self, *, drop: bool) -> None:
        """Forget the mark, and with `drop` the conversations that began since."""
        start, self._mark = self._mark, None
        if start is None or not drop:
            return
        for conversation in self._all[start:]:
            conversation.close()
        del self._all[start:]


def _refuse_moves(cache: Any) -> None:
    """A recording would silently give moved rows to another sample."""
    for name, what in _MOVES_ROWS.items():
        if hasattr(cache, name):
            setattr(cache, name, _refusal(what))


def _refusal(what: str) -> Callable[..., None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise HookError(
            f"{what}, which a recording cannot follow; generate with num_beams=1 (greedy or"
            " sampling) while recording, or record the rows one by one"
        )

    return refuse


def _allow_moves(cache: Any) -> None:
    for name in _MOVES_ROWS:
        vars(cache).pop(name, None)


def one_per_row(conversation: FollowedConversation, rows: Sequence[Any]) -> list[SampleAccumulator]:
    """The samples of a conversation, checked against the rows of a pass.

    Raises:
        HookError: the batch has another number of rows than its prompt had.
    """
    if len(conversation.samples) != len(rows):
        raise HookError(
            f"a batch of {len(rows)} rows continues a cache whose prompt had"
            f" {len(conversation.samples)}; record rows that stay the same"
        )
    return conversation.samples
