"""Keys of a layer outside its buffer: in a few bits, or in host memory.

A refresh step, which reads everything held, reads them too.

Quantised as in KIVI (Liu et al., ICML 2024, arXiv 2402.02750): keys per channel, because some
channels of keys are large in all tokens; values per token. That the less salient tokens of a
vision-language model bear few bits is AKVQ-VL's point (arXiv 2501.15021, which rotates outliers
away first; that is not done here). How numbers are stored in few bits, and how a step attends to
them without decoding them, is the business of `avl.kernels.codes`; here is which keys share limits.
A group of keys is `KEY_GROUP` consecutive image tokens of one channel; a group of values is
`VALUE_GROUP` channels of one token (all channels where that does not divide them). KIVI takes 32
and 32; longer key groups cost less and lost nothing measurable on the embedded model.

The limits of a key group are taken over all its image tokens, wherever they are held, so that a key
that leaves the tier and comes back is stored as it was. A tier in host memory saves nothing while
the model itself runs there, and `nbytes` says so.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avl.kernels import codes
from avl.kernels.row_attention import Codes

KEY_GROUP = 128
"""Image tokens that share the limits of a key's channel."""
VALUE_GROUP = 32
"""Channels that share the limits of a value."""
HOST, PLAIN = "host", 16
"""Kept as they are: in host memory, or (for comparison) beside the others."""

_NONE = torch.iinfo(torch.int32).max  # where a row has fewer image keys; sorts behind all positions
_BLOCK = 64  # keys decoded at once, so that what lies in between stays in the processor's cache

Storage = int | str | tuple[int, int]
"""How a tier keeps what it holds: in 8, 4 or 2 bits (or in so many for keys and for values),
`PLAIN` or `HOST`.
"""


def code_bits(storage: Storage) -> tuple[int, int] | None:
    """Bits of a stored number of a key and of a value; None where nothing is coded."""
    if storage in (PLAIN, HOST) or isinstance(storage, str):
        return None
    return storage if isinstance(storage, tuple) else (storage, storage)


