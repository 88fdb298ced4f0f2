"""Where in its image each recorded image token lies, to draw it or compare it with a region."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from avl.places import token_boxes, token_tiles
from avl.tokens import TokenLayout
from avl_analysis.figures.patches import Patches
from avl_analysis.recordings.schema import EDGES


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The tokens of one image, or of one frame of a video, in the order of the prompt.

    Attributes:
        token: (n,) their numbers among all image tokens of the sample, the dimension `token` of
            maps.
        position: (n,) their positions among all tokens of the sample.
        boxes: (n, 4) the part of the image under each, left, top, right, bottom as fractions of the
            whole image; NaN where there is none or it is unknown.
        tile: (n,) view of the image, as in `recordings.schema`.
        image: index of the image or video in the prompt.
        frame: of a video, which frame or group of frames; -1 for pictures.
    """

    token: NDArray[np.int64]
    position: NDArray[np.int64]
    boxes: NDArray[np.float64]
    tile: NDArray[np.int64]
    image: int = 0
    frame: int = -1

    @property
    def placed(self) -> bool:
        """Whether it is known of any token where it lies."""
        return bool(np.isfinite(self.boxes).all(1).any())

    def patches(self, values: NDArray[np.floating]) -> Patches:
        """Values to be laid over the image.

        Args:
            values: (n,) one for each of these tokens, NaN where nothing was measured.
        """
        return Patches(values.astype(np.float64), self.boxes, self.tile)


def images_of(tokens: xr.Dataset) -> list[ImageTokens]:
    """The tokens of every image of a sample, image by image, of videos frame by frame.

    Tokens of a video that belong to no frame are left out.

    Args:
        tokens: `recording.tokens` of one sample: variables image, frame, left, top, right, bottom
            and tile along `position`.
    """
    image, frame = tokens["image"].values, tokens["frame"].values
    # Image tokens in the order of the prompt: their places in this list are the labels of `token`.
    position = np.flatnonzero(image >= 0)
    boxes = np.stack([tokens[edge].values[position] for edge in EDGES], 1).astype(np.float64)
    tile = tokens["tile"].values[position].astype(np.int64)
    found = []
    for number in range(int(image.max(initial=-1)) + 1):
        of_image = image[position] == number
        last = int(frame[position][of_image].max(initial=-1))
        # A picture has the one "frame" -1.
        for shown in range(last + 1) if last >= 0 else (-1,):
            # Places among the image tokens, which is what `token` counts, not positions of the
            # prompt.
            at = np.flatnonzero(of_image & (frame[position] == shown))
            found.append(ImageTokens(at, position[at], boxes[at], tile[at], number, shown))
    return found


def images_of_layout(layout: TokenLayout, row: int) -> tuple[ImageTokens, ...]:
    """The tokens of every image of one row of a batch of prompts, as a recording would have them.

    Args:
        layout: of the prompts.
        row: which of them.
    """
    boxes, tile = token_boxes(layout, row).double(), token_tiles(layout, row).long()
    fields = {
        "image": layout.image[row].cpu().numpy(),
        "frame": layout.frame[row].cpu().numpy(),
        "tile": tile.numpy(),
    }
    fields |= {edge: boxes[:, place].numpy() for place, edge in enumerate(EDGES)}
    tokens = xr.Dataset({name: ("position", values) for name, values in fields.items()})
    return tuple(images_of(tokens))
