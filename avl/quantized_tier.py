"""Keys of a layer outside its buffer: in a few bits, or in host memory.

A refresh step, which reads everything held, reads them too.

Quantised as in KIVI (Liu et al., ICML 2024, arXiv 2402.02750): keys per channel, because some
channels of keys are large in all tokens; values per token. That the less salient tokens of a
vision-language model bear few bits is AKVQ-VL's point (arXiv 2501.15021, which rotates outliers
away first; that is not done here). A number is stored as `round((x - low) / step)` in `bits` bits
with one `low` and one `step`, in half precision, per group. A group of keys is `KEY_GROUP`
consecutive image tokens of one channel; a group of values is `VALUE_GROUP` channels of one token
(all channels where that does not divide them). KIVI takes 32 and 32; longer key groups cost less
and lost nothing measurable on the embedded model.

The limits of a key group are taken over all its image tokens, wherever they are held, so that a key
that leaves the tier and comes back is stored as it was. A tier in host memory saves nothing while
the model itself runs there, and `nbytes` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KEY_GROUP = 128
"""Image tokens that share the limits of a key's channel."""
VALUE_GROUP = 32
"""Channels that share the limits of a value."""
BITS = (8, 4, 2)
"""How few bits a stored number may have."""
HOST, PLAIN = "host", 16
"""Kept as they are: in host memory, or (for comparison) beside the others."""

_NONE = torch.iinfo(torch.int32).max  # where a row has fewer image keys; sorts behind all positions
_LARGEST = torch.finfo(torch.float16).max
_BLOCK = (
    64  # keys decoded at once; what lies between codes and numbers stays in the processor's cache
)


