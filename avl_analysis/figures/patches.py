"""Values of image tokens and the part of the image under each: what is laid over an image.

A model may see an image in several views: the whole of it, and parts of it in higher resolution.
The tokens of a view need not cover the image (LLaVA-1.5 sees its centre square only), tokens of
several views may cover the same place, and some tokens (class tokens, row ends) stand for no place.
So patches are not a matrix: every token brings its box. `Patches.raster` alone decides which token
is seen where; every drawing goes through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

DIGITS = 5
"""Decimals to which the edges of boxes are rounded before they are compared. Boxes are stored in
float32 and computed cell by cell, so the right edge of a cell and the left edge of the next differ
in the seventh decimal; 1e-5 of an image 4,000 pixels wide is a twenty-fifth of a pixel.
"""

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Raster:
    """Which token is seen where: a grid whose lines are the edges of all boxes.

    Attributes:
        x: (columns + 1,) vertical lines as fractions of the image's width, ascending.
        y: (rows + 1,) horizontal lines as fractions of its height, downwards.
        token: (rows, columns) index of the token seen in each cell, -1 where there is none.
    """

    x: Array
    y: Array
    token: NDArray[np.int64]

    def take(self, values: Array) -> Array:
        """(rows, columns): the values (tokens,) of the tokens seen, NaN where there is none."""
        # -1, a cell without a token, picks the NaN at the end.
        return np.append(values, np.nan)[self.token]

    def pixels(self, height: int, width: int) -> NDArray[np.int64]:
        """(height, width): index of the token seen at the centre of each pixel, -1 where none."""
        # Cell of each pixel's centre; -1 in front of the first line, one too many behind the last.
        row = np.searchsorted(self.y, (np.arange(height) + 0.5) / height, side="right") - 1
        column = np.searchsorted(self.x, (np.arange(width) + 0.5) / width, side="right") - 1
        inside_rows = (row >= 0) & (row < self.token.shape[0])
        inside_columns = (column >= 0) & (column < self.token.shape[1])
        seen = np.full((height, width), -1)
        seen[np.ix_(inside_rows, inside_columns)] = self.token[
            np.ix_(row[inside_rows], column[inside_columns])
        ]
        return seen


@dataclass(frozen=True, eq=False)
class Patches:
    """A value for every image token of one image, and where the token lies.

    Attributes:
        values: (tokens,), NaN where nothing was measured.
        boxes: (tokens, 4) left, top, right, bottom as fractions of the image's width and height,
            from its top left corner; NaN for tokens without a place.
        tile: (tokens,) 0 for views of the whole image, larger numbers for parts of it in higher
            resolution, -1 where unknown; left out: all 0.
    """

    values: Array
    boxes: Array
    tile: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        boxes = np.array(self.boxes, dtype=np.float64)
        tile = np.zeros(values.shape, int) if self.tile is None else np.array(self.tile, dtype=int)
        if values.ndim != 1 or boxes.shape != (*values.shape, 4) or tile.shape != values.shape:
            raise ValueError(
                "patches need values (tokens,), boxes (tokens, 4) and tile (tokens,); got"
                f" {values.shape}, {boxes.shape} and {tile.shape}"
            )
        if np.isinf(values).any():
            raise ValueError("a patch is infinite; use NaN for what was not measured")
        # Copies that cannot be written to: `raster` is computed once and would not follow a change.
        # The class is frozen, so the fields are set past its own check.
        for name, array in (("values", values), ("boxes", boxes), ("tile", tile)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @classmethod
    def grid(
        cls, values: ArrayLike, box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    ) -> Patches:
        """One view whose tokens, (rows, columns), share a part of the image out evenly.

        Args:
            values: (rows, columns).
            box: left, top, right, bottom of the part, as fractions of the image.
        """
        matrix = np.asarray(values, dtype=np.float64)
        rows, columns = matrix.shape
        left, top, right, bottom = box
        x = np.linspace(left, right, columns + 1)
        y = np.linspace(top, bottom, rows + 1)
        # Tokens in row order: left and right edges repeat for every row, top and bottom for every
        # column.
        corners = [np.tile(x[:-1], rows), np.repeat(y[:-1], columns)]
        corners += [np.tile(x[1:], rows), np.repeat(y[1:], columns)]
        return cls(matrix.ravel(), np.stack(corners, 1))

    @property
    def placed(self) -> NDArray[np.bool_]:
        """(tokens,): tokens with a place; one over padding beside the image has no area there."""
        left, top, right, bottom = np.round(self.boxes, DIGITS).T
        return (right > left) & (bottom > top)  # NaN compares as False

    @property
    def in_parts(self) -> bool:
        """Whether both the whole image and parts of it have tokens with a place and a value."""
        assert self.tile is not None
        parts = self.tile[self.placed & np.isfinite(self.values)] > 0
        return bool(parts.any() and not parts.all())

    @property
    def seen(self) -> NDArray[np.bool_]:
        """(tokens,): tokens that are seen somewhere, not wholly covered by others."""
        seen = np.zeros(self.values.shape, bool)
        drawn = self.raster.token
        seen[drawn[drawn >= 0]] = True
        return seen

    @property
    def largest(self) -> float:
        """The largest value that is seen, at least 0."""
        return float(np.max(self.values[self.seen], initial=0.0))

    def of_whole(self) -> Patches:
        """The views of the whole image alone, which its parts cover otherwise."""
        assert self.tile is not None
        return Patches(np.where(self.tile > 0, np.nan, self.values), self.boxes, self.tile)

    @cached_property
    def raster(self) -> Raster:
        """Which token is seen where.

        Tokens of parts of the image in higher resolution cover those of the whole, where both have
        a value. A token whose value is NaN is not there: a coarser one shows through.
        """
        shown = np.flatnonzero(self.placed & np.isfinite(self.values))
        boxes = np.round(self.boxes[shown], DIGITS)
        # Every edge of a box is a line of the grid, so each cell lies wholly inside or outside of a
        # box.
        x, y = (np.unique(boxes[:, edges]) for edges in ([0, 2], [1, 3]))
        token = np.full((max(0, y.size - 1), max(0, x.size - 1)), -1)
        first, last = np.searchsorted(x, boxes[:, 0]), np.searchsorted(x, boxes[:, 2])
        top, bottom = np.searchsorted(y, boxes[:, 1]), np.searchsorted(y, boxes[:, 3])
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert self.tile is not None
        # Painted in this order, the last one stays: views of the whole first, then parts of it;
        # among these the smaller boxes later.
        for i in np.lexsort((-area, self.tile[shown] > 0)):
            token[top[i] : bottom[i], first[i] : last[i]] = shown[i]
        return Raster(x, y, token)
