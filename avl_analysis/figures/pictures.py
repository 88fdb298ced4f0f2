"""Pictures as arrays: what both drawing modules do to a photograph before they put attention on it.

A picture under an attention map is shown grey and dimmed, so that the only colour seen is the
measurement.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DIMMED = 0.62
"""Brightness of a picture under a map, as a factor."""
# Weights of red, green and blue in the luma of ITU-R BT.601.
_LUMA = np.array([0.299, 0.587, 0.114])


def dimmed(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture in dark grey: (height, width, 3) uint8 to the same."""
    grey = DIMMED * (picture.astype(np.float64) @ _LUMA)
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def data_uri(picture: NDArray[np.uint8], longest: int = 512) -> str:
    """The image as a "data:" address holding a PNG.

    Reduced to at most `longest` pixels a side.
    """
    image = Image.fromarray(picture)
    # Keeps the proportions and never enlarges.
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
