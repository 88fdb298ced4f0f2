"""Choosing keys by score, row by row, and remembering what was chosen.

The helpers pick index sets whose sizes differ between the rows of a batch: sizes are plain Python
numbers (they follow from token counts, never from scores), indices are tensors, and -1 marks a
place that holds nothing. Empty places stand in front, so that a segment's contents always end where
the next segment begins.

`Selection` says which positions were core, secondary or minor in which layer after which step.
`SelectionLog`, which a session writes, stores index sets and replays them on demand; it knows
nothing about policies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from avl.tokens import Modality, TokenLayout


def best(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Indices of the `counts[b]` largest scores of row b, best first.

    Args:
        scores: (batch, heads, keys), higher = more important; -inf at keys that do not compete.
        counts: how many to take per row of the batch; at least that many keys must compete.

    Returns: (batch, heads, max(counts)) int64, -1 past a row's count. Ties are broken as torch.topk
        does.
    """
    # One topk for all rows, as wide as the largest count; shorter rows are blanked afterwards.
    order = scores.topk(max(counts, default=0), dim=-1).indices
    return _blank(order, [0] * len(counts), counts)


def between(order: Tensor, first: Sequence[int], last: Sequence[int]) -> Tensor:
    """Entries first[b] .. last[b] - 1 of each row of `order`, moved to the end.

    -1 in front of shorter rows.

    Args:
        first: first entry of each row.
        last: entry behind the last of each row.
        order: (batch, heads, n) as `best` returns it.

    Returns:
        (batch, heads, max(last - first)) int64, in reverse order.
    """
    sizes = [b - a for a, b in zip(first, last, strict=True)]
    width = max(sizes, default=0)
    start = torch.tensor(list(first), device=order.device)[:, None, None]
    # (batch, heads, width): row b counts up from first[b].
    index = start + torch.arange(width, device=order.device).expand(
        order.shape[0], order.shape[1], width
    )
    # Past the end of short rows any entry is read; `_blank` makes it -1. The flip then brings these
    # to the front, and with them the contents into reverse order.
    taken = order.gather(-1, index.clamp_max(max(order.shape[-1] - 1, 0))) if width else index
    return _blank(taken, [0] * len(sizes), sizes).flip(-1)


def newest_and_best(
    scores: Tensor, positions: Tensor, counts: Sequence[int], recent: Sequence[int]
) -> Tensor:
    """The `recent[b]` newest keys of row b, and the best-scored of the others, `counts[b]` in all.

    Args:
        counts: keys to keep of each row.
        recent: how many of these are the newest ones.
        scores: (batch, heads, keys), -inf at keys that do not compete.
        positions: (batch, 1 or heads, keys) sequence index of each key.

    Returns:
        (batch, heads, max(counts)) int64, -1 in front of rows with fewer.
    """
    # Newest means largest position; keys that do not compete have position -1 and are never newest.
    competing = torch.where(scores > -torch.inf, positions.expand_as(scores), -1)
    newest = best(competing, [min(r, n) for r, n in zip(recent, counts, strict=True)])
    # One column more takes the -1 of rows that protect fewer keys, and is cut off again.
    safe = torch.zeros(
        *scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool, device=scores.device
    )
    safe.scatter_(-1, torch.where(newest < 0, scores.shape[2], newest), True)
    return between(
        best(scores.masked_fill(safe[..., :-1], torch.inf), counts), [0] * len(counts), counts
    )


def members(mask: Tensor, width: int) -> Tensor:
    """Indices of the True entries in ascending order, -1 in front of rows with fewer than `width`.

    Args:
        width: number of keys, the last axis of the result.
        mask: (batch, heads, keys) bool, at most `width` True per row.
    """
    # Ranks count from 1, so that 0 stands for "no member": topk takes the members, largest first,
    # then zeros; flipped, zeros (-1 after the subtraction) come first and members ascend.
    rank = torch.where(mask, torch.arange(1, mask.shape[-1] + 1, device=mask.device), 0)
    return rank.topk(width, dim=-1).values.flip(-1) - 1


def _blank(order: Tensor, first: Sequence[int], last: Sequence[int]) -> Tensor:
    """`order` with -1 outside first[b] .. last[b] - 1."""
    if all(a == 0 and b >= order.shape[-1] for a, b in zip(first, last, strict=True)):
        return order
    bounds = torch.tensor([list(first), list(last)], device=order.device)[:, :, None, None]
    column = torch.arange(order.shape[-1], device=order.device)
    return torch.where((column >= bounds[0]) & (column < bounds[1]), order, -1)


class State(IntEnum):
    """What has become of a position, in one layer, after one step."""

    PADDING = -1
    MINOR = 0
    """dropped for good"""
    SECONDARY = 1
    """held in memory, attended at refresh steps only"""
    CORE = 2
    """held and attended at every step"""


