"""Drawn videos: what is said to move is what moves, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest

from avl_analysis.scenes import moving
from avl_analysis.scenes.moving import DIRECTIONS, FRAMES, NOISE


@pytest.mark.parametrize("index", range(12))
def test_between_frames_only_the_boxes_of_the_moving_shape_change(index: int) -> None:
    scene = moving(5, index)
    noise = 255 * 8 * NOISE
    for (one, other), boxes in zip(
        zip(scene.frames, scene.frames[1:], strict=False),
        zip(scene.boxes, scene.boxes[1:], strict=False),
        strict=True,
    ):
        changed = np.abs(one.astype(int) - other.astype(int)).max(-1) > noise
        inside = np.zeros_like(changed)
        for left, top, right, bottom in boxes:
            inside[top:bottom, left:right] = True
        assert changed.any()
        assert not (changed & ~inside).any()
    left, top, right, bottom = scene.still_box
    for box in scene.boxes:  # the still shape is never covered
        assert box[2] <= left or box[0] >= right or box[3] <= top or box[1] >= bottom


@pytest.mark.parametrize("index", range(12))
def test_the_answer_says_which_way_the_boxes_go(index: int) -> None:
    scene = moving(6, index)
    first, last = (np.array(scene.boxes[at], float).reshape(2, 2).mean(0) for at in (0, -1))
    right, down = last - first
    expected = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[scene.answer]
    assert (np.sign(round(right)), np.sign(round(down))) == expected
    assert scene.colour in scene.prompt
    assert scene.shape in scene.prompt


def test_the_same_numbers_give_the_same_video_and_all_directions_occur() -> None:
    one, other = moving(1, 2), moving(1, 2)
    assert all(map(np.array_equal, one.frames, other.frames))
    assert len(one.frames) == FRAMES
    assert len(moving(1, 2, 3).frames) == 3
    assert {moving(1, index).direction for index in range(30)} == set(DIRECTIONS)


@pytest.mark.parametrize("wrong", [(-1, 0, 6), (0, -1, 6), (0, 0, 1)])
def test_what_is_no_video_is_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 2 frames"):
        moving(*wrong)


@pytest.mark.parametrize("index", range(12))
def test_no_shape_is_cut_off_at_the_border(index: int) -> None:
    scene = moving(7, index)
    for box in (*scene.boxes, scene.still_box):
        assert 0 < box[0] < box[2] < 96
        assert 0 < box[1] < box[3] < 96
