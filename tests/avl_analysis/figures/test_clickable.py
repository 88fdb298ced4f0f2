"""Patches of any layout can be chosen: the place of every one that is seen is its own."""

from __future__ import annotations

import numpy as np
import pytest

from avl_analysis.figures import draw_plotly
from avl_analysis.figures.clickable import COLOURS, with_colours, with_opacity, with_patches
from avl_analysis.figures.patches import Patches
from avl_analysis.figures.spec import Axis, Overlay


def overlay() -> Overlay:
    """A whole view of 1 x 2 tokens, of which the right one is covered by 2 x 1 finer ones."""
    boxes = [[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0.5, 0, 1, 0.5], [0.5, 0.5, 1, 1]]
    patches = Patches(np.array([0.1, 0.2, 0.3, 0.4]), np.array(boxes), np.array([0, 0, 1, 1]))
    return Overlay(np.zeros((40, 120, 3), np.uint8), Axis("attention", "share"), patches)


def test_every_patch_that_is_seen_has_one_point_in_its_middle() -> None:
    shown = overlay()
    drawn = with_patches(draw_plotly.draw(shown), shown, [3])
    points = next(trace for trace in drawn.data if trace.type == "scatter")
    places = {
        int(data[0]): (x, y)
        for data, x, y in zip(points.customdata, points.x, points.y, strict=True)
    }
    assert places == {0: (30, 20), 2: (90, 10), 3: (90, 30)}  # token 1 lies below 2 and 3
    framed = [(shape.x0, shape.y0, shape.x1, shape.y1) for shape in drawn.layout.shapes]
    assert framed == [(60, 20, 120, 40)] * 2  # a dark outline and a light one


@pytest.mark.parametrize("name", COLOURS)
def test_colours_change_and_values_stay(name: str) -> None:
    plain = draw_plotly.draw(overlay())
    drawn = with_colours(with_opacity(draw_plotly.draw(overlay()), 0.5), name, smooth=True)
    before, after = plain.data[0], drawn.data[0]
    np.testing.assert_array_equal(before.z, after.z)
    assert after.zsmooth == "best"
    assert after.opacity == pytest.approx(0.5 if name == "amber" else 0.3)
    assert (before.colorscale == after.colorscale) == (name == "amber")