@dataclass(eq=False)
class QuantizedTier:
    """Keys and values of one layer that are not in its buffer.

    Attributes:
        kind: 8, 4 or 2 bits, `PLAIN` or `HOST`.
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

    kind: int | str
    positions: Tensor
    groups: Tensor
    image: Tensor
    moving: list[Tensor]
    limits: Tensor | None
    widths: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def hold(
        cls,
        kind: int | str,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        chosen: Tensor,
        image: Sequence[Tensor],
    ) -> QuantizedTier:
        """Store the chosen ones of `keys` and `values`, (batch, heads, keys, width).

        Args:
            positions: (batch, 1 or heads, keys).
            chosen: (batch, 1 or heads, n) indices, -1 (in front) for nothing.
            image: index sets of all image keys that are held anywhere, likewise.
        """
        heads = max(chosen.shape[1], positions.shape[1])
        at = chosen.expand(-1, heads, -1)
        everywhere = torch.cat([part.expand(-1, heads, -1) for part in (*image, chosen)], 2)
        everywhere = everywhere.masked_fill(everywhere < 0, _NONE).sort(-1).values
        all_positions = _positions(
            positions, everywhere.masked_fill(everywhere == _NONE, -1), _NONE
        )
        where = _positions(positions, at, -1)
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
        if kind not in (PLAIN, HOST):
            tier.limits = tier._limits(keys, everywhere)
        tier.moving = tier._encode(_taken(keys, at), _taken(values, at), tier.groups)
        return tier

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
        """Bytes of keys and values on the model's device, or (`host`) in host memory beside another
        device.
        """
        return sum(t.nbytes for t in self.tensors() if (t.device != self.device) == host)

    def bytes_by_row(self, counts: Sequence[int]) -> list[float]:
        """Bytes of keys and values of rows that hold so many keys; empty slots are no row's."""
        slot = sum(t.nbytes for t in self.moving) / max(self.positions.shape[0] * self.width, 1)
        limits = 0.0 if self.limits is None else self.limits.nbytes / self.limits.shape[0]
        return [count * slot + (limits if count else 0.0) for count in counts]

    # -- reading and exchanging --------------------------------------------------------------------

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, (batch, heads, n, width), in the model's precision; empty
        slots are finite.
        """
        moving = [part.to(self.device) for part in self.moving]
        if self.limits is None:
            return moving[0], moving[1]
        keys, values = (
            moving[0].new_empty(*moving[0].shape[:3], width, dtype=self.dtype)
            for width in self.widths
        )
        for start in range(0, self.width, _BLOCK):
            block = slice(start, start + _BLOCK)
            stored = [part[:, :, block] for part in moving]
            keys[:, :, block], values[:, :, block] = self._decode(
                stored, self.groups[..., block], self.limits
            )
        return keys, values

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
        positions = positions[: self.positions.shape[1]].contiguous()
        groups = _groups(self.image[row], positions)
        limits = None if self.limits is None else self.limits[row : row + 1]
        encoded = self._encode(keys[None], values[None], groups[None], limits)
        for part, new in zip(self.moving, encoded, strict=True):
            part[row].index_copy_(1, slots.to(part.device), new[0])
        self.positions[row].index_copy_(1, slots, positions)
        self.groups[row].index_copy_(1, slots, groups)

    def append(self, other: QuantizedTier) -> None:
        """Hold what another tier of the same kind holds, too, behind one's own.

        The groups stay apart, and empty places of rows with fewer keys are no longer all in front;
        `put` is not meant for a tier that was appended to.
        """
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

    def _limits(self, keys: Tensor, index: Tensor) -> Tensor:
        """(batch, heads, groups, 2, width): low and step of each channel over the keys at `index`,
        `_NONE` for none.
        """
        assert isinstance(self.kind, int)
        empty = (index == _NONE).expand(-1, keys.shape[1], -1)[..., None]
        taken = _taken(keys, index.masked_fill(index == _NONE, -1)).float()
        parts = zip(taken.split(KEY_GROUP, 2), empty.split(KEY_GROUP, 2), strict=True)
        ends = [
            (t.masked_fill(e, torch.inf).amin(2), t.masked_fill(e, -torch.inf).amax(2))
            for t, e in parts
        ]
        low, high = (torch.stack(end, 2).nan_to_num(0, 0, 0) for end in zip(*ends, strict=True))
        return _low_and_step(low, high, self.kind, 3)

    def _encode(
        self, keys: Tensor, values: Tensor, group: Tensor, limits: Tensor | None = None
    ) -> list[Tensor]:
        """(batch, heads, n, width) keys and values as what is stored of them."""
        if self.kind == HOST:
            return [keys.cpu(), values.cpu()]
        if self.kind == PLAIN:
            return [keys.clone(), values.clone()]
        assert isinstance(self.kind, int)
        limits = self.limits if limits is None else limits
        assert limits is not None
        grouped = _by_group(values.float())
        own = _low_and_step(grouped.amin(-1), grouped.amax(-1), self.kind, 3)
        value_codes = _codes(
            grouped, own[..., 0, :, None], own[..., 1, :, None], self.kind
        ).flatten(-2)
        low, step = _of_tokens(limits, group, keys.shape[1])
        key_codes = _codes(keys.float(), low, step, self.kind)
        return [_pack(key_codes, self.kind), _pack(value_codes, self.kind), own]

    def _decode(
        self, stored: list[Tensor], group: Tensor, limits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.kind in (HOST, PLAIN):
            return stored[0], stored[1]
        assert isinstance(self.kind, int)
        assert limits is not None
        low, step = _of_tokens(limits, group, stored[0].shape[1])
        keys = _unpack(stored[0], self.kind, self.widths[0]).float().mul_(step).add_(low)
        own = stored[2].float()
        grouped = _by_group(_unpack(stored[1], self.kind, self.widths[1]).float())
        values = grouped.mul_(own[..., 1, :, None]).add_(own[..., 0, :, None]).flatten(-2)
        return keys.to(self.dtype), values.to(self.dtype)


def quantized_cost(
    kind: int | str, count: int, image: int, widths: tuple[int, int], itemsize: int
) -> float:
    """What `count` of `image` keys of a head cost in the tier, in full keys and values of
    `itemsize` bytes a number.
    """
    if kind in (HOST, PLAIN):
        return float(count)
    assert isinstance(kind, int)
    key, value = widths
    codes = (_packed(key, kind) + _packed(value, kind) + 4 * _value_groups(value)) * count
    limits = 4 * key * -(-image // KEY_GROUP)
    return (codes + limits * (count > 0)) / ((key + value) * itemsize)


def _positions(positions: Tensor, index: Tensor, nothing: int) -> Tensor:
    """Positions at `index`, (batch, heads, n) int32; `nothing` where it is negative."""
    found = positions.expand(-1, index.shape[1], -1).gather(2, index.clamp_min(0)).int()
    return found.masked_fill(index < 0, nothing)


def _groups(image: Tensor, positions: Tensor) -> Tensor:
    """Group of each key: its number among the image keys of its row (and head), in blocks of
    `KEY_GROUP`; int16.
    """
    return (torch.searchsorted(image.contiguous(), positions.contiguous()) // KEY_GROUP).to(
        torch.int16
    )


def _low_and_step(low: Tensor, high: Tensor, bits: int, dim: int) -> Tensor:
    """Limits of groups as stored, stacked along `dim`; a group of equal numbers has step 0."""
    low = low.clamp(-_LARGEST, _LARGEST).half()
    step = ((high - low.float()) / (2**bits - 1)).clamp_max(_LARGEST).half()
    return torch.stack([low, step], dim)


def _of_tokens(limits: Tensor, group: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Low and step of each key's channels, (batch, heads, n, width) float32."""
    if limits.shape[2] == 1:
        return limits[..., 0, :].float(), limits[..., 1, :].float()
    at = group.long().expand(-1, heads, -1)[..., None]
    low, step = (
        limits[..., which, :].gather(2, at.expand(-1, -1, -1, limits.shape[-1])) for which in (0, 1)
    )
    return low.float(), step.float()


def _codes(numbers: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    return ((numbers - low) / step.clamp_min(1e-12)).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def _value_groups(width: int) -> int:
    return width // VALUE_GROUP if width % VALUE_GROUP == 0 else 1


def _by_group(values: Tensor) -> Tensor:
    """(..., width) -> (..., groups, channels of a group)."""
    return values.unflatten(-1, (_value_groups(values.shape[-1]), -1))


def _packed(width: int, bits: int) -> int:
    """Bytes of `width` codes."""
    return -(-width * bits // 8)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(..., width) uint8 codes, several to a byte: (..., ceil(width * bits / 8)); neighbours lie in
    different bytes.
    """
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (each, -1))
    packed = codes[..., 0, :].clone()
    for place in range(1, each):
        packed |= codes[..., place, :] << (bits * place)
    return packed


def _unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `_pack`."""
    each = 8 // bits
    codes = packed.new_empty(*packed.shape[:-1], each, packed.shape[-1])
    for place in range(each):
        torch.bitwise_right_shift(packed, bits * place, out=codes[..., place, :])
    if each > 1:
        codes &= 2**bits - 1
    return codes.flatten(-2)[..., :width]


def _taken(source: Tensor, index: Tensor) -> Tensor:
    """source[b, h, index[b, h, i]], (batch, heads, n, width); any finite entry where index < 0."""
    at = index.clamp_min(0).expand(-1, source.shape[1], -1)[..., None]
    return source.gather(2, at.expand(-1, -1, -1, source.shape[3]))
