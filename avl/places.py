"""Where in a picture an image token lies.

`views` says how the tokens of one picture are laid out; this module turns that into boxes for the
tokens of a batch of prompts, and remembers how large the pictures behind prepared inputs were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from avl.tokens import TokenLayout
from avl.views import Picture


def token_boxes(layout: TokenLayout, row: int) -> Tensor:
    """Part of its picture that every token of one row of a batch stands for.

    Returns:
        (length, 4) float32: left, top, right, bottom as fractions of the whole picture. A box over
        padding beside the picture ends at the border, so it may be empty; NaN where the place is
        unknown or there is none, so also for everything that is no image token.
    """
    boxes = torch.full((layout.length, 4), torch.nan, dtype=torch.float32)
    for index, picture in enumerate(layout.pictures[row]):
        # Ascending, and views list a picture's tokens in the order of the prompt: they match one to
        # one.
        positions = (layout.image[row] == index).nonzero().flatten().cpu()
        boxes[positions] = _clamped(picture)
    return boxes


def token_tiles(layout: TokenLayout, row: int) -> Tensor:
    """Number of the view that every token of one row of a batch belongs to.

    Returns:
        (length,) int16: `View.tile`, and -1 for everything that is no image token.
    """
    tiles = torch.full((layout.length,), -1, dtype=torch.int16)
    for index, picture in enumerate(layout.pictures[row]):
        positions = (layout.image[row] == index).nonzero().flatten().cpu()
        tiles[positions] = _tiles(picture)
    return tiles


def _clamped(picture: Picture) -> Tensor:
    """(tokens, 4): boxes of a picture's tokens, cut off at its border."""
    boxes = [box for view in picture for box in view.boxes()]
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4).clamp(0.0, 1.0)


def _tiles(picture: Picture) -> Tensor:
    """(tokens,): numbers of the views of a picture's tokens."""
    tiles = [view.tile for view in picture for _ in range(view.count)]
    return torch.tensor(tiles, dtype=torch.int16)


class Shown(NamedTuple):
    """A picture or video as it was before a processor made model inputs of it.

    Attributes:
        size: width and height in pixels.
        frames: frames of a video, 0 for a picture.
    """

    size: tuple[int, int]
    frames: int = 0


class Originals(NamedTuple):
    """What the pictures were before a processor made model inputs of them.

    Attributes:
        sizes: (width, height) in pixels of every picture or video of every row of the batch.
        processor: the image processor that was used, or None.
        frames: for every picture or video of every row, how many frames it has; 0 for a picture.
        video_processor: the video processor that was used, or None.
    """

    sizes: tuple[tuple[tuple[int, int], ...], ...]
    processor: Any = None
    frames: tuple[tuple[int, ...], ...] = ()
    video_processor: Any = None

    def shown(self, row: int) -> tuple[Shown, ...]:
        """The pictures and videos of one row of the batch, in order."""
        frames = self.frames[row] if self.frames else (0,) * len(self.sizes[row])
        return tuple(map(Shown, self.sizes[row], frames))


_ORIGINALS = WeakIdKeyDictionary()
"""Tensor of model inputs -> `Originals`; lives as long as the tensor."""

_OF_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})


def remember_originals(
    inputs: Mapping[str, Any],
    sizes: Sequence[Sequence[tuple[int, int]]],
    processor: Any = None,
    frames: Sequence[Sequence[int]] = (),
) -> None:
    """Remember how large the pictures behind prepared inputs were.

    Some families crop or tile by the size of the original picture and tell the model nothing of it
    (LLaVA-1.5, InternVL). With the size known, it can be told which part of the picture
    every image token stands for. It is remembered with the tensors of `inputs` themselves:
    pass these on to the model, not copies.

    Args:
        inputs: what the processor returned, on the model's device.
        sizes: (width, height) in pixels of every picture or video of every row of the batch, in the
            order of the prompt.
        processor: the processor or image processor.
        frames: as `sizes`, the number of frames of every video, 0 for pictures; left out where
            there are pictures only. It is what tells several pictures from the frames of a video
            in families that have one kind of token for both.
    """
    originals = Originals(
        tuple(tuple((int(width), int(height)) for width, height in row) for row in sizes),
        getattr(processor, "image_processor", processor),
        tuple(tuple(map(int, row)) for row in frames),
        getattr(processor, "video_processor", None),
    )
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name not in _OF_TEXT:
            # By identity and weakly: what was remembered of a batch goes with its tensors.
            _ORIGINALS[value] = originals


def originals_of(inputs: Mapping[str, Any]) -> Originals | None:
    """What `remember_originals` was told about one of these tensors, None if nothing."""
    for value in inputs.values():
        if isinstance(value, Tensor) and (found := _ORIGINALS.get(value)) is not None:
            return found
    return None


@dataclass(frozen=True)
class PictureMap:
    """Boxes of image tokens in pixels of the original pictures.

    Attributes:
        boxes: (batch, length, 4) float32, left, top, right, bottom in pixels, from the picture's
            top left corner; NaN for tokens without a place and everything that is no image token.
            Boxes over padding end at the border, so they may be empty.
        tile: (batch, length) int16, 0 for views of the whole picture, 1, 2, ... for its tiles, -1
            elsewhere.
        assumption: what the boxes take for granted beyond the model's inputs; empty if nothing.
    """

    boxes: Tensor
    tile: Tensor
    assumption: str = ""
    sizes: Sequence[Sequence[tuple[int, int]]] = field(default=(), repr=False)


def map_pictures(
    layout: TokenLayout,
    pictures: Sequence[Sequence[Picture]],
    sizes: Sequence[Sequence[tuple[int, int]]],
    assumption: str,
) -> PictureMap:
    """Boxes of the image tokens of a batch.

    Args:
        layout: of the prompts.
        pictures: views of every picture of every row.
        sizes: (width, height) in pixels of every picture or video of every row.
        assumption: what the views take for granted.

    Raises:
        ValueError: the numbers of pictures and sizes differ.
    """
    boxes = torch.full((layout.batch, layout.length, 4), torch.nan, dtype=torch.float32)
    tile = torch.full((layout.batch, layout.length), -1, dtype=torch.int16)
    for b, (shown, known) in enumerate(zip(pictures, sizes, strict=True)):
        if len(shown) != len(known):
            raise ValueError(
                f"row {b} shows {len(shown)} pictures, but {len(known)} picture sizes were given;"
                " pass the (width, height) of every picture of every row, crops that the processor"
                " adds (pan and scan) included"
            )
        for index, (picture, (width, height)) in enumerate(zip(shown, known, strict=True)):
            at = (layout.image[b] == index).nonzero().flatten().cpu()
            boxes[b, at] = _clamped(picture) * torch.tensor([width, height, width, height])
            tile[b, at] = _tiles(picture)
    return PictureMap(boxes, tile, assumption, sizes)
