"""Figures of single tokens: the right numbers in the right place, and nothing foreign that could
act.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from avl_analysis.figures import Patches, draw_html, draw_plotly, looks
from avl_analysis.figures.clickable import with_cells, with_opacity
from avl_analysis.figures.spec import Axis
from avl_analysis.figures.strip import Span, Strip
from avl_analysis.figures.tradeoff import Place, tradeoff

TOKENS = ("<s>", "", "", " what", "<script>alert(1)</script>", '" onmouseover="x', " red")
MODALITY = np.array([0, 1, 1, 2, 2, 2, 2], np.int8)
VALUES = np.array([0.1, 0.3, 0.2, 0.0, 0.3, np.nan, 0.1])


def strip() -> Strip:
    return looks.token_strip(TOKENS, VALUES, MODALITY, prompt=6, marked=6)


def test_a_strip_leaves_the_picture_out_and_keeps_values_with_their_words() -> None:
    shown = strip()
    assert shown.tokens == ("<s>", *TOKENS[3:])
    np.testing.assert_array_equal(shown.values, [0.1, 0.0, 0.3, np.nan, 0.1])
    assert [(span.name, span.first, span.last) for span in shown.spans] == [
        ("system", 0, 1),
        ("question", 1, 4),
        ("answer", 4, 5),
    ]
    assert shown.marked == 4


def test_no_token_can_become_markup() -> None:
    drawn = draw_html.draw(strip(), dark=True)
    assert "<script" not in drawn
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in drawn
    assert 'onmouseover="' not in drawn


def test_a_strip_says_what_was_not_read() -> None:
    drawn = draw_html.draw(strip())
    assert drawn.count('title="not read"') == 1
    assert 'title="attention: 0.3000"' in drawn


@pytest.mark.parametrize("dark", [False, True])
def test_fidelity_frames_the_tokens_for_which_a_policy_prefers_another(dark: bool) -> None:
    shown = looks.fidelity_strip(
        "A-VL", (" red", " <b>"), np.array([0.2, 5.0, 0.0]), {1: "</b>", 2: "(end)"}
    )
    assert shown.tokens == (" red", " <b>")  # the end of the answer is no word
    assert dict(shown.notes) == {1: "</b>"}
    drawn = draw_html.draw(shown, dark=dark)
    assert drawn.count("dashed") == 1
    assert "→&lt;/b&gt;" in drawn
    assert "<b>" not in drawn
    assert "color:#000000;text-decoration" in drawn  # read better on this shade in both themes


def test_short_axes_of_counted_things_have_ticks_at_whole_numbers_only() -> None:
    layers = looks.mass_by_layer(
        (0, 1, 2), {name: [0.1, 0.2, 0.3] for name in ("system", "image", "text")}
    )
    assert draw_plotly.draw(layers).layout.xaxis.dtick == 1
    steps = looks.evolution("long", {"a": np.zeros(40)}, Axis("mass", "share"))
    assert draw_plotly.draw(steps).layout.xaxis.dtick is None


def test_the_first_row_and_column_of_a_map_are_drawn_in_full() -> None:
    heat = looks.head_map(np.arange(6.0).reshape(2, 3), (0, 1), Axis("mass", "share"))
    plot = draw_plotly.draw(heat)
    assert plot.layout.xaxis.minallowed is None
    assert plot.layout.yaxis.minallowed is None


def test_a_strip_refuses_values_and_spans_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 values for 1 tokens"):
        Strip(("a",), np.zeros(2), looks.ATTENTION, ())
    with pytest.raises(ValueError, match="out of order"):
        Strip(("a", "b"), np.zeros(2), looks.ATTENTION, (Span("x", 1, 2), Span("y", 0, 1)))


def test_every_cell_of_a_head_map_can_be_clicked_and_says_which_it_is() -> None:
    heat = looks.head_map(np.arange(6.0).reshape(2, 3), (4, 7), Axis("mass <b>", "share"))
    plot = with_cells(draw_plotly.draw(heat), heat, marked=(1, 2))
    points = plot.data[-1]
    assert points.type == "scatter"
    np.testing.assert_array_equal(
        np.asarray(points.customdata)[:, :2], [[r, c] for r in (0, 1) for c in (0, 1, 2)]
    )
    np.testing.assert_array_equal(np.asarray(points.customdata)[:, 2], np.arange(6.0))
    assert "<b>" not in points.hovertemplate
    assert plot.layout.shapes[-1].x0 == 1.5
    assert plot.layout.shapes[-1].y1 == 1.5
    assert plot.layout.yaxis.range[0] > plot.layout.yaxis.range[1]  # layer 0 at the top


@pytest.mark.parametrize("upward", [False, True])
def test_a_map_that_can_be_clicked_ends_where_its_cells_end(upward: bool) -> None:
    heat = replace(
        looks.head_map(np.ones((32, 32)), tuple(range(32)), Axis("mass", "share")), upward=upward
    )
    plot = with_cells(draw_plotly.draw(heat), heat)
    # with an automatic range, the clickable squares would widen the axis beyond the cells
    assert plot.layout.yaxis.autorange is False
    assert sorted(plot.layout.yaxis.range) == [-0.5, 31.5]
    assert sorted(plot.layout.xaxis.range) == [-0.5, 31.5]


def test_opacity_changes_the_patches_alone() -> None:
    overlay = looks.token_overlay(np.zeros((8, 8, 3), np.uint8), Patches.grid(np.eye(2)))
    plot = with_opacity(draw_plotly.draw(overlay), 0.25)
    assert [trace.opacity for trace in plot.data if trace.type == "heatmap"] == [0.25]


def test_states_are_drawn_as_three_named_classes() -> None:
    overlay = looks.states_overlay(
        np.zeros((8, 8, 3), np.uint8), Patches.grid([[0.0, 1], [2, np.nan]])
    )
    names = {trace.name for trace in draw_plotly.draw(overlay).data if trace.name}
    assert names == set(looks.STATES)


def test_a_tradeoff_leaves_out_what_was_not_measured() -> None:
    places = [Place("full", 1.0, 0.9, 0.8, 1.0), Place("none", 0.5, np.nan, np.nan, np.nan)]
    shown = tradeoff(places, Axis("right", "share"))
    assert [points.name for points in shown.points] == ["full"]
    assert shown.points[0].low is not None
