"""The grids of tokens that one picture or video is laid out as.

The image tokens of one picture are one or several *views* of it, one after another: a grid over the
whole picture, tiles of it at higher resolution. A video is laid out as one picture with a view for
every frame (or for every group of frames, where a model makes one token of a patch in several
frames); these views know which frame they are.

A `View` says how many tokens a grid has, which of them stand for no place (a class token, a break
after every row), and which part of the picture it covers, as fractions, so that nothing here
depends on how large the picture was resized. `grids` knows how a model cuts a picture into views,
`places` puts the tokens of a batch of prompts onto them.

Fractions below 0 and above 1 are meant: a cell over the padding beside a picture lies outside of
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
        # Of one cell, as fractions of the picture.
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


def token_frames(picture: Picture) -> Tensor:
    """(tokens,) int16: the frame or group of frames each token of a video shows, else -1."""
    frames = [view.frame for view in picture for _ in range(view.count)]
    return torch.tensor(frames, dtype=torch.int16)
