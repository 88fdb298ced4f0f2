"""Both drawings show the numbers, words and outlines of the spec, and text from
outside stays text."""

import html
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from avl_analysis.figures import (
    Axis,
    Bar,
    Caption,
    Figure,
    Line,
    Lines,
    Overlay,
    draw_matplotlib,
    draw_plotly,
    palette,
)
from avl_analysis.figures.pictures import dimmed
from avl_analysis.figures.rows import across, panel_rows
from tests.avl_analysis.figures import specs


def place(figure, panel: int = 0):
    return draw_matplotlib.draw(figure).axes[panel]


def test_matplotlib_draws_every_line_and_band_of_the_spec():
    panel = specs.lines()
    drawn = place(specs.figure("f", panel))
    curves = {
        line.get_label(): line for line in drawn.get_lines() if not line.get_label().startswith("_")
    }
    assert set(curves) == {line.name for line in panel.lines}
    assert np.array_equal(curves["image"].get_ydata(), panel.lines[1].y)
    assert len(drawn.collections) == 3
    assert drawn.get_xlabel() == "decode step (tokens)"
    assert drawn.get_ylim() == (0, 1)


def test_plotly_draws_every_line_and_band_of_the_spec():
    panel = specs.lines()
    plot = draw_plotly.draw(panel)
    curves = [trace for trace in plot.data if trace.fill is None]
    assert [
        np.array_equal(trace.y, line.y) for trace, line in zip(curves, panel.lines, strict=True)
    ] == [True] * 5
    assert sum(trace.fill == "toself" for trace in plot.data) == 3
    assert plot.layout.xaxis.title.text == "decode step (tokens)"
    assert tuple(plot.layout.yaxis.range) == (0, 1)


def test_series_differ_by_marker_and_dash_in_both_drawings():
    panel = specs.lines()
    curves = place(specs.figure("f", panel)).get_lines()[:3]
    assert len({curve.get_marker() for curve in curves}) == 3
    traces = [trace for trace in draw_plotly.draw(panel).data if trace.fill is None][:3]
    assert len({(t.line.dash, t.marker.symbol) for t in traces}) == 3


def test_a_gap_splits_the_band_and_the_line():
    plot = draw_plotly.draw(specs.log_lines())
    bands = [trace for trace in plot.data if trace.fill == "toself"]
    assert [len(band.x) for band in bands] == [4, 6]


def test_plotly_places_limits_and_rules_of_a_log_axis_by_logarithm():
    plot = draw_plotly.draw(specs.log_lines())
    assert plot.layout.xaxis.type == "log"
    assert np.allclose(plot.layout.xaxis.range, [0, np.log10(32)])


def test_both_heat_maps_hold_the_matrix_with_the_first_row_on_top():
    panel = specs.heat()
    drawn = place(specs.figure("f", panel, columns=1))
    assert np.array_equal(
        drawn.get_images()[0].get_array().filled(np.nan), panel.values, equal_nan=True
    )
    low, high = drawn.get_ylim()
    assert low > high
    plot = draw_plotly.draw(panel)
    assert np.array_equal(plot.data[0].z, panel.values, equal_nan=True)
    assert plot.layout.yaxis.autorange == "reversed"


def test_kinds_have_colours_without_an_order_in_both_drawings():
    kinds = ("visual", "sink", "text")
    ticks = tuple((float(place), name) for place, name in enumerate(kinds))
    value = Axis("kind", "class", (-0.5, 2.5), ticks=ticks)
    panel = replace(specs.heat(2, 3), values=np.array([[0, 1, 2], [2, 1, 0.0]]), value=value)
    bar = draw_plotly.draw(panel).data[0].colorscale
    colours = [colour for _, colour in bar][::2]
    assert colours == palette.class_colours(3)
    assert "Cividis" not in str(bar)
    drawn = place(specs.figure("f", panel))
    assert [text.get_text() for text in drawn.texts] == [*kinds, *reversed(kinds)]


def test_cells_never_call_a_value_zero_that_is_not():
    values = np.array([[0.0, 0.004, -0.004], [0.005, np.nan, 0.756]])
    panel = replace(specs.heat(2, 3), values=values, value=Axis("share", "share", (-1, 1)))
    wanted = [["0", "<0.01", ">-0.01"], ["0.01", "", "0.76"]]
    assert panel.texts == wanted
    texts = [text.get_text() for text in place(specs.figure("f", panel)).texts]
    assert texts == [text for row in wanted for text in row if text]
    trace = draw_plotly.draw(panel).data[0]
    assert [html.unescape(text) for row in trace.text for text in row] == [*wanted[0], *wanted[1]]


