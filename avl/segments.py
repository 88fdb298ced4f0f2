"""Which key lies in which segment of a layer's buffer: laid out once per prompt, exchanged at
refreshes.

`fill` lays the keys a policy chose out as `[far | core | rest]`, the cold ones in their own tier.
`recore` ranks image keys anew: the best become core, the next `far`, the others cold. Sizes stay as
they are, so keys are swapped in place, and only those that move are touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from avl.buffer import KeyBuffer, roomy
from avl.policies.base import Choice
from avl.quantized_tier import ColdTier


def fill(
    buffer: KeyBuffer, keys: Tensor, values: Tensor, positions: Tensor, choice: Choice, heads: int
) -> None:
    """Hold the chosen ones of `keys`, (batch, key/value heads, n, head dim), and nothing else.

    Args:
        positions: (batch, 1 or heads, n) of `keys`.
        heads: 1 if all key/value heads will always hold the same keys, else their number.
    """
    far = choice.far if choice.far is not None else choice.rest[0][..., :0]
    near = _compact([part for part in (choice.core, *choice.rest) if part is not None])
    buffer.far = far.shape[2]
    buffer.filled = buffer.far + sum(part.shape[2] for part in near)
    batch, capacity = keys.shape[0], roomy(buffer.filled)
    buffer.keys = keys.new_empty(*keys.shape[:2], capacity, keys.shape[3])
    buffer.values = values.new_empty(*values.shape[:2], capacity, values.shape[3])
    buffer.positions = torch.full(
        (batch, heads, capacity), -1, dtype=torch.int32, device=keys.device
    )
    buffer.scores = (
        None if choice.scores is None else torch.zeros(batch, heads, capacity, device=keys.device)
    )
    start = 0
    for part in (far, *near):
        to = slice(start, start + part.shape[2])
        start = to.stop
        _take(keys, part, buffer.keys[:, :, to])
        _take(values, part, buffer.values[:, :, to])
        shared = max(part.shape[1], positions.shape[1]) == 1
        at = part.clamp_min(0).expand(-1, 1 if shared else heads, -1)
        buffer.positions[:, :, to] = (
            positions.expand(-1, at.shape[1], -1).gather(2, at).masked_fill(part < 0, -1)
        )
        if choice.scores is not None:
            buffer.scores[:, :, to] = choice.scores.expand(-1, heads, -1).gather(
                2, at.expand(-1, heads, -1)
            )
    empty = buffer.positions[:, 0, : buffer.filled] < 0
    buffer.missing = empty[:, : buffer.far].sum(1).tolist()
    buffer.holes = empty[:, buffer.far :].sum(1).tolist()
    buffer.worth = buffer.free = None
    if choice.worth is not None:
        buffer.worth = choice.worth[:, 0].gather(1, far[:, 0].clamp_min(0)).float()
    sizes = [0] * batch if choice.core is None else (choice.core[:, 0] >= 0).sum(1).tolist()
    buffer.cores = [
        (buffer.far + a, buffer.far + a + n) for a, n in zip(buffer.holes, sizes, strict=True)
    ]
    buffer.core_heads = 1 if choice.core is None else choice.core.shape[1]
    buffer.cold, buffer.held_cold = None, [0] * batch
    if choice.cold is not None and choice.cold.shape[2]:
        image = [part for part in (choice.far, choice.core) if part is not None]
        buffer.cold = ColdTier.hold(choice.kind, keys, values, positions, choice.cold, image)
        buffer.held_cold = buffer.cold.held()
    buffer.few = list(choice.few) or [0] * batch
    buffer.reference = None
    if choice.reference is not None and choice.core is not None:
        at = choice.core
        buffer.reference = choice.reference.gather(2, at.clamp_min(0)).masked_fill(at < 0, 0.0)
    buffer.evictable = list(choice.evictable) or buffer.held()
    buffer.share = list(choice.share) or [1.0] * batch


def recore(buffer: KeyBuffer, scores: Tensor, rows: Sequence[bool] | None = None) -> None:
    """Exchange image keys so that the best are core, the next `far` and the others cold.

    Args:
        scores: (batch, 1 or heads, keys), one for every slot a whole step reads, all of them.
        rows: which rows of the batch; None: all.
    """
    for row in range(len(buffer.cores)):
        if rows is None or rows[row]:
            for head in range(scores.shape[1]):
                which = slice(None) if scores.shape[1] == 1 else slice(head, head + 1)
                _recore_row(buffer, row, which, scores[row, head])


def _recore_row(buffer: KeyBuffer, row: int, head: slice, seen: Tensor) -> None:
    missing, (start, stop) = buffer.missing[row], buffer.cores[row]
    width, front = buffer.cold_width, buffer.front
    near = seen[width:]
    far, core = near[missing - front : buffer.far - front], near[start - front : stop - front]
    if buffer.cold is not None:
        far, core = _warm(buffer, row, head, seen[width - buffer.held_cold[row] : width], far, core)
    best = _best(torch.cat([far, core]), len(core))
    enter = best[: len(far)].nonzero()[:, 0] + missing
    leave = (~best[len(far) :]).nonzero()[:, 0] + start
    _exchange(
        (buffer.keys[row, head], buffer.values[row, head], buffer.positions[row, head]),
        enter,
        leave,
    )
    if buffer.worth is not None:
        buffer.worth[row, missing : buffer.far] = far
        buffer.worth[row, enter] = core[leave - start]
    if buffer.reference is not None:
        core = core.index_copy(0, leave - start, far[enter - missing])
        heads = buffer.reference[row] if head.start is None else buffer.reference[row, head]
        heads[..., buffer.reference.shape[2] - len(core) :] = core


def _warm(
    buffer: KeyBuffer, row: int, head: slice, cold: Tensor, far: Tensor, core: Tensor
) -> tuple[Tensor, Tensor]:
    """Exchange keys with the cold tier so that the best are in the buffer; returns the scores of
    far and core.
    """
    assert buffer.cold is not None
    held = torch.cat([far, core])
    best = _best(torch.cat([cold, held]), len(held))
    enter, leave = best[: len(cold)].nonzero()[:, 0], (~best[len(cold) :]).nonzero()[:, 0]
    if not len(enter):
        return far, core
    slots = torch.cat(
        [torch.arange(buffer.missing[row], buffer.far), torch.arange(*buffer.cores[row])],
    ).to(leave.device)[leave]
    places = enter + buffer.cold_width - buffer.held_cold[row]
    keys, values = buffer.cold.take(row, head, places)
    positions = buffer.cold.positions[row, head].index_select(1, places)
    buffers = (buffer.keys[row, head], buffer.values[row, head], buffer.positions[row, head])
    buffer.cold.put(row, head, places, *(tensor.index_select(1, slots) for tensor in buffers))
    for tensor, new in zip(buffers, (keys, values, positions), strict=True):
        tensor.index_copy_(1, slots, new.expand(tensor.shape[0], *new.shape[1:]))
    held = held.index_copy(0, leave, cold[enter])
    return held[: len(far)], held[len(far) :]


def _best(scores: Tensor, count: int) -> Tensor:
    """(n,) bool: the `count` largest of some scores."""
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(
        0, scores.topk(count).indices, True
    )


def _exchange(tensors: Sequence[Tensor], one: Tensor, other: Tensor) -> None:
    """Swap slots one[i] and other[i] of every head of contiguous (heads, slots, ...) tensors, in
    place.

    As rows of one long list: on CPU indices into a middle dimension are followed number by number,
    these row by row.
    """
    heads, slots = tensors[0].shape[:2]
    first = torch.arange(0, heads * slots, slots, device=one.device)[:, None]
    there, here = first + torch.cat([one, other]), first + torch.cat([other, one])
    for tensor in tensors:
        rows, count = tensor.view(-1, *tensor.shape[2:]), tensor.shape[0]
        rows.index_copy_(0, there[:count].flatten(), rows.index_select(0, here[:count].flatten()))


def _compact(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same index sets, joined with all -1 in front if any row has some."""
    if not any(bool((part < 0).any()) for part in parts):
        return parts
    heads = max(part.shape[1] for part in parts)
    index = torch.cat([part.expand(-1, heads, -1) for part in parts], 2)
    index = index.gather(2, (index >= 0).to(torch.uint8).argsort(dim=2, stable=True))
    return [index[..., int((index < 0).sum(2).amin()) :]]


def _take(source: Tensor, index: Tensor, out: Tensor) -> None:
    """out[b, h, i] = source[b, h, index[b, h, i]], index (batch, 1 or heads, n); any finite value
    where index < 0.
    """
    index = index.clamp_min(0)
    if index.shape[1] == 1:
        for row, at in enumerate(index[:, 0]):
            torch.index_select(source[row], 1, at, out=out[row])
        return
    b = torch.arange(source.shape[0], device=source.device)[:, None, None]
    h = torch.arange(source.shape[1], device=source.device)[None, :, None]
    out.copy_(source[b, h, index])
