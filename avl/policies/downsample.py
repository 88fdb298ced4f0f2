"""Fewer image tokens by showing the image more coarsely."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from avl.policies.before_decoder import BeforeDecoderPolicy, ImageTokens


@dataclass(frozen=True, kw_only=True)
class DownsamplePolicy(BeforeDecoderPolicy):
    """The image's grid of features resized to fewer tokens.

    What costs nothing and has to be beaten by methods that choose.

    Each image's grid is divided into as many equal cells as its part of the budget allows, in about
    the proportions of the grid. A cell goes on as the mean of its tokens, at the position of the
    token nearest to its centre. An image whose grid is unknown is divided in the order of its
    tokens.

    Deviation from resizing the picture itself: an encoder of fixed resolution makes equally many
    tokens of a picture of any size, so its features are resized instead, and the encoder sees the
    picture in full.
    """

    name: ClassVar[str] = "downsample"
    label: ClassVar[str] = "downsampled"
    color_slot: ClassVar[int] = 16

    def select(self, tokens: ImageTokens, count: int) -> Tensor:
        return torch.tensor([centre for centre, _ in self._cells(tokens, count)]).long()

    def replaced(self, tokens: ImageTokens, index: Tensor, count: int) -> Tensor:
        cells = self._cells(tokens, count)
        return torch.stack([tokens.features[members].mean(0) for _, members in cells])

    def _cells(self, tokens: ImageTokens, count: int) -> list[tuple[int, Tensor]]:
        """Token at the centre, and all tokens, of each cell of all images."""
        cells = []
        for image, cells_of_image in enumerate(_parts(tokens.image, count)):
            members = (tokens.image == image).nonzero()[:, 0]
            if not cells_of_image:
                continue
            rows, columns = tokens.row[members], tokens.column[members]
            height, width = int(rows.max()) + 1, int(columns.max()) + 1
            if int(rows.min()) < 0 or height * width != len(members):
                rows, columns = torch.zeros_like(members), torch.arange(len(members))
                height, width = 1, len(members)
            down, across = grid_within(height, width, cells_of_image)
            # Number of the cell in raster order; integer division spreads remainders over the
            # cells.
            cell = (rows * down // height) * across + columns * across // width
            for number in range(down * across):
                inside = (cell == number).nonzero()[:, 0]
                middle = torch.stack([rows[inside], columns[inside]]).float()
                # Squared distance of each token of the cell from the cell's mean place.
                distance = (middle - middle.mean(1, keepdim=True)).square().sum(0)
                cells.append((int(members[inside[distance.argmin()]]), members[inside]))
        return cells


def grid_within(height: int, width: int, count: int) -> tuple[int, int]:
    """Rows and columns of at most `count` cells, in about the proportions of a grid.

    Of all pairs that use at least nine tenths of what the best pair uses, the one whose proportions
    are nearest.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        count: most cells, 1 to height * width.
    """
    pairs = [(down, min(count // down, width)) for down in range(1, min(height, count) + 1)]
    most = max(down * across for down, across in pairs)
    full = [pair for pair in pairs if pair[0] * pair[1] >= 0.9 * most]
    return min(full, key=lambda pair: abs(math.log(pair[0] * width / (pair[1] * height))))


def _parts(image: Tensor, count: int) -> list[int]:
    """How many of `count` tokens each image gets, in proportion to its tokens."""
    sizes = torch.bincount(image).tolist() if len(image) else []
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    total = max(bounds[-1], 1)
    # Rounding the running totals and not each share lets the parts add up to `count` exactly.
    shares = [count * bound // total for bound in bounds]
    return [after - before for before, after in pairwise(shares)]
