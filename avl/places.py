"""Where in a picture an image token lies.

The image tokens of one picture are one or several *views* of it, one after another: a grid over the
whole picture, tiles of it at higher resolution. A video is laid out as one picture with a view for
every frame (or for every group of frames, where a model makes one token of a patch in several
frames); these views know which frame they are.

A `View` says how many tokens a grid has, which of them stand for no place (a class token, a break
after every row), and which part of the picture it covers, as fractions, so that nothing here
depends on how large the picture was resized. `grids` knows how a model cuts a picture into views;
this module turns views into rows, columns and boxes.

Fractions below 0 and above 1 are meant: a cell over the padding beside a picture lies outside of
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from avl.tokens import TokenLayout

Place = tuple[int, int]
"""Row and column of a token in its image's grid, counted from the top left; (-1, -1) where there is
none.
"""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of the picture's width and height, from the top left
corner.
"""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class View:
    """A grid of tokens over a part of a picture, in raster order.

    Attributes:
        rows, columns: of the grid.
        box: part of the picture that the grid covers; None if it is not known.
        origin: place of the first token in the picture's finest grid; None if this grid is a
            coarser, second one.
        tile: 0 for a view of the whole picture, 1, 2, ... for tiles in the order of their tokens,
            -1 if nothing is known of the tokens.
        before, breaks, after: tokens without a place, ahead of the grid, after each row, behind the
            grid.
        frame: of a video, which frame or group of frames this is, counted from 0; -1 for pictures,
            and for tokens of a video that belong to no frame.
    """

    rows: int
    columns: int
    box: Box | None = WHOLE
    origin: Place | None = (0, 0)
    tile: int = 0
    before: int = 0
    breaks: int = 0
    after: int = 0
    frame: int = -1

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.before + self.rows * (self.columns + self.breaks) + self.after

    def places(self) -> list[Place]:
        """Row and column of every token in the picture's finest grid, (-1, -1) without one."""
        if self.origin is None:
            return [(-1, -1)] * self.count
        row, column = self.origin
        return self._spread(
            [[(row + r, column + c) for c in range(self.columns)] for r in range(self.rows)],
            (-1, -1),
        )

    def boxes(self) -> list[Box]:
        """Part of the picture under every token, NaN where there is none."""
        none = (torch.nan,) * 4
        if self.box is None:
            return [none] * self.count
        left, top, right, bottom = self.box
        width, height = (right - left) / self.columns, (bottom - top) / self.rows
        cells = [
            [
                (left + c * width, top + r * height, left + (c + 1) * width, top + (r + 1) * height)
                for c in range(self.columns)
            ]
            for r in range(self.rows)
        ]
        return self._spread(cells, none)

    def _spread(self, grid: list[list], none: object) -> list:
        tokens = [none] * self.before
        for line in grid:
            tokens += [*line, *([none] * self.breaks)]
        return tokens + [none] * self.after


Picture = tuple[View, ...]
"""The views of one picture, in the order of their tokens."""


def count(picture: Picture) -> int:
    """Number of image tokens of a picture."""
    return sum(view.count for view in picture)


def as_video(frames: Sequence[Picture]) -> Picture:
    """One video whose frames the model was shown as pictures, one after another."""
    return tuple(
        replace(view, frame=number) for number, picture in enumerate(frames) for view in picture
    )


def nowhere(tokens: int) -> Picture:
    """A picture of which nothing but the number of tokens is known."""
    return (View(0, 0, None, None, tile=-1, before=tokens),)


def token_boxes(layout: TokenLayout, row: int) -> Tensor:
    """Part of its picture that every token of one row of a batch stands for.

    Returns:
        (length, 4) float32: left, top, right, bottom as fractions of the whole picture. A box over
        padding beside the picture ends at the border, so it may be empty; NaN where the place is
        unknown or there is none, so also for everything that is no image token.
    """
    boxes = torch.full((layout.length, 4), torch.nan, dtype=torch.float32)
    for index, picture in enumerate(layout.pictures[row]):
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


def token_frames(picture: Picture) -> Tensor:
    """(tokens,) int16: the frame or group of frames each token of a video shows, else -1."""
    frames = [view.frame for view in picture for _ in range(view.count)]
    return torch.tensor(frames, dtype=torch.int16)


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
    (LLaVA-1.5, InternVL). With the size known, whoever watches the model knows which part of the
    picture every image token stands for. It is remembered with the tensors of `inputs` themselves:
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