def test_bars_carry_their_intervals():
    panel = specs.bars()
    plot = draw_plotly.draw(panel)
    assert np.allclose(plot.data[0].error_y.array, 0.04)
    assert np.allclose(plot.data[0].error_y.arrayminus, 0.05)
    assert len(place(specs.figure("f", panel, columns=1)).containers) >= 2
    sideways = draw_plotly.draw(specs.bars(horizontal=True))
    assert np.allclose(sideways.data[0].x, panel.bars[0].values)


def test_an_overlay_shows_the_dimmed_picture_patches_and_outline():
    panel = specs.overlay()
    plot = draw_plotly.draw(panel)
    values = panel.patches.values.reshape(6, 8)
    assert np.array_equal(plot.data[0].z, values, equal_nan=True)
    assert np.allclose(plot.data[0].x, np.arange(9) * 8, atol=0.01)
    assert np.allclose(plot.data[0].y, np.arange(7) * 8, atol=0.01)
    assert len(plot.layout.images) == 1
    assert plot.layout.images[0].source.startswith("data:image/png;base64,")
    assert plot.layout.shapes[1].line.color == palette.BOX
    assert (plot.layout.shapes[1].x0, plot.layout.shapes[1].y1) == (8, 40)
    drawn = place(specs.figure("f", panel, columns=1))
    colours = drawn.get_images()[1].get_array()
    opacity = colours[..., 3] / 255 if colours.dtype == np.uint8 else colours[..., 3]
    assert np.allclose(opacity[1:], 0.92 * values[1:], atol=1 / 255)
    assert opacity[0, 0] == 0
    assert drawn.patches[0].get_bbox().bounds == (8, 8, 22, 32)


def test_a_dimmed_picture_is_grey_and_darker():
    grey = dimmed(specs.picture())
    assert (grey[..., 0] == grey[..., 1]).all()
    assert grey.max() < specs.picture().max()


def test_an_animation_has_a_frame_and_a_slider_stop_for_every_step():
    plot = draw_plotly.draw(specs.animation())
    assert [frame.name for frame in plot.frames] == ["0", "3", "6"]
    assert [step.label for step in plot.layout.sliders[0].steps] == ["0", "3", "6"]
    classes = specs.class_overlay(2).patches.values.reshape(6, 8)
    assert np.array_equal(plot.frames[2].data[0].z, classes)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_file_holds_all_frames_and_repeats(tmp_path, suffix):
    path = draw_matplotlib.save_animation(specs.animation(), tmp_path / f"a.{suffix}", dpi=50)
    with Image.open(path) as image:
        assert image.n_frames == 3
        assert image.info["loop"] == 0


def test_an_animation_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.gif or \.webp"):
        draw_matplotlib.save_animation(specs.animation(), tmp_path / "a.avi")


@pytest.mark.parametrize("figure", specs.gallery(), ids=lambda figure: figure.name)
def test_every_kind_is_saved_in_every_format_and_shown_in_both_themes(tmp_path, figure):
    paths = draw_matplotlib.save(figure, tmp_path, dpi=40)
    assert [path.suffix for path in paths] == [".png", ".svg", ".pdf"]
    assert all(path.stat().st_size > 1000 for path in paths)
    for panel in figure.panels:
        for dark in (False, True):
            json.loads(draw_plotly.as_json(draw_plotly.draw(panel, dark=dark)))


def test_saving_twice_gives_the_same_bytes(tmp_path):
    figure = specs.figure("f", specs.bars())
    first = [path.read_bytes() for path in draw_matplotlib.save(figure, tmp_path / "a", dpi=40)]
    assert first == [
        path.read_bytes() for path in draw_matplotlib.save(figure, tmp_path / "b", dpi=40)
    ]


