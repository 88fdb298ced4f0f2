"""Writing a new key into a slot of a buffer, and swapping the keys of slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avl.kernels.backend import COMPILED, backend_for
from avl.kernels.tables import SlotTable, scratch


def write_slot(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scores: Tensor | None,
    slot: int,
    new: tuple[Tensor, Tensor, int, float],
) -> None:
    """Write one key and value of every row and head into a slot, in place.

    Args:
        keys: (batch, key/value heads, slots, width).
        values: (batch, key/value heads, slots, width of a value).
        positions: (batch, heads, slots) int32, contiguous.
        scores: (batch, heads, slots) float32, contiguous, or None.
        slot: which slot.
        new: key (batch, key/value heads, 1, width), value, position, and score.
    """
    key, value, position, score = new
    same = key.dtype == keys.dtype == value.dtype == values.dtype
    packed = key.stride(3) == 1 and value.stride(3) == 1
    if not (same and packed) or backend_for(keys.device) != COMPILED:
        keys.narrow(2, slot, 1).copy_(key)
        values.narrow(2, slot, 1).copy_(value)
        positions.select(2, slot).fill_(position)
        if scores is not None:
            scores.select(2, slot).fill_(score)
        return
    from avl.kernels import slots_compiled  # importing numba takes a while

    batch, heads, _, width = keys.shape
    # Copied as bytes: then one compiled version does for every precision.
    slots_compiled.write_slot(
        (batch, heads),
        slot,
        key.element_size(),
        keys.data_ptr(),
        keys.stride(),
        key.data_ptr(),
        key.stride(),
        width,
        values.data_ptr(),
        values.stride(),
        value.data_ptr(),
        value.stride(),
        value.shape[3],
        positions.data_ptr(),
        positions.shape[1],
        positions.shape[2],
        position,
        0 if scores is None else scores.data_ptr(),
        float(score),
    )


def add_received(scores: Tensor, weights: Tensor, slots: slice, first: int) -> None:
    """Add what the keys in some slots received to their scores, in place.

    Args:
        scores: (batch, key/value heads, slots) float32, contiguous.
        weights: (batch, key/value heads, query heads of each, keys) float32; summed over the query
            heads.
        slots: which slots, one behind the other.
        first: key of the first of them; the keys behind it are those of the next slots.
    """
    compiled = backend_for(scores.device) == COMPILED and weights.is_contiguous()
    if not compiled or weights.dtype != torch.float32 or scores.shape[:2] != weights.shape[:2]:
        scores[:, :, slots].add_(weights[..., first:].sum(2))
        return
    from avl.kernels import slots_compiled  # importing numba takes a while

    batch, heads, shared, keys = weights.shape
    lines = batch * heads, scores.shape[2], shared, keys
    slots_compiled.add_received(
        scores.data_ptr(), weights.data_ptr(), lines, slots.start, slots.stop, first
    )


def drop_worst(
    positions: Tensor, scores: Tensor, start: int, stop: int, newest: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Empty the slot of the worst key of each row and head, in place.

    Protected keys, whose score is infinite, are dropped only when nothing else is left; empty slots
    and safe keys never, unless there is nothing else at all.

    Args:
        positions: (batch, heads, slots) int32, contiguous, -1 for an empty slot.
        scores: (batch, heads, slots) float32, contiguous.
        start: first slot to look at; `stop` the one behind the last.
        newest: keys at this position or later are safe; a number, or (batch, 1, 1).

    Returns:
        Slots (batch, heads, 1) int64 and the positions that were there, int32.
    """
    if isinstance(newest, int) and backend_for(positions.device) == COMPILED:
        from avl.kernels import slots_compiled  # importing numba takes a while

        batch, heads, capacity = positions.shape
        slots = torch.empty(batch, heads, 1, dtype=torch.int64)
        dropped = torch.empty(batch, heads, 1, dtype=torch.int32)
        # A threshold of its own for each row is left to the plain version: it is rare.
        addresses = [part.data_ptr() for part in (positions, scores, slots, dropped)]
        lines = batch * heads, capacity
        slots_compiled.drop_worst(*addresses[:2], *lines, start, stop, newest, *addresses[2:])
        return slots, dropped
    own = positions[..., start:stop]
    finite = scores[..., start:stop].clamp_max(torch.finfo(scores.dtype).max)
    worst = finite.masked_fill_((own >= newest) | (own < 0), torch.inf).argmin(2, keepdim=True)
    dropped = own.gather(2, worst)
    own.scatter_(2, worst, -1)
    return worst + start, dropped


def exchange_best(
    table: SlotTable, row: int, slots: tuple[int, int], scores: tuple[Tensor, Tensor], *, keep: bool
) -> Tensor | None:
    """Swap keys of two segments of a row so that the second holds the best of both, in place.

    As many enter the second segment as leave it, because its size stays: entering and leaving keys
    are of one number and swap pairwise, in the order of their slots. Which of equal scores are
    among the best is left open; in the compiled version keys of the second segment stay there.

    Args:
        table: of keys, values and positions, contiguous.
        row: of the batch.
        slots: first slot of either segment.
        scores: of the keys of the first segment, (n,), and of the second, (m,).
        keep: whether scores are returned.

    Returns:
        (n + m,) scores of the keys that are now in the first segment, then of the others; None if
        they are not wanted.
    """
    first, second = scores
    others, count = first.shape[0], second.shape[0]
    size = table.keys.element_size()
    # In words of 32 bits; a head of an odd number of bfloat16 numbers has half a word left.
    words = table.width * size % 4 == 0 and table.value_width * size % 4 == 0
    packed = first.is_contiguous() and second.is_contiguous()
    if table.compiled and words and packed and first.dtype == torch.float32:
        from avl.kernels import slots_compiled  # importing numba takes a while

        kept = torch.empty(others + count, dtype=torch.float32) if keep else None
        # Scores that follow their keys, and twice as many slots as there are pairs.
        scratch_at = scratch(others + 3 * count)
        slots_compiled.exchange_best(
            table.address,
            size,
            row,
            *slots,
            first.data_ptr(),
            others,
            second.data_ptr(),
            count,
            scratch_at if kept is None else kept.data_ptr(),
            scratch_at + 4 * (others + count),
        )
        return kept
    joined = torch.cat([first, second])
    best = joined.topk(count).indices
    chosen = torch.zeros_like(joined, dtype=torch.bool).index_fill_(0, best, True)
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
