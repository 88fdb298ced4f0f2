"""Which position of a prompt is what: system, image, text or padding, and where in its picture.

Everything else in the project asks this module and never looks at token ids itself. It knows ids
and nothing about models: families.py supplies the ids that stand for image features, and how one
picture's tokens are laid out.

The vocabulary is A-VL's: *system* is everything before the first image token, *image* the positions
that carry image features, *text* everything else after the first image token: the question, text
between two pictures, and all generated tokens. A row without an image has no system part, so all of
it is text. That is a convention (nothing separates the two parts there), and it is why policies
without an image act through their text rule only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from avl.views import Picture, count, nowhere, token_frames


class Modality(IntEnum):
    """Codes stored in `TokenLayout.modality`: the vocabulary `system image text`, and padding."""

    PADDING = -1
    SYSTEM = 0
    IMAGE = 1
    TEXT = 2


MODALITIES: tuple[str, ...] = ("system", "image", "text")
"""Names of the modalities, in the order of their codes."""


_FIELDS = ("modality", "image", "row", "column", "frame")
"""Tensors of a `TokenLayout`."""
_ROOM = 64
"""Generated tokens that a layout leaves room for at a time."""


@dataclass(frozen=True)
class TokenLayout:
    """What each position of a batch of prompts is.

    Attributes:
        modality: (batch, length) int8, values of `Modality`.
        image: (batch, length) int16, index of the picture within its row of the batch, -1 outside
            pictures.
        row, column: (batch, length) int16, place in the picture's grid, -1 where there is none or
            it is unknown.
        frame: (batch, length) int16, of the tokens of a video (which is one picture here) the frame
            or group of frames they show, counted from 0; -1 for pictures, and where it is unknown.
        pictures: for every row of the batch its pictures as views, in the order of their tokens;
            `places.token_boxes` makes boxes of them.
    """

    modality: Tensor
    image: Tensor
    row: Tensor
    column: Tensor
    frame: Tensor
    pictures: tuple[tuple[Picture, ...], ...]
    _roomy: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)
    """These tensors, of which they are the beginning, with generated tokens behind them."""

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.modality.shape[0]

    @property
    def length(self) -> int:
        """Number of positions, padding included."""
        return self.modality.shape[1]

    @property
    def valid(self) -> Tensor:
        """(batch, length) bool: positions that are not padding."""
        return self.modality != Modality.PADDING

    def mask(self, modality: Modality) -> Tensor:
        """(batch, length) bool: positions of one modality."""
        return self.modality == modality

    def counts(self) -> Tensor:
        """(batch, 3) int64: number of system, image and text positions of each row."""
        return torch.stack([self.mask(Modality(code)).sum(1) for code in range(3)], dim=1)

    def images(self) -> list[int]:
        """Number of pictures in each row of the batch."""
        return [int(row.max()) + 1 for row in self.image]

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout with its tensors on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self._tensors()}
        return TokenLayout(**moved, pictures=self.pictures)

    def select(self, rows: Tensor) -> TokenLayout:
        """Layout of rows `rows` of the batch, in that order; repetitions are allowed."""
        chosen = {
            name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in self._tensors()
        }
        return TokenLayout(**chosen, pictures=tuple(self.pictures[row] for row in rows.tolist()))

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, getattr(self, name)) for name in _FIELDS]

    def extend(self, other: TokenLayout) -> TokenLayout:
        """This layout followed by `other` (a later turn of the same conversations).

        What the second part calls system is text here if this part already showed a picture, and
        pictures are numbered on. Raises ValueError if the batch sizes differ.
        """
        if other.batch != self.batch:
            raise ValueError(
                f"cannot extend a layout of {self.batch} rows with one of {other.batch} rows"
            )
        # (batch, 1): pictures shown so far, by which those of the later part are numbered on.
        seen = torch.tensor(self.images(), dtype=torch.int16, device=self.image.device)[:, None]
        # What stands before the first image token of a row is system; with two parts, "first" is
        # that of both together. So the later part's system is text if the first one showed a
        # picture, and the first part's text is system if only the later one does.
        late = (other.modality == Modality.SYSTEM) & (seen > 0)
        early = (
            (self.modality == Modality.TEXT)
            & (seen == 0)
            & torch.tensor([[n > 0] for n in other.images()], device=self.image.device)
        )
        modality = torch.cat(
            [
                self.modality.masked_fill(early, int(Modality.SYSTEM)),
                other.modality.masked_fill(late, int(Modality.TEXT)),
            ],
            dim=1,
        )
        image = torch.cat(
            [self.image, torch.where(other.image >= 0, other.image + seen, other.image)], dim=1
        )
        return TokenLayout(
            modality,
            image,
            torch.cat([self.row, other.row], 1),
            torch.cat([self.column, other.column], 1),
            torch.cat([self.frame, other.frame], 1),
            tuple((*own, *later) for own, later in zip(self.pictures, other.pictures, strict=True)),
        )

    def extend_text(self, count: int) -> TokenLayout:
        """This layout followed by `count` generated (text) tokens per row."""
        length, roomy = self.length + count, self._roomy
        # Generated tokens are all alike, so layouts of one conversation are beginnings of the same
        # tensors: joining them anew at every decode step takes some ten operations.
        if not roomy or roomy[0].shape[1] < length:
            new = (self.batch, count + _ROOM)
            fills = [int(Modality.TEXT), *[-1] * (len(_FIELDS) - 1)]
            roomy = tuple(
                torch.cat([tensor, tensor.new_full(new, fill)], 1)
                for (_, tensor), fill in zip(self._tensors(), fills, strict=True)
            )
        return _Beginning(roomy, length, self.pictures)


class _Beginning(TokenLayout):
    """The first positions of a longer layout, whose tensors are cut when somebody asks.

    Nobody does at most decode steps.
    """

    def __init__(
        self, roomy: tuple[Tensor, ...], length: int, pictures: tuple[tuple[Picture, ...], ...]
    ) -> None:
        # A frozen dataclass's attributes are set this way.
        vars(self).update(_roomy=roomy, _length=length, pictures=pictures)

    def __getattr__(self, name: str) -> Any:
        """A tensor that was not asked for before."""
        if name not in _FIELDS:
            raise AttributeError(name)
        tensor = self._roomy[_FIELDS.index(name)].narrow(1, 0, self.length)
        vars(self)[name] = tensor
        return tensor

    @property
    def batch(self) -> int:
        return self._roomy[0].shape[0]

    @property
    def length(self) -> int:
        length: int = vars(self)["_length"]
        return length


def token_layout(
    input_ids: Tensor,
    image_token_ids: Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    pictures: Sequence[Sequence[Picture]] | None = None,
) -> TokenLayout:
    """Layout of a batch of prompts.

    Args:
        input_ids: (batch, length) token ids, image placeholders already expanded (one id per image
            feature).
        image_token_ids: ids whose positions carry image features.
        attention_mask: (batch, length), zero at padding; None means no padding.
        pictures: the pictures of every row as views, in the order of their tokens. None: every run
            of image tokens is one picture, of whose places nothing is known.

    Raises:
        ValueError: if ids and mask differ in shape, or the pictures do not add up to the image
            tokens found.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (batch, length); got shape {tuple(input_ids.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids"
            f" {tuple(input_ids.shape)}; pass the mask the processor returned with these ids"
        )
    valid = attention_mask.bool()
    ids = torch.tensor(list(image_token_ids), dtype=input_ids.dtype, device=input_ids.device)
    is_image = torch.isin(input_ids, ids) & valid
    # (batch, length): from the first image token on.
    seen = is_image.cumsum(1) > 0
    has_image = is_image.any(1, keepdim=True)
    modality = torch.full_like(input_ids, int(Modality.TEXT), dtype=torch.int8)
    # A row without any image keeps text throughout; padding is set last, over everything.
    modality[has_image & ~seen] = int(Modality.SYSTEM)
    modality[is_image] = int(Modality.IMAGE)
    modality[~valid] = int(Modality.PADDING)
    image = torch.full_like(modality, -1, dtype=torch.int16)
    row, column, frame = image.clone(), image.clone(), image.clone()
    shown = []
    for b in range(input_ids.shape[0]):
        positions = is_image[b].nonzero().flatten()
        shown.append(_pictures(positions, b, None if pictures is None else pictures[b]))
        start = 0
        for index, picture in enumerate(shown[b]):
            at = positions[start : start + count(picture)]
            image[b, at] = index
            places = [place for view in picture for place in view.places()]
            where = torch.tensor(places, dtype=torch.int16, device=image.device).reshape(-1, 2)
            row[b, at], column[b, at] = where[:, 0], where[:, 1]
            frame[b, at] = token_frames(picture).to(image.device)
            start += count(picture)
    return TokenLayout(modality, image, row, column, frame, tuple(shown))


def _pictures(
    positions: Tensor, batch_row: int, known: Sequence[Picture] | None
) -> tuple[Picture, ...]:
    """The pictures of one row, given the sorted positions of its image tokens."""
    if known is None:
        # Where the next image token is not the next token, another picture begins.
        breaks = ((positions[1:] - positions[:-1]) > 1).nonzero().flatten() + 1
        bounds = [0, *breaks.tolist(), positions.numel()]
        return tuple(nowhere(stop - start) for start, stop in pairwise(bounds) if stop > start)
    lengths = [count(picture) for picture in known]
    if sum(lengths) != positions.numel():
        raise ValueError(
            f"row {batch_row} has {positions.numel()} image tokens, but its pictures were said"
            f" to have {lengths}"
        )
    return tuple(known)
