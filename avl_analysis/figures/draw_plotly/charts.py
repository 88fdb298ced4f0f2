"""Charts on the screen: curves with bands, heat maps, bars and points with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from avl_analysis.figures import palette
from avl_analysis.figures.draw_plotly.look import (
    CLEAR,
    HEIGHT,
    frame,
    hover_text,
    interval_of,
    literal,
    range_text,
    room_for_legend,
    title,
    whole_ticks,
)
from avl_analysis.figures.palette import Theme
from avl_analysis.figures.spec import (
    Array,
    Axis,
    Bars,
    Heat,
    Line,
    Lines,
    Points,
    Scatter,
    repeated,
)


def draw_lines(panel: Lines, theme: Theme, dark: bool) -> go.Figure:
    """Curves with their bands and reference lines as a plot."""
    plot = go.Figure()
    for number, line in enumerate(panel.lines):
        look = line_look(line, theme, dark)
        if line.low is not None and line.high is not None:
            _band(
                plot,
                line.x,
                line.low,
                line.high,
                palette.translucent(look["color"], 0.2),
                group=str(number),
            )
        plot.add_trace(
            go.Scatter(
                x=line.x,
                y=line.y,
                name=literal(line.name),
                mode="lines+markers" if line.role == "measured" else "lines",
                line=look,
                marker={
                    "symbol": palette.style(line.slot).plotly_marker,
                    "size": 6,
                    "maxdisplayed": 14,
                },
                # A click on the legend's entry hides the band together with its curve.
                legendgroup=str(number),
                showlegend=not repeated(panel, line),
                customdata=interval_of(line.low, line.high),
                hovertemplate=hover_text(panel.x, panel.y, interval=line.low is not None),
            )
        )
    x, y = (
        _bounded(panel.x, [line.x for line in panel.lines]),
        _bounded(panel.y, [line.y for line in panel.lines]),
    )
    frame(plot, x, y, theme, panel.rules)
    if panel.x.counted:
        plot.update_xaxes(**whole_ticks([line.x for line in panel.lines]))
    plot.update_layout(showlegend=len(panel.lines) > 1)
    room_for_legend(plot)
    return plot


def _bounded(axis: Axis, values: Sequence[Array]) -> Axis:
    """A logarithmic axis with limits a little beyond its values.

    Plotly's own ticks crowd between powers of ten.
    """
    known = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in values])
    if not axis.log or axis.limits is not None or not known.size:
        return axis
    return replace(axis, limits=(float(known.min()) / 1.25, float(known.max()) * 1.25))


def line_look(line: Line, theme: Theme, dark: bool) -> dict[str, Any]:
    """Colour, dash and marker of a curve, as arguments of a plotly trace."""
    style = palette.style(line.slot)
    if line.role == "baseline":
        return {"color": theme.muted, "dash": "dot", "width": 1.5}
    if line.role == "fit":
        return {"color": style.colour(dark), "dash": "3px,2px", "width": 1.2}
    return {"color": style.colour(dark), "dash": style.plotly_dash, "width": 2}


def _band(plot: go.Figure, x: Array, low: Array, high: Array, fill: str, group: str) -> None:
    """The interval as a filled outline, one for each unbroken stretch of measured points."""
    # Split where known and unknown points meet: one outline across a gap would show an interval
    # where nothing was measured.
    finite = np.isfinite(low) & np.isfinite(high)
    for stretch in np.split(
        np.arange(finite.size), np.flatnonzero(np.diff(finite.astype(int))) + 1
    ):
        if stretch.size and finite[stretch[0]]:
            outline_x = np.concatenate([x[stretch], x[stretch][::-1]])
            outline_y = np.concatenate([high[stretch], low[stretch][::-1]])
            plot.add_trace(
                go.Scatter(
                    x=outline_x,
                    y=outline_y,
                    # The outline runs forth along the upper bounds and back along the lower ones.
                    fill="toself",
                    fillcolor=fill,
                    line={"width": 0, "color": CLEAR},
                    mode="lines",
                    hoverinfo="skip",
                    showlegend=False,
                    legendgroup=group,
                )
            )


def draw_heat(panel: Heat, theme: Theme) -> go.Figure:
    """A matrix with its colour bar as a plot."""
    low, high = panel.value.limits or (
        float(np.nanmin(panel.values)),
        float(np.nanmax(panel.values)),
    )
    rows, columns = panel.values.shape
    trace = go.Heatmap(
        z=panel.values,
        zmin=low,
        zmax=high,
        colorscale="Cividis" if panel.value.ticks is None else _flat(len(panel.value.ticks)),
        colorbar=_colour_bar(panel.value),
        customdata=interval_of(panel.low, panel.high),
        hovertemplate=hover_text(panel.x, panel.y, panel.value, interval=panel.low is not None),
        text=[[literal(text) for text in row] for row in panel.texts],
        texttemplate="%{text}" if panel.annotate else None,
        # Fills of classes are pale in both themes, so their words are black.
        textfont={"size": 10} | ({"color": "#000000"} if panel.value.ticks is not None else {}),
        xgap=1 if columns <= 40 else 0,
        ygap=1,
    )
    plot = go.Figure(trace)
    frame(plot, panel.x, panel.y, theme, ())
    edge = {"showgrid": False, "minallowed": None}  # cell 0 begins at -0.5
    plot.update_xaxes(**edge, **_index_ticks(panel.x, columns))
    # Plotly counts rows upwards, a heat map has row 0 at the top unless it says otherwise.
    plot.update_yaxes(
        **edge, autorange=None if panel.upward else "reversed", **_index_ticks(panel.y, rows)
    )
    plot.update_layout(height=max(HEIGHT, 110 + 18 * rows))
    return plot


def _flat(count: int) -> list[list[Any]]:
    """A flat step for each class; the colours have no order, because the classes have none."""
    colours = palette.class_colours(count)
    # Each colour stands at both ends of its step, so that plotly does not blend it into the next.
    return [[at / count, colour] for i, colour in enumerate(colours) for at in (i, i + 1)]


def _colour_bar(value: Axis) -> dict[str, Any]:
    bar: dict[str, Any] = {
        # the names of classes say what they are, and need the room
        "title": {"text": "" if value.ticks is not None else literal(value.text), "side": "right"},
        "outlinewidth": 0,
        "thickness": 14,
    }
    if value.ticks is not None:
        bar |= {
            "tickvals": [at for at, _ in value.ticks],
            "ticktext": [literal(name) for _, name in value.ticks],
        }
    return bar


def _index_ticks(axis: Axis, count: int) -> dict[str, Any]:
    if axis.ticks is not None:
        return {}
    return {"tickmode": "array", "tickvals": list(range(0, count, max(1, -(-count // 12))))}


def draw_bars(panel: Bars, theme: Theme, dark: bool) -> go.Figure:
    """Bars with their intervals as a plot."""
    plot = go.Figure()
    names = [literal(name) for name in panel.categories]
    for number, bar in enumerate(panel.bars):
        error: dict[str, Any] | None = None
        if bar.low is not None and bar.high is not None:
            error = {
                "type": "data",
                "symmetric": False,
                "array": bar.high - bar.values,
                "arrayminus": bar.values - bar.low,
                "color": theme.ink,
                "thickness": 1.3,
                "width": 3,
            }
        shape = ("", "/", ".", "x")[number % 4] if len(panel.bars) > 1 else ""
        colour = palette.style(bar.slot).colour(dark)
        along, across = ("x", "y") if panel.horizontal else ("y", "x")
        hover = (
            f"%{{{across}}}<br>{literal(panel.value.label)}:"
            f" %{{{along}:.4g}}{range_text(bar.low is not None)}"
        )
        trace = go.Bar(
            name=literal(bar.name),
            orientation="h" if panel.horizontal else "v",
            marker={
                "color": colour,
                "pattern": {"shape": shape, "bgcolor": colour, "fgcolor": theme.paper},
            },
            customdata=interval_of(bar.low, bar.high),
            hovertemplate=hover + "<extra>%{fullData.name}</extra>",
        )
        # Lying bars exchange the roles of x and y, names of the error bars included.
        trace.update({along: bar.values, across: names, f"error_{along}": error})
        plot.add_trace(trace)
    axes = (panel.value, panel.category) if panel.horizontal else (panel.category, panel.value)
    frame(plot, *axes, theme, panel.rules)
    # Category 0 begins at -0.5; an axis that counts things would end at 0, amid its bar.
    ends = {"minallowed": None, "nticks": None, "showgrid": False}
    first, last = -0.5, len(names) - 0.5
    if panel.horizontal:
        # The first name stands at the top.
        plot.update_yaxes(range=[last, first], automargin=True, **ends)
        # The names beside the bars leave less room for what stands below them.
        plot.update_xaxes(title_text=title(panel.value, letters=26))
        plot.update_layout(height=max(HEIGHT, 110 + 26 * len(names)))
    else:
        # Plotly would read names that look like numbers or dates as such.
        plot.update_xaxes(type="category", range=[first, last], **ends)
    plot.update_layout(showlegend=len(panel.bars) > 1, barmode="group")
    room_for_legend(plot)
    return plot


def draw_scatter(panel: Scatter, theme: Theme, dark: bool) -> go.Figure:
    """Points with their intervals as a plot."""
    plot = go.Figure()
    for points in panel.points:
        plot.add_trace(_point_trace(points, panel, dark))
    frame(plot, panel.x, panel.y, theme, panel.rules)
    room_for_legend(plot)
    return plot


def _point_trace(points: Points, panel: Scatter, dark: bool) -> go.Scatter:
    style = palette.style(points.slot)
    error = None
    if points.low is not None and points.high is not None:
        spread = {"array": points.high - points.y, "arrayminus": points.y - points.low}
        faint = palette.translucent(style.colour(dark), 0.55)
        error = {
            "type": "data",
            "symmetric": False,
            "thickness": 1.2,
            "width": 3,
            "color": faint,
            **spread,
        }
    mode = "markers" + ("+lines" if points.joined else "") + ("+text" if points.labels else "")
    return go.Scatter(
        x=points.x,
        y=points.y,
        error_y=error,
        name=literal(points.name),
        mode=mode,
        text=[literal(label) for label in points.labels] or None,
        textposition="top right",
        textfont={"size": 10},
        marker={"symbol": style.plotly_marker, "size": 9, "color": style.colour(dark)},
        line={"dash": style.plotly_dash, "color": style.colour(dark), "width": 1.8},
        customdata=interval_of(points.low, points.high),
        hovertemplate=hover_text(panel.x, panel.y, interval=points.low is not None),
    )