def test_text_from_outside_is_neither_html_nor_mathematics():
    text = draw_plotly.as_json(draw_plotly.draw(specs.lines()))
    assert "<b>" not in text
    assert "</" not in text
    assert "&lt;b&gt;&#36;a&#36;" in json.loads(text)["data"][-2]["name"]
    legend = draw_matplotlib.draw(specs.figure("f", specs.lines())).axes[0].get_legend()
    entry = next(t for t in legend.get_texts() if "$" in t.get_text())
    assert not entry.get_parse_math()


def test_hover_templates_cannot_be_injected():
    panel = specs.bars()
    hostile = type(panel)(
        panel.category, specs.Axis("a %{x} b", "share"), panel.categories, panel.bars
    )
    assert "%{x} b" not in draw_plotly.draw(hostile).data[0].hovertemplate


def test_light_figures_consist_of_exchangeable_colours():
    pairs = dict(palette.dark_pairs())
    light = draw_plotly.draw(specs.lines()).to_json()
    for colour, dark in pairs.items():
        light = light.replace(colour, dark).replace(
            "rgba({},{},{},".format(*palette.rgb(colour)),
            "rgba({},{},{},".format(*palette.rgb(dark)),
        )
    assert json.loads(light) == json.loads(draw_plotly.draw(specs.lines(), dark=True).to_json())


def test_series_common_to_all_panels_get_one_legend():
    canvas = draw_matplotlib.draw(specs.figure("f", specs.lines(), specs.lines()))
    assert len(canvas.legends) == 1
    assert all(axes.get_legend() is None for axes in canvas.axes)


def test_a_printed_page_carries_words_figure_and_the_whole_caption():
    figure = specs.figure("f", specs.lines(), specs.bars())
    (page,) = draw_matplotlib.figure_pages(
        figure, [draw_matplotlib.Paragraph("A question?", bold=True)]
    )
    assert len(page.subfigs[0].axes) == 2
    words = " ".join(text.get_text() for text in page.texts)
    assert words == f"A question? {figure.title}. {specs.CAPTION.text}"


@pytest.mark.parametrize(
    ("above", "below", "place"), [(10, 90, 0), (90, 10, 3), (90, 90, 3), (5, 5, 0)]
)
def test_words_that_leave_no_room_for_the_figure_get_pages_of_their_own(
    above, below, place, tmp_path
):
    figure = specs.figure("f", specs.lines(), specs.bars())
    words = [
        [draw_matplotlib.Paragraph(f"{side}{i}") for i in range(n)]
        for side, n in (("a", above), ("b", below))
    ]
    pages = draw_matplotlib.figure_pages(figure, *words)
    with_figure = [number for number, page in enumerate(pages) if page.subfigs]
    assert with_figure == [place]
    written = " ".join(text.get_text() for page in pages for text in page.texts).split()
    assert {f"a{i}" for i in range(above)} | {f"b{i}" for i in range(below)} <= set(written)
    draw_matplotlib.save_document(
        pages, tmp_path / "a.pdf", title="A report"
    )  # and it can be drawn


def test_flowing_text_takes_as_many_pages_as_it_needs_and_loses_nothing():
    paragraphs = [draw_matplotlib.Paragraph(f"paragraph {i} " + "word " * 60) for i in range(60)]
    pages = draw_matplotlib.text_pages(paragraphs)
    words = [text.get_text() for page in pages for text in page.texts]
    assert len(pages) > 1
    assert " ".join(words).split() == " ".join(p.text for p in paragraphs).split()
    assert all(0 < text.get_position()[1] < 1 for page in pages for text in page.texts)


def test_a_heading_stays_on_the_page_of_what_it_heads():
    pair = [
        draw_matplotlib.Paragraph("heading", after=0.02),
        draw_matplotlib.Paragraph("body " * 40),
    ]
    pages = draw_matplotlib.text_pages(pair * 40)
    assert len(pages) > 1
    for page in pages:
        assert page.texts[0].get_text() == "heading"
        assert page.texts[-1].get_text() != "heading"


def test_pages_are_bound_into_one_document(tmp_path):
    pages = draw_matplotlib.text_pages([draw_matplotlib.Paragraph("one")])
    pages += draw_matplotlib.figure_pages(
        specs.figure("f", specs.overlay(), specs.overlay("b"), columns=2)
    )
    path = draw_matplotlib.save_document(pages, tmp_path / "a.pdf", title="A report")
    assert path.read_bytes().count(b"/Type /Page ") == 2


