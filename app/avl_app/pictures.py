"""A picture, or a video, that somebody asks about.

Its pixels, its name, and the hash that results are kept under.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture one can ask about.

    Attributes:
        pixels: (height, width, 3) uint8, read-only.
        name: what it is called on the page.
        digest: hash of the pixels, what results are kept under.
        scene: (seed, index) of a drawn scene, None for other pictures.
        frames: of a video its frames, as `pixels`, which are then the first of them.
        moving: (seed, index) of a drawn video, None for everything else.
    """

    pixels: NDArray[np.uint8]
    name: str
    digest: str
    scene: tuple[int, int] | None = None
    frames: tuple[NDArray[np.uint8], ...] = ()
    moving: tuple[int, int] | None = None


def video(frames: Sequence[NDArray[np.uint8]], name: str, moving: tuple[int, int]) -> Picture:
    """A drawn video from its frames, all of one size."""
    # The frames one below the other, so that one hash covers them all and their order.
    whole = picture(np.concatenate(list(frames)), name)
    height = frames[0].shape[0]
    # views of the one array, (height, width, 3) each and read-only like it
    kept = tuple(
        whole.pixels[start : start + height] for start in range(0, len(whole.pixels), height)
    )
    # The word keeps the video apart from a picture of the same stacked pixels.
    return Picture(kept[0], name, f"video {whole.digest}", frames=kept, moving=moving)


def picture(pixels: NDArray[np.uint8], name: str, scene: tuple[int, int] | None = None) -> Picture:
    """A picture from its pixels."""
    # A copy: results are kept under these pixels, and the caller's array may change.
    kept = np.ascontiguousarray(pixels, dtype=np.uint8).copy()
    kept.setflags(write=False)
    # With the shape, since the same bytes in another shape are another picture.
    digest = hashlib.sha256(repr(kept.shape).encode() + kept.tobytes()).hexdigest()[:24]
    return Picture(kept, name, digest, scene)
