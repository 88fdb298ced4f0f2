"""Short drawn videos: one shape moves across the picture, another stands still.

What moves, which way, and its box in every frame are known, so that attention over time can be
looked at and checked without a download. The ground and the still shape are the same in all frames
up to pixel noise; the moving shape keeps its colour and size and moves in equal steps.

Nothing here was used in training. The embedded model has seen single pictures only and no question
about movement: it is shown the frames as pictures, and docs/howto/video.md says what it makes of
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avl_analysis.scenes import drawing
from avl_analysis.scenes.drawing import COLOURS, SHAPE_FIELDS, SHAPES, SIDE
from avl_analysis.scenes.world import Box

DIRECTIONS = ("left", "right", "up", "down")
FRAMES = 6
"""Frames of a video unless told otherwise."""
RADIUS = 10.0
"""Of both shapes, in pixels."""
MARGIN = 14.0
"""From the border to the centre of the moving shape in the first and the last frame, in pixels."""
NOISE = 0.01
"""Standard deviation of the noise by which the ground differs from frame to frame."""


@dataclass(frozen=True, eq=False)
class MovingScene:
    """A video with the truth about it.

    Attributes:
        seed, index: what it is drawn from.
        frames: (96, 96, 3) uint8 each.
        colour, shape: of what moves.
        direction: which way it moves, one of `DIRECTIONS`.
        boxes: pixel box of the moving shape in every frame.
        still: colour and shape of what does not move.
        still_box: its pixel box.
    """

    seed: int
    index: int
    frames: tuple[NDArray[np.uint8], ...]
    colour: str
    shape: str
    direction: str
    boxes: tuple[Box, ...]
    still: tuple[str, str]
    still_box: Box

    @property
    def prompt(self) -> str:
        return f"Which way does the {self.colour} {self.shape} move?"

    @property
    def answer(self) -> str:
        return self.direction


def moving(seed: int, index: int = 0, frames: int = FRAMES) -> MovingScene:
    """The video with this seed and index; the same numbers give the same video everywhere.

    Args:
        seed: 0 or more.
        index: 0 or more.
        frames: how many, at least 2.

    Raises:
        ValueError: a negative number, or fewer than two frames.
    """
    if seed < 0 or index < 0 or frames < 2:
        raise ValueError(
            f"seed={seed}, index={index}, frames={frames}: seed and index must be 0 or more, and a"
            " video has at least 2 frames"
        )
    rng = np.random.default_rng([seed, index])
    direction = DIRECTIONS[int(rng.integers(4))]
    colours = rng.choice(len(COLOURS), 2, replace=False)
    shapes = rng.choice(len(SHAPES), 2, replace=False)
    ground = drawing.background(rng)
    inks = [drawing.tinted(rng, COLOURS[colour]) for colour in colours]
    # The two shapes keep to one half of the picture each, so that neither covers the other and
    # neither is cut off at the border.
    near = rng.uniform(MARGIN, SIDE / 2 - MARGIN)
    across, beside = (near, near + SIDE / 2) if rng.integers(2) else (near + SIDE / 2, near)
    along = rng.uniform(MARGIN, SIDE - MARGIN)
    way = np.linspace(MARGIN, SIDE - MARGIN, frames)
    if direction in ("left", "up"):
        way = way[::-1]
    sideways = direction in ("left", "right")
    still = (along, beside) if sideways else (beside, along)
    _, still_box = _painted(ground, SHAPES[shapes[1]], still, inks[1])
    drawn, boxes = [], []
    for at in way:
        canvas, _ = _painted(ground, SHAPES[shapes[1]], still, inks[1])
        place = (at, across) if sideways else (across, at)
        canvas, box = _painted(canvas, SHAPES[shapes[0]], place, inks[0])
        canvas = canvas + rng.normal(0, NOISE, canvas.shape)
        drawn.append((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8))
        boxes.append(box)
    return MovingScene(
        seed,
        index,
        tuple(drawn),
        COLOURS[colours[0]],
        SHAPES[shapes[0]],
        direction,
        tuple(boxes),
        (COLOURS[colours[1]], SHAPES[shapes[1]]),
        still_box,
    )


def _painted(
    canvas: drawing.Field, shape: str, place: tuple[float, float], ink: drawing.Field
) -> tuple[drawing.Field, Box]:
    """The picture with a shape painted over it, and the box of the pixels it covers.

    Args:
        canvas: (96, 96, 3) in [0, 1].
        shape: its name.
        place: of its centre, in pixels from the left and from the top.
        ink: (3,) its colour.
    """
    at = np.arange(SIDE, dtype=np.float64) + 0.5
    distance = SHAPE_FIELDS[shape](at[None, :] - place[0], at[:, None] - place[1], RADIUS)
    cover = np.clip(0.5 - distance, 0.0, 1.0)
    ys, xs = np.flatnonzero(cover.any(1)), np.flatnonzero(cover.any(0))
    box = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
    return canvas + cover[..., None] * (ink - canvas), box