@dataclass(eq=False)
class _Event:
    """One change in a layer, as `SelectionLog.note` describes it."""

    step: int
    kind: str
    what: Tensor


@dataclass(eq=False)
class Selection:
    """Which positions each layer holds and attends, after every step of the latest conversation.

    Attributes:
        layout: layout of all positions seen so far.
        layers: indices of the layers a policy acts on.
    """

    layout: TokenLayout
    layers: tuple[int, ...]
    _lengths: list[int] = field(default_factory=list, repr=False)
    _events: dict[int, list[_Event]] = field(default_factory=dict, repr=False)
    _arrivals: dict[int, int] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> int:
        """Decode steps so far; step 0 is the prompt."""
        return len(self._lengths) - 1

    def state(self, layer: int, step: int | None = None) -> Tensor:
        """State of every position after decode step `step` (default: the latest).

        Returns: (batch, heads, length) int8 of `State`; heads is 1 where all key/value heads hold
            the same keys. Tokens generated up to that step are included.

        Raises:
            ValueError: a layer no policy acted on, or a step that has not been.
        """
        step = self.steps if step is None else step
        if layer not in self._events:
            raise ValueError(
                f"no policy acted on layer {layer}; layers with a selection: {sorted(self._events)}"
            )
        if not 0 <= step <= self.steps:
            raise ValueError(
                f"step must be 0 (the prompt) to {self.steps} (the latest); got {step}"
            )
        events = self._events[layer]
        # Events with one set for all heads are repeated where another event has one per head.
        heads = max(event.what.shape[1] for event in events if event.what.dim() == 3)
        first, length = events[0].what, self._lengths[step]
        image = self.layout.mask(Modality.IMAGE)[:, None].to(first.device)
        state = torch.zeros(
            first.shape[0], heads, self.layout.length + 1, dtype=torch.int8, device=first.device
        )
        for event in self._in_order(layer):
            if event.kind == "rows":  # also later ones: rows are told as their ancestors' history
                state = state.index_select(0, event.what)
                continue
            if event.step > step:
                continue
            if event.kind == "held":
                state.fill_(int(State.MINOR))
            elif event.kind == "core":
                state[..., :-1].masked_fill_(
                    (state[..., :-1] == State.CORE) & image, int(State.SECONDARY)
                )
            # What is no position goes to one more column, which is cut off in the end.
            index = torch.where(event.what < 0, self.layout.length, event.what).long()
            index = index.to(state.device).expand(state.shape[0], heads, -1)
            state.scatter_(-1, index, int(_AFTER[event.kind]))
        hidden = ~self.layout.valid[:, None, :length].to(state.device)
        return state[..., :length].masked_fill(hidden, int(State.PADDING))

    def _in_order(self, layer: int) -> Iterator[_Event]:
        """Events of a layer, and in front of those of a step the token that arrived in it."""
        events, at = self._events[layer], 0
        for step, position in sorted(self._arrivals.items()):
            while at < len(events) and events[at].step < step:
                yield events[at]
                at += 1
            yield _Event(step, "added", torch.tensor([[[position]]]))
        yield from events[at:]

    def images(self, state: State, layer: int, step: int | None = None) -> list[list[int]]:
        """Image positions of each row that are in `state` in the given layer after the given step.

        Where key/value heads differ, a position counts as what it is to the head that treats it
        best.
        """
        states = self.state(layer, step).amax(1)
        image = self.layout.mask(Modality.IMAGE)[:, : states.shape[1]].to(states.device)
        return [row.nonzero().flatten().tolist() for row in (states == state) & image]


class SelectionLog(Selection):
    """The selection while it is being written, pass by pass."""

    def begin(self, step: int, layout: TokenLayout) -> None:
        """A pass begins; a later turn's prompt belongs to the step before it."""
        self.layout = layout
        self._lengths[step:] = [layout.length]

    def arrive(self, position: int) -> None:
        """Every layer takes in the token of a decode step, in every row and head."""
        self._arrivals[self.steps] = position

    def note(self, layer: int, kind: str, what: Tensor) -> None:
        """Write an event down.

        Args:
            layer: index of the decoder layer.
            kind: "held", "core" (both replace what was), "kept", "added" or "dropped", or "rows".
            what: positions (batch, heads, n), -1 for none; for "rows" (batch,) indices, after which
                row i of the batch continues what was row what[i].
        """
        self._events.setdefault(layer, []).append(_Event(self.steps, kind, what))


_AFTER = {
    "held": State.SECONDARY,
    "kept": State.SECONDARY,
    "core": State.CORE,
    "added": State.CORE,
    "dropped": State.MINOR,
}