def test_bars_side_by_side_are_filled_on_screen():
    plot = draw_plotly.draw(specs.bars())
    assert len(plot.data) > 1
    for bar in plot.data:
        assert (
            bar.marker.pattern.bgcolor == bar.marker.color
        )  # a pattern without it would be white on nothing


def test_a_logarithmic_axis_without_limits_gets_plain_ticks_on_screen():
    curve = Lines(
        Axis("age", "tokens", log=True),
        Axis("weight", "share", log=True),
        (Line("one", np.array([1.0, 2, 40]), np.array([0.5, 0.02, np.nan])),),
    )
    plot = draw_plotly.draw(curve)
    assert list(plot.layout.xaxis.ticktext) == ["1", "2", "5", "10", "20", "50"]
    assert list(plot.layout.yaxis.ticktext) == ["0.02", "0.05", "0.1", "0.2", "0.5"]


@pytest.mark.parametrize("page", [True, False])
def test_titles_of_pictures_side_by_side_never_touch(page):
    picture = np.zeros((40, 40, 3), np.uint8)
    axis = Axis("attention", "share", (0.0, 1.0))
    title = "step 23, layer 14: “diamonds and hearts”"
    panels = tuple(Overlay(picture, axis, title=title) for _ in range(4))
    figure = Figure("side", "side by side", panels, Caption("x", 2, "m", "none"), columns=4)
    canvas = draw_matplotlib.figure_pages(figure)[0] if page else draw_matplotlib.draw(figure)
    canvas.canvas.draw()
    boxes = [
        text.get_window_extent()
        for text in canvas.findobj(Text)
        if text.get_text().startswith("step 23")
    ]
    assert len(boxes) == 4
    boxes.sort(key=lambda box: box.x0)
    for left, right in itertools.pairwise(boxes):
        assert left.x1 < right.x0


def test_names_of_axes_stay_on_a_saved_picture_whatever_its_dots_per_inch(tmp_path):
    names = ("nothing", "visual heads", "random 1, same layers")
    panel = replace(
        specs.bars(),
        category=Axis("silenced", "heads"),
        categories=names,
        bars=(Bar("accuracy", np.array([1.0, 0.9, 0.8])),),
        horizontal=True,
    )
    figure = specs.figure("f", panel, panel, panel, panel)
    (path,) = draw_matplotlib.save(figure, tmp_path, ["png"], dpi=200)
    pixels = np.asarray(Image.open(path).convert("L"))
    assert (pixels[:, :2] == 255).all()  # nothing touches the left edge
    assert (pixels[:, 2:60] < 128).any()  # the name stands close to it


def test_pictures_and_charts_of_one_figure_do_not_share_a_row():
    picture, chart, named = specs.overlay(), specs.lines(), specs.heat()
    named = replace(named, x=replace(named.x, ticks=((0.0, "a"), (1.0, "b"))))
    mixed = specs.figure("f", picture, picture, picture, named, chart, chart, chart, columns=4)
    assert [len(row) for row in panel_rows(mixed)] == [3, 1, 2, 1]
    assert [across(mixed, row) for row in panel_rows(mixed)] == [3, 2, 2, 2]
    charts = specs.figure("f", *[chart] * 5, columns=3)
    assert [len(row) for row in panel_rows(charts)] == [3, 2]
    pictures = specs.figure("f", *[picture] * 5, columns=4)
    assert [len(row) for row in panel_rows(pictures)] == [4, 1]


def test_a_map_beside_charts_of_the_same_series_leaves_them_one_legend():
    canvas = draw_matplotlib.draw(specs.figure("f", specs.lines(), specs.lines(), specs.heat()))
    legends = [part.legends for part in canvas.subfigs]
    assert [len(found) for found in legends] == [1, 0]  # below the last row of charts
    assert all(axes.get_legend() is None for axes in canvas.axes)


@pytest.mark.parametrize("horizontal", [True, False])
def test_bars_of_counted_things_are_whole(horizontal):
    panel = replace(specs.bars(horizontal), category=Axis("hidden", "tokens"))
    plot = draw_plotly.draw(panel)
    axis = plot.layout.yaxis if horizontal else plot.layout.xaxis
    assert sorted(axis.range) == [-0.5, 2.5]
    assert axis.minallowed is None
    assert (axis.range[0] > axis.range[1]) is horizontal  # the first one at the top
