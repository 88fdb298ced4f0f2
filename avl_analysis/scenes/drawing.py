"""Pixels of the drawn scenes.

Palette, eight shapes as implicit functions, a 5x7 font and a textured background.

Everything here takes plain numbers and returns NumPy arrays in [0, 1]; which object goes where is
decided in ``world.py``. A shape is a signed distance in pixels (negative inside), so one formula
serves both sizes and gives edges that are soft over about one pixel. Note: a picture is
deliberately never flat. The background carries a gradient, slow clouds, faint stripes and pixel
noise, so that a patch without an object still has content to ignore.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SIDE = 96
"""Picture width and height in pixels."""
PATCH = 8
"""Side of one image token's patch in pixels."""
GRID = SIDE // PATCH
"""Patches per row and per column (12, hence 144 image tokens)."""
CELL = 32
"""Side of one of the 3x3 cells in pixels."""

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.10, 0.12),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.97, 0.92, 0.12),
    "green": (0.10, 0.72, 0.16),
    "cyan": (0.10, 0.88, 0.92),
    "blue": (0.12, 0.22, 0.95),
    "purple": (0.62, 0.12, 0.82),
    "white": (0.98, 0.98, 0.98),
}
COLOURS = tuple(PALETTE)

Field = NDArray[np.floating]


def _circle(x: Field, y: Field, r: float) -> Field:
    return np.hypot(x, y) - r


def _square(x: Field, y: Field, r: float) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r


def _triangle(x: Field, y: Field, r: float) -> Field:
    return np.maximum((1.75 * np.abs(x) - 1.0 * (y + r)) / 2.016, y - 0.75 * r)


def _diamond(x: Field, y: Field, r: float) -> Field:
    # Times 1 / sqrt(2): the gradient of |x| + |y| is sqrt(2) long, that of a distance is 1.
    return (np.abs(x) + np.abs(y) - 1.12 * r) * 0.7071


def _cross(x: Field, y: Field, r: float) -> Field:
    a, b = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(a, b) - r, np.minimum(a, b) - 0.33 * r)


def _star(x: Field, y: Field, r: float) -> Field:
    wedge = np.pi / 5
    angle = np.abs(
        np.mod(np.arctan2(x, -y), 2 * wedge) - wedge
    )  # 0 on an inner corner, pi/5 on a tip
    rho = np.hypot(x, y)
    px, py = rho * np.cos(angle), rho * np.sin(angle)
    inner, tip = 0.45 * r, (1.12 * r * np.cos(wedge), 1.12 * r * np.sin(wedge))
    ex, ey = tip[0] - inner, tip[1]
    return ((px - inner) * ey - py * ex) / np.hypot(ex, ey)


def _ring(x: Field, y: Field, r: float) -> Field:
    return np.abs(np.hypot(x, y) - 0.74 * r) - 0.28 * r


def _heart(x: Field, y: Field, r: float) -> Field:
    a, b = np.abs(x), y + 0.12 * r
    lobe = np.hypot(a - 0.47 * r, b + 0.33 * r) - 0.5 * r
    tail = np.maximum(0.8 * a + 0.6 * b - 0.678 * r, -(b + 0.33 * r))
    return np.minimum(lobe, np.maximum(tail, a - 0.96 * r))


SHAPE_FIELDS: dict[str, Callable[[Field, Field, float], Field]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "star": _star,
    "ring": _ring,
    "heart": _heart,
}
SHAPES = tuple(SHAPE_FIELDS)

