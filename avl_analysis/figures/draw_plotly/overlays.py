"""Pictures on the screen.

Patches of attention or of classes over them, outlines, and animations with a slider.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from avl_analysis.figures import palette
from avl_analysis.figures.draw_plotly.look import dress, literal
from avl_analysis.figures.palette import Theme
from avl_analysis.figures.pictures import data_uri, dimmed
from avl_analysis.figures.spec import Animation, Box, Overlay

_MOST_WORDS = 16
"""Patches side by side up to which words are written on them; more are shown when pointed at."""


def draw_overlay(panel: Overlay, theme: Theme) -> go.Figure:
    """An image with its patches and outlines as a plot."""
    height, width = panel.picture.shape[:2]
    plot = go.Figure()
    if panel.patches is not None:
        # The patches must be trace 0, which the frames of an animation replace.
        plot.add_trace(_patches(panel))
    if panel.classes:
        _class_legend(plot, panel, theme)
    shown = panel.picture if panel.patches is None or panel.classes else dimmed(panel.picture)
    plot.add_layout_image(
        source=data_uri(shown),
        xref="x",
        yref="y",
        x=0,
        y=0,
        sizex=width,
        sizey=height,
        sizing="stretch",
        layer="below",
    )
    for box in panel.boxes:
        _box(plot, box, height)
    dress(plot, theme)
    plot.update_xaxes(range=[0, width], visible=False, constrain="domain")
    # The y axis runs downwards, as rows of pixels do, and a pixel is as tall as it is wide.
    plot.update_yaxes(range=[height, 0], visible=False, scaleanchor="x", constrain="domain")
    plot.update_layout(height=300, margin={"l": 4, "r": 4, "t": 4, "b": 4})
    return plot


def _patches(panel: Overlay) -> go.Heatmap:
    assert panel.patches is not None
    patches, raster = panel.patches, panel.patches.raster
    height, width = panel.picture.shape[:2]
    values = raster.take(patches.values)
    common: dict[str, Any] = {
        "x": raster.x * width,  # edges of the cells, one more than there are columns
        "y": raster.y * height,
        "z": values,
        "showscale": False,
        "customdata": raster.token,
        "hoverongaps": False,
    }
    place = "image token %{customdata}<br>"
    if panel.classes:
        # The entry behind the last class is for cells without a token. NaN must be replaced before
        # the numbers are made whole.
        names = np.array([*map(literal, panel.classes), "none"], dtype=object)
        picked = np.where(np.isnan(values), len(panel.classes), np.nan_to_num(values)).astype(int)
        return go.Heatmap(
            **common,
            # Half a class beyond both ends, so that each class number is in the middle of its
            # colour step.
            zmin=-0.5,
            zmax=len(panel.classes) - 0.5,
            colorscale=_class_scale(len(panel.classes)),
            text=names[picked],
            hovertemplate=place + "%{text}<extra></extra>",
        )
    low, high = panel.scale
    fade = [
        [0, palette.translucent(palette.ATTENTION, 0)],
        [1, palette.translucent(palette.ATTENTION, palette.ATTENTION_OPACITY)],
    ]
    label = literal(panel.value.label)
    if panel.words:
        words = np.array([*map(literal, panel.words), ""], dtype=object)
        # -1, a cell without a token, picks the empty text at the end.
        common |= {"text": words[raster.token]}
        place += "%{text}<br>"
        if max(raster.token.shape) <= _MOST_WORDS:
            common |= {"texttemplate": "%{text}", "textfont": {"size": 11, "color": "white"}}
    return go.Heatmap(
        **common,
        zmin=low,
        zmax=high,
        colorscale=fade,
        hovertemplate=place + label + ": %{z:.3~g}<extra></extra>",
    )


def _class_scale(count: int) -> list[list[Any]]:
    """Plotly colour scale with one flat step per class."""
    scale: list[list[Any]] = []
    for number in range(count):
        fill = palette.translucent(palette.CLASS_COLOURS[number], palette.CLASS_OPACITY[number])
        scale += [[number / count, fill], [(number + 1) / count, fill]]
    return scale


def _class_legend(plot: go.Figure, panel: Overlay, theme: Theme) -> None:
    for number, name in enumerate(panel.classes):
        fill = palette.translucent(
            palette.CLASS_COLOURS[number], max(0.8, palette.CLASS_OPACITY[number])
        )
        marker = {
            "symbol": "square",
            "size": 12,
            "color": fill,
            "line": {"color": theme.muted, "width": 1},
        }
        plot.add_trace(
            # Points without a place are not drawn and still have an entry in the legend.
            go.Scatter(x=[None], y=[None], mode="markers", name=literal(name), marker=marker)
        )


def _box(plot: go.Figure, box: Box, height: int) -> None:
    """Outline a box; its name stands above it, at the upper border of the picture inside it."""
    corners = {"x0": box.left, "y0": box.top, "x1": box.right, "y1": box.bottom, "type": "rect"}
    plot.add_shape(**corners, line={"color": palette.BOX_EDGE, "width": 4})
    # A wide dark frame below a narrow light one: visible on any picture.
    plot.add_shape(**corners, line={"color": palette.BOX, "width": 2})
    if box.label:
        plot.add_annotation(
            x=box.left,
            y=box.top,
            text=literal(box.label),
            showarrow=False,
            xanchor="left",
            yanchor="top" if box.top < 0.1 * height else "bottom",
            font={"color": palette.BOX, "size": 11},
            bgcolor="rgba(1,1,1,0.6)",
            borderpad=1,
        )


def draw_animation(panel: Animation, theme: Theme) -> go.Figure:
    """Overlays over time as a plot with a slider and a play button."""
    plot = draw_overlay(panel.frames[0], theme)
    plot.frames = [
        go.Frame(
            data=[_patches(frame)],
            traces=[0],
            name=str(step),
            layout={"title": {"text": literal(frame.title)}},
        )
        for step, frame in zip(panel.steps, panel.frames, strict=True)
    ]
    wait = round(1000 * panel.seconds)
    # Heat maps change in an animation only when the whole plot is drawn again, hence `redraw`.
    instant = {
        "mode": "immediate",
        "frame": {"duration": 0, "redraw": True},
        "transition": {"duration": 0},
    }
    play = {
        "fromcurrent": True,
        "frame": {"duration": wait, "redraw": True},
        "transition": {"duration": 0},
    }
    buttons = [
        {"label": "play", "method": "animate", "args": [None, play]},
        # To animate to the frame [None] at once is how plotly stops an animation.
        {"label": "pause", "method": "animate", "args": [[None], instant]},
    ]
    steps = [
        {"label": str(step), "method": "animate", "args": [[str(step)], instant]}
        for step in panel.steps
    ]
    colour = {"color": theme.ink}
    # Plotly lights a button under the pointer in one fixed, light colour, so its words are dark in
    # both themes.
    on_button = {"color": palette.ON_BUTTON}
    plot.update_layout(
        height=430,
        margin={"l": 4, "r": 4, "t": 44, "b": 90},
        title={
            "text": literal(panel.frames[0].title),
            "font": {"size": 13},
            "x": 0.01,
            "xanchor": "left",
        },
        updatemenus=[
            {
                "type": "buttons",
                "direction": "left",
                "buttons": buttons,
                "x": 0,
                "y": -0.04,
                "xanchor": "left",
                "yanchor": "top",
                "font": on_button,
                "bgcolor": palette.BUTTON,
                "bordercolor": theme.muted,
                "showactive": False,
            }
        ],
        sliders=[
            {
                "steps": steps,
                "x": 0.32,
                "len": 0.68,
                "y": -0.02,
                "pad": {"t": 0},
                "font": colour,
                "currentvalue": {"prefix": "decode step "},
            }
        ],
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )
    return plot
