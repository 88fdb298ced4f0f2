"""What stands where in a drawn scene, and the exact truth about it.

``draw(rng)`` places two to six coloured shapes into distinct cells of a 3x3 board and, in four
scenes of five, one string of random characters, paints them over a textured ground and returns
picture and truth together: for every object and every character the pixel box and the image tokens
it covers. Nothing here knows about questions or models.

Note: a string begins in one cell and usually runs on into the next; its place is the cell
of its left edge, and no object stands in any cell it touches. At least a third of the image tokens
is background, always.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avl_analysis.scenes import drawing
from avl_analysis.scenes.drawing import CELL, CHARACTERS, COLOURS, GRID, PATCH, SHAPES, SIDE

Box = tuple[int, int, int, int]
"""Half-open pixel box (left, top, right, bottom)."""

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
SIZES = ("big", "small")
RADII = {"big": (9.4, 10.4), "small": (5.6, 6.4)}
JITTER = 3.0
BACKGROUND_SHARE = 1 / 3
"""Least share of image tokens that nothing covers."""


@dataclass(frozen=True)
class Thing:
    """One coloured shape.

    Its attributes, cell 0-8 in reading order, pixel box and covered image tokens (0-143).
    """

    colour: str
    shape: str
    size: str
    cell: int
    box: Box
    patches: tuple[int, ...]

    @property
    def place(self) -> str:
        return PLACES[self.cell]


@dataclass(frozen=True)
class Character:
    """One character of the string: itself, its pixel box and the image tokens it touches."""

    character: str
    box: Box
    patches: tuple[int, ...]


@dataclass(frozen=True)
class Text:
    """The string of a scene; ``cell`` is the cell of its left edge."""

    string: str
    colour: str
    cell: int
    box: Box
    patches: tuple[int, ...]
    characters: tuple[Character, ...]

    @property
    def place(self) -> str:
        return PLACES[self.cell]


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, uint8 (96, 96, 3), its objects in reading order, and its string if it has one."""

    image: NDArray[np.uint8]
    things: tuple[Thing, ...]
    text: Text | None

    @property
    def background(self) -> tuple[int, ...]:
        """Image tokens that neither an object nor a character covers."""
        taken = {patch for thing in self.things for patch in thing.patches}
        taken.update(self.text.patches if self.text else ())
        return tuple(patch for patch in range(GRID * GRID) if patch not in taken)

    def empty_cells(self) -> tuple[int, ...]:
        """Cells with no object and no part of the string."""
        taken = {thing.cell for thing in self.things} | set(
            text_cells(self.text) if self.text else ()
        )
        return tuple(cell for cell in range(9) if cell not in taken)


