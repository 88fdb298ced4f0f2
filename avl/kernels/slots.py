"""Dropping a key from a slot of a buffer, and exchanging the keys of slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avl.kernels.tables import SlotTable, scratch


def drop_worst(
    table: SlotTable, start: int, stop: int, newest: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Empty the slot of the worst key of each row and head, in place.

    Protected keys, whose score is infinite, are dropped only when nothing else is left; empty slots
    and safe keys never, unless there is nothing else at all.

    Args:
        table: of positions, -1 for an empty slot, and scores.
        start: first slot to look at; `stop` the one behind the last.
        newest: keys at this position or later are safe; a number, or (batch, 1, 1).

    Returns:
        Slots (batch, heads, 1) int64 and the positions that were there, int32.
    """
    positions, scores = table.positions, table.scores
    assert positions is not None
    assert scores is not None
    if isinstance(newest, int) and table.compiled:
        from avl.kernels import slots_compiled  # importing numba takes a while

        # A threshold of its own for each row is left to the plain version: it is rare.
        shape = (*positions.shape[:2], 1)
        slots = torch.empty(shape, dtype=torch.int64)
        dropped = torch.empty(shape, dtype=torch.int32)
        found = slots.data_ptr(), dropped.data_ptr()
        slots_compiled.drop_worst(table.address, table.batch, start, stop, newest, *found)
        return slots, dropped
    own = positions[..., start:stop]
    finite = scores[..., start:stop].clamp_max(torch.finfo(scores.dtype).max)
    worst = finite.masked_fill_((own >= newest) | (own < 0), torch.inf).argmin(2, keepdim=True)
    dropped = own.gather(2, worst)
    own.scatter_(2, worst, -1)
    return worst + start, dropped


def among_best(scores: Tensor, count: int) -> Tensor:
    """(n,) bool: the `count` largest of some scores."""
    best = torch.zeros_like(scores, dtype=torch.bool)
    return best.index_fill_(0, scores.topk(count).indices, True)


def exchange_best(
    table: SlotTable,
    row: int,
    scores: Tensor,
    columns: tuple[int, int],
    slots: tuple[int, int],
    counts: tuple[int, int],
    *,
    keep: bool,
) -> Tensor | None:
    """Swap keys of two segments of a row so that the second holds the best of both, in place.

    As many enter the second segment as leave it, because its size stays: entering and leaving keys
    are of one number and swap pairwise, in the order of their slots. Which of equal scores are
    among the best is left open; in the compiled version keys of the second segment stay there.

    Args:
        table: of keys, values and positions, contiguous.
        row: of the batch.
        scores: (n,) of both segments' keys, among others.
        columns: where the scores of either segment begin.
        slots: first slot of either segment.
        counts: keys of either segment.
        keep: whether scores are returned.

    Returns:
        Scores of the keys that are now in the first segment, then of the others; None if they are
        not wanted.
    """
    others, count = counts
    size = table.keys.element_size()
    # In words of 32 bits; a head of an odd number of bfloat16 numbers has half a word left.
    words = table.width * size % 4 == 0 and table.value_width * size % 4 == 0
    packed = scores.is_contiguous() and scores.dtype == torch.float32
    if table.compiled and words and packed:
        from avl.kernels import slots_compiled  # importing numba takes a while

        kept = torch.empty(others + count, dtype=torch.float32) if keep else None
        # Scores that follow their keys, and twice as many slots as there are pairs.
        scratch_at, scores_at = scratch(others + 3 * count), scores.data_ptr()
        slots_compiled.exchange_best(
            table.address,
            size,
            row,
            *slots,
            scores_at + 4 * columns[0],
            others,
            scores_at + 4 * columns[1],
            count,
            scratch_at if kept is None else kept.data_ptr(),
            scratch_at + 4 * (others + count),
        )
        return kept
    joined = torch.cat([scores.narrow(0, *one) for one in zip(columns, counts, strict=True)])
    chosen = among_best(joined, count)
    entering = chosen[:others].nonzero()[:, 0]  # numbers among the first segment's keys
    leaving = (~chosen[others:]).nonzero()[:, 0]  # numbers among the second segment's keys
    assert table.positions is not None
    tensors = table.keys[row], table.values[row], table.positions[row]
    _swap_slots(tensors, entering + slots[0], leaving + slots[1])
    if not keep:
        return None
    moved = torch.cat([entering, leaving + others])
    joined[moved] = joined[torch.cat([leaving + others, entering])]
    return joined


def _swap_slots(tensors: Sequence[Tensor], first: Tensor, second: Tensor) -> None:
    """Swap slots first[i] and second[i] in every head, in place.

    The tensors are (heads, slots, ...), contiguous, the first with as many heads as any other. They
    are taken as one long list of rows: on a processor torch follows an index into a middle
    dimension number by number, an index into the first row by row.
    """
    heads, slots = tensors[0].shape[:2]
    # (heads, 1) + (2n,): for every head the rows to move, in the flat list of heads x slots.
    head_starts = torch.arange(0, heads * slots, slots, device=first.device)[:, None]
    targets = head_starts + torch.cat([first, second])
    sources = head_starts + torch.cat([second, first])
    for tensor in tensors:
        rows, count = tensor.view(-1, *tensor.shape[2:]), tensor.shape[0]
        moved = rows.index_select(0, sources[:count].flatten())
        rows.index_copy_(0, targets[:count].flatten(), moved)
