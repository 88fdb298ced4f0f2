"""A new core: image keys are ranked anew and change places between the segments of a buffer.

The best become core, the next secondary, the others quantised. The sizes of the segments stay as
they are, so keys are swapped in place, and only those that move are touched.

Several index spaces meet here, all counted from 0 within one row:

    slot          of the buffer: padding, secondary keys, free slots, core, always attended
    place         of the quantised tier; a row's keys stand at the end, behind its empty places
    column        of the scores: all places of the tier, then slots from the first used one on
    rank index    of a list of candidates, for example of the row's secondary keys
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avl.buffer import KeyBuffer
from avl.kernels.slots import among_best, exchange_best


def refresh_core(buffer: KeyBuffer, scores: Tensor, rows: Sequence[bool] | None = None) -> None:
    """Exchange image keys so that the best are core, the next secondary and the others quantised.

    Args:
        buffer: changed in place.
        scores: (batch, 1, keys) importance, one for every slot that a refresh step reads.
        rows: which rows of the batch; None: all.
    """
    for row in range(len(buffer.core_spans)):
        if rows is None or rows[row]:
            _refresh_row(buffer, row, scores[row, 0])


def _refresh_row(buffer: KeyBuffer, row: int, scores: Tensor) -> None:
    """A new core for one row.

    Args:
        buffer: changed in place.
        row: of the batch.
        scores: (keys,) one for every slot that a refresh step reads.
    """
    padding, (start, stop) = buffer.padding_slots[row], buffer.core_spans[row]
    tier_width, front = buffer.quantized_width, buffer.first_used_slot
    secondary, core = buffer.secondary_width - padding, stop - start
    # Columns of the scores: first the tier's places, then the slots from `front` on.
    # Slot s has column tier_width + s - front.
    columns = tier_width + padding - front, tier_width + start - front
    if buffer.quantized is not None:
        # The row's keys stand at the end of the tier's places, behind its empty ones.
        held = buffer.quantized_held[row]
        in_buffer = torch.cat(
            [scores.narrow(0, columns[0], secondary), scores.narrow(0, columns[1], core)]
        )
        scores = _exchange_with_tier(
            buffer, row, scores[tier_width - held : tier_width], in_buffer, secondary
        )
        columns = 0, secondary
    keep = buffer.secondary_scores is not None or buffer.core_scores_at_refresh is not None
    # Secondary keys stand behind the row's padding, the core from `start` on.
    kept = exchange_best(
        buffer.slot_table, row, scores, columns, (padding, start), (secondary, core), keep=keep
    )
    if kept is not None and buffer.secondary_scores is not None:
        buffer.secondary_scores[row, padding : buffer.secondary_width] = kept[:secondary]
    if kept is not None and buffer.core_scores_at_refresh is not None:
        # Rows with a smaller core have their scores at the end, as `core_positions` has them.
        width = buffer.core_scores_at_refresh.shape[2]
        first = width - (stop - start)
        buffer.core_scores_at_refresh[row, :, first:] = kept[secondary:]


def _exchange_with_tier(
    buffer: KeyBuffer, row: int, quantized: Tensor, in_buffer: Tensor, secondary: int
) -> Tensor:
    """Exchange keys with the quantised tier so that the best are in the buffer.

    Args:
        buffer: changed in place.
        row: of the batch.
        quantized: scores of the row's quantised keys.
        in_buffer: scores of its secondary keys, then of its core keys.
        secondary: number of its secondary keys.

    Returns:
        Scores of the secondary and of the core keys after the exchange.
    """
    tier = buffer.quantized
    assert tier is not None
    # First who is in full precision at all; which of these are core is decided afterwards, by the
    # caller, from the scores that are returned.
    best = among_best(torch.cat([quantized, in_buffer]), len(in_buffer))
    entering = best[: len(quantized)].nonzero()[:, 0]  # numbers among the quantised keys
    leaving = (~best[len(quantized) :]).nonzero()[:, 0]  # numbers among those in the buffer
    if not len(entering):
        return in_buffer
    secondary_slots = torch.arange(buffer.padding_slots[row], buffer.secondary_width)
    core_slots = torch.arange(*buffer.core_spans[row])
    # Numbers among the keys in the buffer become slots, numbers among the tier's keys places.
    slots = torch.cat([secondary_slots, core_slots]).to(leaving.device)[leaving]
    places = entering + (tier.width - buffer.quantized_held[row])
    # Taken out before anything is put in: the places of the entering keys are where the leaving go.
    keys, values = tier.take(row, places)
    positions = tier.positions[row].index_select(1, places)
    tensors = (buffer.keys[row], buffer.values[row], buffer.positions[row])
    tier.put(row, places, *(tensor.index_select(1, slots) for tensor in tensors))
    for tensor, new in zip(tensors, (keys, values, positions), strict=True):
        # The tier may keep one set of positions for all heads where the buffer has one per head.
        tensor.index_copy_(1, slots, new.expand(tensor.shape[0], *new.shape[1:]))
    return in_buffer.index_copy(0, leaving, quantized[entering])