def patches_of(box: Box) -> tuple[int, ...]:
    """Image tokens, in reading order, that a pixel box touches."""
    left, top, right, bottom = box
    columns = range(left // PATCH, (right - 1) // PATCH + 1)
    return tuple(
        row * GRID + column
        for row in range(top // PATCH, (bottom - 1) // PATCH + 1)
        for column in columns
    )


def text_cells(text: Text) -> tuple[int, ...]:
    """Cells a string touches."""
    row = text.cell // 3
    return tuple(
        row * 3 + column for column in range(text.box[0] // CELL, (text.box[2] - 1) // CELL + 1)
    )


def _covered(mask: NDArray[np.bool_], left: int, top: int) -> tuple[Box, tuple[int, ...]]:
    """Box and image tokens of the true pixels of a cell-sized mask.

    Its corner is at (left, top).
    """
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (left + int(xs[0]), top + int(ys[0]), left + int(xs[-1]) + 1, top + int(ys[-1]) + 1)
    # (rows, y, columns, x) of a cell's patches: whether any pixel of each is covered.
    blocks = mask.reshape(CELL // PATCH, PATCH, CELL // PATCH, PATCH).any((1, 3))
    rows, columns = np.nonzero(blocks)
    return box, tuple(int(i) for i in (rows + top // PATCH) * GRID + columns + left // PATCH)


def _place_text(rng: np.random.Generator) -> Text:
    string = "".join(CHARACTERS[i] for i in rng.integers(len(CHARACTERS), size=rng.integers(3, 6)))
    # The pitch is two pixels wider than a character; behind the last there is no gap.
    width = drawing.PITCH * len(string) - 2
    starts = [x for x in range(SIDE - width - 1) if 4 <= x % CELL <= 20]
    left, row = int(rng.choice(starts)), int(rng.integers(3))
    top = row * CELL + int(rng.integers(4, 15))
    boxes = [
        (
            left + drawing.PITCH * i,
            top,
            left + drawing.PITCH * i + drawing.GLYPH_WIDTH,
            top + drawing.GLYPH_HEIGHT,
        )
        for i in range(len(string))
    ]
    characters = tuple(
        Character(c, box, patches_of(box)) for c, box in zip(string, boxes, strict=True)
    )
    box = (left, top, left + width, top + drawing.GLYPH_HEIGHT)
    cell, colour = row * 3 + left // CELL, COLOURS[rng.integers(len(COLOURS))]
    return Text(string, colour, cell, box, patches_of(box), characters)


def _looks(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """``count`` distinct (colour, shape) pairs.

    About half share a colour or a shape with an earlier one.
    """
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        colour, shape = COLOURS[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))]
        if pairs and rng.random() < 0.5:
            earlier = pairs[rng.integers(len(pairs))]
            colour, shape = (earlier[0], shape) if rng.random() < 0.5 else (colour, earlier[1])
        if (colour, shape) not in pairs:
            pairs.append((colour, shape))
    return pairs


def _paint_thing(
    rng: np.random.Generator, canvas: NDArray[np.float32], look: tuple[str, str], cell: int
) -> Thing:
    colour, shape = look
    size = SIZES[rng.integers(2)]
    dx, dy = rng.uniform(-JITTER, JITTER, 2)
    cover = drawing.coverage(shape, CELL / 2 + dx, CELL / 2 + dy, rng.uniform(*RADII[size]))
    left, top = CELL * (cell % 3), CELL * (cell // 3)
    # A view: painting into it changes the canvas.
    window = canvas[top : top + CELL, left : left + CELL]
    window += cover[..., None] * (drawing.tinted(rng, colour) - window)
    # Pixels that the soft edge only just tints count as covered.
    box, patches = _covered(cover > 0.0, left, top)
    return Thing(colour, shape, size, cell, box, patches)


def draw(rng: np.random.Generator, most: int = 6) -> Scene:
    """One scene with 2 to ``most`` objects (2 <= most <= 6).

    Drawn from ``rng`` and from nothing else.
    """
    if not 2 <= most <= 6:
        raise ValueError(f"most={most} objects: choose 2 to 6")
    while True:
        text = _place_text(rng) if rng.random() < 0.8 else None
        blocked = text_cells(text) if text else ()
        # No object shares a cell with the string, so things never cover each other.
        free = [cell for cell in range(9) if cell not in blocked]
        count = min(int(rng.integers(2, most + 1)), len(free))
        cells = sorted(int(cell) for cell in rng.choice(free, size=count, replace=False))
        canvas = drawing.background(rng)
        things = tuple(
            _paint_thing(rng, canvas, look, c)
            for look, c in zip(_looks(rng, count), cells, strict=True)
        )
        if text:
            ink = drawing.tinted(rng, text.colour)
            for character in text.characters:
                left, top, right, bottom = character.box
                canvas[top:bottom, left:right][drawing.GLYPHS[character.character]] = ink
        image = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
        scene = Scene(image, things, text)
        # A scene that is too full is drawn anew as a whole, from where the generator now stands.
        if len(scene.background) >= BACKGROUND_SHARE * GRID * GRID:
            return scene
