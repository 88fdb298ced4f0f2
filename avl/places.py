"""Where in a picture an image token lies.

The image tokens of one picture are one or several *views* of it, one after another: a grid over the
whole picture, tiles of it at higher resolution, frames of a video. A `View` says how many tokens a
grid has, which of them stand for no place (a class token, a break after every row), and which part
of the picture it covers, as fractions, so that nothing here depends on how large the picture was
resized. `grids` knows how a model cuts a picture into views; this module turns views into rows,
columns and boxes.

Fractions below 0 and above 1 are meant: a cell over the padding beside a picture lies outside of
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from avl.tokens import Place, TokenLayout

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
            frames likewise.
        before, breaks, after: tokens without a place, ahead of the grid, after each row, behind the
            grid.
    """

    rows: int
    columns: int
    box: Box | None = WHOLE
    origin: Place | None = (0, 0)
    tile: int = 0
    before: int = 0
    breaks: int = 0
    after: int = 0

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.before + self.rows * (self.columns + self.breaks) + self.after

    def places(self) -> list[Place]:
        """Row and column of every token in the picture's finest grid, (-1, -1) where
        there is none."""
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


def nowhere(tokens: int) -> Picture:
    """A picture of which nothing but the number of tokens is known."""
    return (View(0, 0, None, None, before=tokens),)


@dataclass(frozen=True)
class PictureMap:
    """Boxes of image tokens in pixels of the original pictures.

    Attributes:
        boxes: (batch, length, 4) float32, left, top, right, bottom in pixels, from the picture's
            top left corner; NaN for tokens without a place and everything that is no image token.
            Boxes over padding end at the border, so they may be empty.
        tile: (batch, length) int16, 0 for views of the whole picture, 1, 2, ... for its tiles or
            frames, -1 elsewhere.
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
        sizes: (width, height) in pixels of every picture of every row.

    Raises:
        ValueError: the numbers of pictures and sizes differ.
    """
    boxes = torch.full((layout.batch, layout.length, 4), torch.nan)
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
            fractions = torch.tensor([box for view in picture for box in view.boxes()]).clamp(
                0.0, 1.0
            )
            boxes[b, at] = fractions * torch.tensor([width, height, width, height])
            tile[b, at] = torch.tensor(
                [view.tile for view in picture for _ in range(view.count)], dtype=torch.int16
            )
    return PictureMap(boxes, tile, assumption, sizes)