@dataclass(eq=False)
class QuantizedTier:
    """Keys and values of one layer that are not in its buffer.

    Attributes:
        kind: see `Storage`.
        bits: of a key's and of a value's numbers; None if not coded.
        positions: (batch, 1 or heads, n) int32 sequence index of each key, -1 (in front) where a
            row has fewer.
        groups: same shape, number of the key's group.
        image: (batch, 1 or heads, m) int32 positions of all image keys that are held anywhere,
            ascending; what numbers the groups.
        moving: tensors with one entry per key, (batch, heads, n, width): codes of keys and values,
            limits of values.
        limits: (batch, heads, groups, 2, key width) half precision, low and step of every channel;
            None if not coded.
        widths: key width and value width.
        dtype, device: of the keys that are read.
    """

    kind: Storage
    positions: Tensor
    groups: Tensor
    image: Tensor
    moving: list[Tensor]
    limits: Tensor | None
    widths: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    _codes: Codes | None = None
    _viewed: Sequence[Tensor] = ()

    @classmethod
    def hold(
        cls,
        kind: Storage,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        chosen: Tensor,
        image: Sequence[Tensor],
    ) -> QuantizedTier:
        """Store the chosen ones of `keys` and `values`, (batch, heads, keys, width).

        Args:
            kind: bits of keys and values, 16, or "host".
            keys: (batch, heads, keys, head dim).
            values: (batch, heads, keys, head dim).
            positions: (batch, 1 or heads, keys).
            chosen: (batch, 1 or heads, n) indices, -1 (in front) for nothing.
            image: index sets of all image keys that are held anywhere, likewise.
        """
        heads = max(chosen.shape[1], positions.shape[1])
        chosen = chosen.expand(-1, heads, -1)
        # Indices of all image keys in ascending order, those that are none behind all others. A
        # key's group is its rank in this list, whether it is now in the tier or in full precision.
        everywhere = torch.cat([part.expand(-1, heads, -1) for part in (*image, chosen)], 2)
        everywhere = everywhere.masked_fill(everywhere < 0, _NONE).sort(-1).values
        all_positions = _positions(
            positions, everywhere.masked_fill(everywhere == _NONE, -1), _NONE
        )
        where = _positions(positions, chosen, -1)
        tier = cls(
            kind,
            where,
            _groups(all_positions, where),
            all_positions,
            [],
            None,
            (keys.shape[3], values.shape[3]),
            keys.dtype,
            keys.device,
        )
        if tier.bits is not None:
            # Limits are taken over whole groups, not only over the keys that are stored now (see
            # above).
            index = everywhere.masked_fill(everywhere == _NONE, -1)
            tier.limits = codes.key_limits(keys, index, KEY_GROUP, tier.bits[0])
        tier.moving = tier._encode(keys, values, chosen, tier.groups, tier.limits)
        return tier

    def __getstate__(self) -> dict[str, Any]:
        """Attributes for a copy, whose tensors lie elsewhere than `codes` says."""
        return {**vars(self), "_codes": None, "_viewed": ()}

    @property
    def bits(self) -> tuple[int, int] | None:
        return code_bits(self.kind)

    # -- what there is -----------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Slots, empty ones included."""
        return self.positions.shape[2]

    def held(self) -> list[int]:
        """Keys per row of the batch."""
        return (self.positions[:, 0] >= 0).sum(1).tolist()

    def tensors(self) -> list[Tensor]:
        """Everything that stands for keys and values."""
        return self.moving if self.limits is None else [*self.moving, self.limits]

    def nbytes(self, *, host: bool) -> int:
        """Bytes of keys and values on the model's device.

        With `host`, those in host memory beside another device.
        """
        return sum(t.nbytes for t in self.tensors() if (t.device != self.device) == host)

    def bytes_by_row(self, counts: Sequence[int]) -> list[float]:
        """Bytes of keys and values of rows that hold so many keys; empty slots are no row's."""
        # Bytes of one slot over all heads; limits belong to a row as a whole and count once it
        # holds any key.
        slot = sum(t.nbytes for t in self.moving) / max(self.positions.shape[0] * self.width, 1)
        limits = 0.0 if self.limits is None else self.limits.nbytes / self.limits.shape[0]
        return [count * slot + (limits if count else 0.0) for count in counts]

    # -- reading and exchanging --------------------------------------------------------------------

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, (batch, heads, n, width), in the model's precision.

        Empty slots are finite.
        """
        moving = [part.to(self.device) for part in self.moving]
        if self.limits is None:
            return moving[0], moving[1]
        keys, values = (
            moving[0].new_empty(*moving[0].shape[:3], width, dtype=self.dtype)
            for width in self.widths
        )
        # Decoded block by block: unpacked codes are 4 to 16 times as large as stored ones.
        for start in range(0, self.width, _BLOCK):
            block = slice(start, start + _BLOCK)
            stored = [part[:, :, block] for part in moving]
            keys[:, :, block], values[:, :, block] = self._decode(
                stored, self.groups[..., block], self.limits
            )
        return keys, values

    def products(self, query: Tensor) -> Tensor:
        """Products of queries with the keys of all slots of a tier of codes.

        Queries (batch, query heads, width); products (batch, query heads, n) float32. Those of
        empty slots mean nothing.
        """
        assert self.bits is not None
        assert self.limits is not None
        return codes.key_products(query, self.moving[0], self.groups, self.limits, self.bits[0])

    def weighted_values(self, weights: Tensor) -> Tensor:
        """Values of all slots of a tier of codes, summed by weights.

        Weights (batch, query heads, n); sums (batch, query heads, width) float32.
        """
        assert self.bits is not None
        _, stored, limits = self.moving
        return codes.weighted_values(weights, stored, limits, self.bits[1], self.widths[1])

    def codes(self) -> Codes:
        """What a tier of codes holds, for attention that reads it as it is."""
        assert self.bits is not None
        assert self.limits is not None
        tensors = [self.groups, self.limits, *self.moving]
        # The arrays stay right while numbers are exchanged in place; `append` and `select` make
        # new tensors.
        known = len(tensors) == len(self._viewed)
        if not known or any(map(operator.is_not, tensors, self._viewed)):
            keys, values, value_limits = self.moving
            self._codes = Codes.of(keys, self.groups, self.limits, values, value_limits, self.bits)
            self._viewed = tensors if all(part.is_contiguous() for part in tensors) else []
        assert self._codes is not None
        return self._codes

    def take(self, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in some slots, (n,), of a row: (heads, n, width)."""
        stored = [
            part[row].index_select(1, slots.to(part.device)).to(self.device)[None]
            for part in self.moving
        ]
        limits = None if self.limits is None else self.limits[row : row + 1]
        groups = self.groups[row].index_select(1, slots)[None]
        keys, values = self._decode(stored, groups, limits)
        return keys[0], values[0]

    def put(self, row: int, slots: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Write keys and values into some slots of a row.

        Args:
            row: of the batch.
            slots: (n,) indices.
            keys: (heads, n, width).
            values: (heads, n, width).
            positions: (1 or heads, n) of the tokens they belong to.
        """
        # The tier may keep one set of positions for all heads.
        positions = positions[: self.positions.shape[1]].contiguous()
        # The group follows from the position alone, so a key that returns gets its old limits and
        # with them its old codes.
        groups = _groups(self.image[row], positions)
        limits = None if self.limits is None else self.limits[row : row + 1]
        every = torch.arange(len(slots), device=keys.device).view(1, 1, -1)
        encoded = self._encode(keys[None], values[None], every, groups[None], limits)
        for part, new in zip(self.moving, encoded, strict=True):
            part[row].index_copy_(1, slots.to(part.device), new[0])
        self.positions[row].index_copy_(1, slots, positions)
        self.groups[row].index_copy_(1, slots, groups)

    def append(self, other: QuantizedTier) -> None:
        """Hold what another tier of the same kind holds, too, behind one's own.

        The groups stay apart, and empty places of rows with fewer keys are no longer all in front;
        `put` is not meant for a tier that was appended to.
        """
        # Group numbers index the second axis of `limits`; those of the other tier come behind one's
        # own.
        groups = 0 if self.limits is None else self.limits.shape[2]
        self.groups = torch.cat([self.groups, other.groups + groups], 2)
        self.positions = torch.cat([self.positions, other.positions], 2)
        self.image = torch.cat([self.image, other.image], 2)
        pairs = zip(self.moving, other.moving, strict=True)
        self.moving = [torch.cat(pair, 2) for pair in pairs]
        if self.limits is not None and other.limits is not None:
            self.limits = torch.cat([self.limits, other.limits], 2)

    def select(self, rows: Tensor) -> None:
        """Row i of the batch now is what was row rows[i]."""
        for name in ("positions", "groups", "image"):
            setattr(self, name, getattr(self, name).index_select(0, rows))
        self.moving = [part.index_select(0, rows.to(part.device)) for part in self.moving]
        self.limits = None if self.limits is None else self.limits.index_select(0, rows)

    # -- codes -------------------------------------------------------------------------------------

    def _encode(
        self, keys: Tensor, values: Tensor, index: Tensor, groups: Tensor, limits: Tensor | None
    ) -> list[Tensor]:
        """What is stored of some keys and values.

        Args:
            keys: (batch, heads, keys, width).
            values: (batch, heads, keys, width).
            index: (batch, 1 or heads, n) which of them, -1 for an empty slot.
            groups: (batch, 1 or heads, n) of these keys.
            limits: of the groups, None if not coded.
        """
        if self.bits is None:
            taken = codes.taken_at(keys, index), codes.taken_at(values, index)
            return [part.cpu() if self.kind == HOST else part for part in taken]
        assert limits is not None
        own = codes.value_limits(values, index, _value_groups(self.widths[1]), self.bits[1])
        return [
            codes.store_keys(keys, index, groups, limits, self.bits[0]),
            codes.store_values(values, index, own, self.bits[1]),
            own,
        ]

    def _decode(
        self, stored: list[Tensor], groups: Tensor, limits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.bits is None:
            return stored[0], stored[1]
        assert limits is not None
        keys = codes.read_keys(stored[0], groups, limits, self.bits[0])
        values = codes.read_values(stored[1], stored[2], self.bits[1], self.widths[1])
        return keys.to(self.dtype), values.to(self.dtype)


def quantized_cost(
    kind: Storage, count: int, image: int, widths: tuple[int, int], itemsize: int
) -> float:
    """What `count` of `image` keys of a head cost in the tier, in full keys and values.

    A number of a full key has `itemsize` bytes.
    """
    if (bits := code_bits(kind)) is None:
        return float(count)
    key, value = widths
    # Bytes of one key: packed codes of key and value, and low and step (2 x 2 bytes of half
    # precision) of each group of the value's channels. Bytes of a group of keys: low and step per
    # channel of the key, for every begun group of the `image` keys.
    packed = codes.packed_width(key, bits[0]) + codes.packed_width(value, bits[1])
    of_keys = (packed + 4 * _value_groups(value)) * count
    limits = 4 * key * -(-image // KEY_GROUP)
    # In units of one key and value in full, which is what a budget in keys is counted in.
    return (of_keys + limits * (count > 0)) / ((key + value) * itemsize)


def _positions(positions: Tensor, index: Tensor, nothing: int) -> Tensor:
    """Positions at `index`, (batch, heads, n) int32; `nothing` where it is negative."""
    taken = positions.expand(-1, index.shape[1], -1).gather(2, index.clamp_min(0)).int()
    return taken.masked_fill(index < 0, nothing)


def _groups(image: Tensor, positions: Tensor) -> Tensor:
    """Group of each key.

    Its number among the image keys of its row (and head), in blocks of `KEY_GROUP`; int16.
    """
    return (torch.searchsorted(image.contiguous(), positions.contiguous()) // KEY_GROUP).to(
        torch.int16
    )


def _value_groups(width: int) -> int:
    return width // VALUE_GROUP if width % VALUE_GROUP == 0 else 1