# One base-32 digit per row, five pixels each, most significant bit on the left.
_GLYPHS = {
    "A": "ehhvhhh",
    "B": "uhhuhhu",
    "C": "ehggghe",
    "D": "uhhhhhu",
    "E": "vgguggv",
    "F": "vgguggg",
    "G": "ehgnhhe",
    "H": "hhhvhhh",
    "J": "72222ic",
    "K": "hikokih",
    "L": "ggggggv",
    "M": "hrllhhh",
    "N": "hppljjh",
    "P": "uhhuggg",
    "R": "uhhukih",
    "S": "ehge1he",
    "T": "v444444",
    "U": "hhhhhhe",
    "V": "hhhhaa4",
    "W": "hhhllrh",
    "X": "hha4ahh",
    "Y": "hha4444",
    "Z": "v1248gv",
    "0": "ehjlphe",
    "1": "4c4444e",
    "2": "eh168gv",
    "3": "v1261he",
    "4": "26aiv22",
    "5": "vgu11he",
    "6": "68guhhe",
    "7": "v124888",
    "8": "ehhehhe",
    "9": "ehhf12c",
}
CHARACTERS = "".join(_GLYPHS)
"""The 33 characters a string in a picture is made of (I, O and Q look too much like 1 and 0)."""
GLYPH_WIDTH, GLYPH_HEIGHT, PITCH = 10, 14, 12


def glyph(character: str) -> NDArray[np.bool_]:
    """Bitmap of one character at twice the 5x7 font: bool array (14, 10)."""
    rows = _GLYPHS[character]
    small = np.array(
        [[int(row, 32) >> (4 - column) & 1 for column in range(5)] for row in rows], dtype=bool
    )
    return small.repeat(2, axis=0).repeat(2, axis=1)


GLYPHS: dict[str, NDArray[np.bool_]] = {character: glyph(character) for character in CHARACTERS}

_AXIS = np.arange(SIDE, dtype=np.float32)
_LOCAL = np.arange(CELL, dtype=np.float32) + 0.5


def coverage(shape: str, x: float, y: float, radius: float) -> Field:
    """How much of each pixel of a 32x32 cell a shape covers: float32 (32, 32) in [0, 1].

    ``x``, ``y`` are the centre in pixels from the cell's top left corner, ``radius`` is in pixels.
    """
    distance = SHAPE_FIELDS[shape](
        _LOCAL[None, :] - np.float32(x), _LOCAL[:, None] - np.float32(y), radius
    )
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def _stretch(coarse: Field) -> Field:
    """Bilinear enlargement of a small (k, k) field to (96, 96)."""
    k = coarse.shape[0]
    at = _AXIS * ((k - 1) / (SIDE - 1))
    # The last pixel lies on the last sample itself and would have no upper neighbour otherwise.
    low = np.minimum(at.astype(np.int64), k - 2)
    weight = np.zeros((SIDE, k), dtype=np.float32)
    weight[np.arange(SIDE), low] = 1 - (at - low)
    weight[np.arange(SIDE), low + 1] = at - low
    return weight @ coarse @ weight.T


def background(rng: np.random.Generator) -> Field:
    """A dim, nearly grey, textured ground: float32 (96, 96, 3) roughly within 0.1-0.6."""
    angle, wave, phase = rng.uniform(0, 2 * np.pi, 3)
    slope, stripes, tint = (
        rng.uniform(0.02, 0.12),
        rng.uniform(0.0, 0.04),
        rng.uniform(-0.04, 0.04, 3),
    )
    along = (np.cos(angle) * (_AXIS[None, :] - 48) + np.sin(angle) * (_AXIS[:, None] - 48)) / 48
    across = np.cos(wave) * _AXIS[None, :] + np.sin(wave) * _AXIS[:, None]
    clouds = _stretch(rng.normal(0, 0.05, (7, 7)).astype(np.float32))
    grey = (
        rng.uniform(0.25, 0.45)
        + slope * along
        + stripes * np.sin(across * rng.uniform(0.3, 0.9) + phase)
        + clouds
    )
    noise = rng.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * np.float32(0.022)
    return (grey[..., None] + tint).astype(np.float32) + noise


def tinted(rng: np.random.Generator, colour: str) -> Field:
    """A named colour with a little variation: float32 (3,) in [0, 1]."""
    return np.clip(np.array(PALETTE[colour]) + rng.uniform(-0.05, 0.05, 3), 0, 1).astype(np.float32)
