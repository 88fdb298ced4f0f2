"""Draws figure specs on the screen: one interactive plotly figure per panel, for the report page and the dashboard.

The only module that imports plotly. One plot per panel, not subplots, so that a page can lay the panels out by its
width. Whatever text a spec carries is escaped, because plotly renders a little HTML in labels and a prompt may contain
anything, `<image>` for a start.

Plots have a transparent background, and all their colours come from palette.py, so a page can exchange the light
colours for the dark ones (`palette.dark_pairs`) without drawing again.
"""

from __future__ import annotations

import html
import json
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.offline

from avl_analysis.figures import palette
from avl_analysis.figures.palette import DARK, LIGHT, Theme
from avl_analysis.figures.pictures import data_uri, dimmed
from avl_analysis.figures.spec import (
    Animation,
    Array,
    Axis,
    Bars,
    Box,
    Heat,
    Line,
    Lines,
    Overlay,
    Panel,
    Points,
    Rule,
    Scatter,
    log_ticks,
    repeated,
)

HEIGHT = 340
"""Pixels of a chart; pictures keep their own proportions."""
_CLEAR = "rgba(0,0,0,0)"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def draw(panel: Panel, *, dark: bool = False, titled: bool = True) -> go.Figure:
    """One panel as a plotly figure in the light or the dark theme; `titled=False` leaves the title to the page."""
    theme = DARK if dark else LIGHT
    if isinstance(panel, Lines):
        plot = _lines(panel, theme, dark)
    elif isinstance(panel, Heat):
        plot = _heat(panel, theme)
    elif isinstance(panel, Bars):
        plot = _bars(panel, theme, dark)
    elif isinstance(panel, Scatter):
        plot = _scatter(panel, theme, dark)
    elif isinstance(panel, Overlay):
        plot = _overlay(panel, theme)
    else:
        plot = _animation(panel, theme)
    if titled and panel.title:
        plot.update_layout(title={"text": _text(panel.title), "font": {"size": 14}}, margin_t=44)
    return plot


def as_json(plot: go.Figure) -> str:
    """The plot as JSON that is safe inside a script element."""
    data = json.loads(plot.to_json())
    return (
        json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )


def library() -> str:
    """Source text of plotly.js, to be put into a page once."""
    return str(plotly.offline.get_plotlyjs())


def _lines(panel: Lines, theme: Theme, dark: bool) -> go.Figure:
    plot = go.Figure()
    for number, line in enumerate(panel.lines):
        look = _line_look(line, theme, dark)
        if line.low is not None and line.high is not None:
            _band(plot, line.x, line.low, line.high, palette.translucent(look["color"], 0.2), group=str(number))
        plot.add_trace(
            go.Scatter(
                x=line.x,
                y=line.y,
                name=_text(line.name),
                mode="lines+markers" if line.role == "measured" else "lines",
                line=look,
                marker={"symbol": palette.style(line.slot).plotly_marker, "size": 6, "maxdisplayed": 14},
                legendgroup=str(number),
                showlegend=not repeated(panel, line),
                customdata=_interval(line.low, line.high),
                hovertemplate=_hover(panel.x, panel.y, interval=line.low is not None),
            )
        )
    _frame(plot, panel.x, panel.y, theme, panel.rules)
    plot.update_layout(showlegend=len(panel.lines) > 1)
    return plot


def _line_look(line: Line, theme: Theme, dark: bool) -> dict[str, Any]:
    style = palette.style(line.slot)
    if line.role == "baseline":
        return {"color": theme.muted, "dash": "dot", "width": 1.5}
    if line.role == "fit":
        return {"color": style.colour(dark), "dash": "3px,2px", "width": 1.2}
    return {"color": style.colour(dark), "dash": style.plotly_dash, "width": 2}


def _band(plot: go.Figure, x: Array, low: Array, high: Array, fill: str, group: str) -> None:
    """The interval as a filled outline, one for each unbroken stretch of measured points."""
    finite = np.isfinite(low) & np.isfinite(high)
    for stretch in np.split(np.arange(finite.size), np.flatnonzero(np.diff(finite.astype(int))) + 1):
        if stretch.size and finite[stretch[0]]:
            outline_x = np.concatenate([x[stretch], x[stretch][::-1]])
            outline_y = np.concatenate([high[stretch], low[stretch][::-1]])
            plot.add_trace(
                go.Scatter(
                    x=outline_x,
                    y=outline_y,
                    fill="toself",
                    fillcolor=fill,
                    line={"width": 0, "color": _CLEAR},
                    mode="lines",
                    hoverinfo="skip",
                    showlegend=False,
                    legendgroup=group,
                )
            )


def _heat(panel: Heat, theme: Theme) -> go.Figure:
    low, high = panel.value.limits or (float(np.nanmin(panel.values)), float(np.nanmax(panel.values)))
    rows, columns = panel.values.shape
    trace = go.Heatmap(
        z=panel.values,
        zmin=low,
        zmax=high,
        colorscale="Cividis",
        colorbar={"title": {"text": _text(panel.value.text), "side": "right"}, "outlinewidth": 0, "thickness": 14},
        customdata=_interval(panel.low, panel.high),
        hovertemplate=_hover(panel.x, panel.y, panel.value, interval=panel.low is not None),
        texttemplate="%{z:.2f}" if panel.annotate else None,
        textfont={"size": 10},
        xgap=1 if columns <= 40 else 0,
        ygap=1,
    )
    plot = go.Figure(trace)
    _frame(plot, panel.x, panel.y, theme, ())
    plot.update_xaxes(showgrid=False, **_index_ticks(panel.x, columns))
    plot.update_yaxes(showgrid=False, autorange=None if panel.upward else "reversed", **_index_ticks(panel.y, rows))
    plot.update_layout(height=max(HEIGHT, 110 + 18 * rows))
    return plot


def _index_ticks(axis: Axis, count: int) -> dict[str, Any]:
    if axis.ticks is not None:
        return {}
    return {"tickmode": "array", "tickvals": list(range(0, count, max(1, -(-count // 12))))}


def _bars(panel: Bars, theme: Theme, dark: bool) -> go.Figure:
    plot = go.Figure()
    names = [_text(name) for name in panel.categories]
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
        along, across = ("x", "y") if panel.horizontal else ("y", "x")
        hover = f"%{{{across}}}<br>{_text(panel.value.label)}: %{{{along}:.4g}}{_range(bar.low is not None)}"
        trace = go.Bar(
            name=_text(bar.name),
            orientation="h" if panel.horizontal else "v",
            marker={"color": palette.style(bar.slot).colour(dark), "pattern": {"shape": shape, "fgcolor": theme.paper}},
            customdata=_interval(bar.low, bar.high),
            hovertemplate=hover + "<extra>%{fullData.name}</extra>",
        )
        trace.update({along: bar.values, across: names, f"error_{along}": error})
        plot.add_trace(trace)
    axes = (panel.value, panel.category) if panel.horizontal else (panel.category, panel.value)
    _frame(plot, *axes, theme, panel.rules)
    if panel.horizontal:
        plot.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
        plot.update_layout(height=max(HEIGHT, 110 + 26 * len(names)))
    else:
        plot.update_xaxes(showgrid=False, type="category")
    plot.update_layout(showlegend=len(panel.bars) > 1, barmode="group")
    return plot


def _scatter(panel: Scatter, theme: Theme, dark: bool) -> go.Figure:
    plot = go.Figure()
    for points in panel.points:
        plot.add_trace(_point_trace(points, panel, dark))
    _frame(plot, panel.x, panel.y, theme, panel.rules)
    return plot


def _point_trace(points: Points, panel: Scatter, dark: bool) -> go.Scatter:
    style = palette.style(points.slot)
    error = None
    if points.low is not None and points.high is not None:
        spread = {"array": points.high - points.y, "arrayminus": points.y - points.low}
        error = {"type": "data", "symmetric": False, "thickness": 1.2, "width": 3, **spread}
    mode = "markers" + ("+lines" if points.joined else "") + ("+text" if points.labels else "")
    return go.Scatter(
        x=points.x,
        y=points.y,
        error_y=error,
        name=_text(points.name),
        mode=mode,
        text=[_text(label) for label in points.labels] or None,
        textposition="top right",
        textfont={"size": 10},
        marker={"symbol": style.plotly_marker, "size": 9, "color": style.colour(dark)},
        line={"dash": style.plotly_dash, "color": style.colour(dark), "width": 1.8},
        customdata=_interval(points.low, points.high),
        hovertemplate=_hover(panel.x, panel.y, interval=points.low is not None),
    )


def _overlay(panel: Overlay, theme: Theme) -> go.Figure:
    height, width = panel.picture.shape[:2]
    plot = go.Figure()
    if panel.patches is not None:
        plot.add_trace(_patches(panel))
    if panel.classes:
        _class_legend(plot, panel)
    shown = panel.picture if panel.patches is None or panel.classes else dimmed(panel.picture)
    plot.add_layout_image(
        source=data_uri(shown), xref="x", yref="y", x=0, y=0, sizex=width, sizey=height, sizing="stretch", layer="below"
    )
    for box in panel.boxes:
        _box(plot, box)
    _dress(plot, theme)
    plot.update_xaxes(range=[0, width], visible=False, constrain="domain")
    plot.update_yaxes(range=[height, 0], visible=False, scaleanchor="x", constrain="domain")
    plot.update_layout(height=300, margin={"l": 4, "r": 4, "t": 4, "b": 4})
    return plot


def _patches(panel: Overlay) -> go.Heatmap:
    assert panel.patches is not None
    rows, columns = panel.patches.shape
    height, width = panel.picture.shape[:2]
    common: dict[str, Any] = {
        "x": (np.arange(columns) + 0.5) * width / columns,
        "y": (np.arange(rows) + 0.5) * height / rows,
        "z": panel.patches,
        "showscale": False,
        "customdata": np.moveaxis(np.indices((rows, columns)), 0, -1),
    }
    place = "row %{customdata[0]}, column %{customdata[1]}<br>"
    if panel.classes:
        names = np.array([*map(_text, panel.classes), "none"], dtype=object)
        picked = np.where(np.isnan(panel.patches), len(panel.classes), np.nan_to_num(panel.patches)).astype(int)
        return go.Heatmap(
            **common,
            zmin=-0.5,
            zmax=len(panel.classes) - 0.5,
            colorscale=_class_scale(len(panel.classes)),
            text=names[picked],
            hovertemplate=place + "%{text}<extra></extra>",
        )
    low, high = panel.value.limits or (0.0, float(np.nanmax(panel.patches)))
    fade = [[0, palette.translucent(palette.ATTENTION, 0)], [1, palette.translucent(palette.ATTENTION, 0.92)]]
    label = _text(panel.value.label)
    return go.Heatmap(
        **common, zmin=low, zmax=high, colorscale=fade, hovertemplate=place + label + ": %{z:.4f}<extra></extra>"
    )


def _class_scale(count: int) -> list[list[Any]]:
    """Plotly colour scale with one flat step per class."""
    scale: list[list[Any]] = []
    for number in range(count):
        fill = palette.translucent(palette.CLASS_COLOURS[number], palette.CLASS_OPACITY[number])
        scale += [[number / count, fill], [(number + 1) / count, fill]]
    return scale


def _class_legend(plot: go.Figure, panel: Overlay) -> None:
    for number, name in enumerate(panel.classes):
        fill = palette.translucent(palette.CLASS_COLOURS[number], max(0.8, palette.CLASS_OPACITY[number]))
        marker = {"symbol": "square", "size": 12, "color": fill}
        plot.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=_text(name), marker=marker))


def _box(plot: go.Figure, box: Box) -> None:
    corners = {"x0": box.left, "y0": box.top, "x1": box.right, "y1": box.bottom, "type": "rect"}
    plot.add_shape(**corners, line={"color": palette.BOX_EDGE, "width": 4})
    plot.add_shape(**corners, line={"color": palette.BOX, "width": 2})
    if box.label:
        plot.add_annotation(
            x=box.left, y=box.top, text=_text(box.label), showarrow=False, xanchor="left", yanchor="bottom",
            font={"color": palette.BOX, "size": 11}, bgcolor="rgba(1,1,1,0.6)", borderpad=1,
        )  # fmt: skip


def _animation(panel: Animation, theme: Theme) -> go.Figure:
    plot = _overlay(panel.frames[0], theme)
    plot.frames = [
        go.Frame(data=[_patches(frame)], traces=[0], name=str(step), layout={"title": {"text": _text(frame.title)}})
        for step, frame in zip(panel.steps, panel.frames, strict=True)
    ]
    wait = round(1000 * panel.seconds)
    instant = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    play = {"fromcurrent": True, "frame": {"duration": wait, "redraw": True}, "transition": {"duration": 0}}
    buttons = [
        {"label": "play", "method": "animate", "args": [None, play]},
        {"label": "pause", "method": "animate", "args": [[None], instant]},
    ]
    steps = [{"label": str(step), "method": "animate", "args": [[str(step)], instant]} for step in panel.steps]
    colour = {"color": theme.ink}
    plot.update_layout(
        height=430,
        margin={"l": 4, "r": 4, "t": 44, "b": 90},
        title={"text": _text(panel.frames[0].title), "font": {"size": 13}},
        updatemenus=[{"type": "buttons", "direction": "left", "buttons": buttons, "x": 0, "y": -0.04, "xanchor": "left",
                      "yanchor": "top", "font": colour, "bgcolor": _CLEAR, "bordercolor": theme.muted}],
        sliders=[{"steps": steps, "x": 0.32, "len": 0.68, "y": -0.02, "pad": {"t": 0}, "font": colour,
                  "currentvalue": {"prefix": "decode step "}}],
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )  # fmt: skip
    return plot


def _frame(plot: go.Figure, x: Axis, y: Axis, theme: Theme, rules: tuple[Rule, ...]) -> None:
    _dress(plot, theme)
    plot.update_xaxes(**_axis(x, theme))
    plot.update_yaxes(**_axis(y, theme))
    for rule in rules:
        _rule(plot, rule, x if rule.axis == "x" else y, theme)


def _rule(plot: go.Figure, rule: Rule, axis: Axis, theme: Theme) -> None:
    """A line across the panel with its name at the end; on a log axis notes, unlike lines, are placed by logarithm."""
    other = "y" if rule.axis == "x" else "x"
    line = {"color": theme.muted, "width": 1.2, "dash": "5px,3px"}
    plot.add_shape(
        {"type": "line", "line": line, f"{rule.axis}0": rule.at, f"{rule.axis}1": rule.at, f"{rule.axis}ref": rule.axis}
        | {f"{other}0": 0, f"{other}1": 1, f"{other}ref": f"{other} domain"}
    )
    note: dict[str, Any] = {"text": _text(rule.label), "showarrow": False, "font": {"size": 10, "color": theme.muted}}
    at = float(np.log10(rule.at)) if axis.log else rule.at
    note |= {
        rule.axis: at,
        f"{rule.axis}ref": rule.axis,
        other: 1,
        f"{other}ref": f"{other} domain",
        "yanchor": "bottom",
    }
    plot.add_annotation(note | {"xanchor": "center" if rule.axis == "x" else "right"})


def _axis(axis: Axis, theme: Theme) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "title": {"text": _text(axis.text), "standoff": 8, "font": {"size": 12}},
        "gridcolor": theme.grid,
        "linecolor": theme.muted,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": theme.muted,
        "ticklen": 4,
        "automargin": True,
    }
    if axis.log:
        settings["type"] = "log"
    if axis.limits is not None:
        settings["range"] = list(np.log10(axis.limits)) if axis.log else list(axis.limits)
        if axis.log:
            ticks = log_ticks(*axis.limits)
            settings |= {"tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    if axis.ticks is not None:
        settings |= {"tickmode": "array", "tickvals": [at for at, _ in axis.ticks]}
        settings["ticktext"] = [_text(name) for _, name in axis.ticks]
    return settings


def _dress(plot: go.Figure, theme: Theme) -> None:
    plot.update_layout(
        template="none",
        height=HEIGHT,
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        font={"family": _FONT, "size": 12, "color": theme.ink},
        margin={"l": 56, "r": 16, "t": 22, "b": 48},
        legend={"orientation": "h", "y": -0.24, "yanchor": "top", "x": 0, "font": {"size": 11}},
        hoverlabel={"bgcolor": theme.paper, "bordercolor": theme.muted, "font": {"color": theme.ink}},
    )


def _interval(low: Array | None, high: Array | None) -> Array | None:
    return None if low is None or high is None else np.array(np.stack([low, high], axis=-1), dtype=np.float64)


def _range(interval: bool) -> str:
    return " [%{customdata[0]:.4g}, %{customdata[1]:.4g}]" if interval else ""


def _hover(x: Axis, y: Axis, z: Axis | None = None, *, interval: bool) -> str:
    """Hover text with every quantity named and the interval behind the value."""
    places = f"{_text(x.label)}: %{{x}}<br>"
    if z is None:
        return places + f"{_text(y.label)}: %{{y:.4g}}{_range(interval)}<extra>%{{fullData.name}}</extra>"
    return places + f"{_text(y.label)}: %{{y}}<br>{_text(z.label)}: %{{z:.4g}}{_range(interval)}<extra></extra>"


def _text(text: str) -> str:
    """Text that plotly shows as it is."""
    return html.escape(text, quote=False).replace("%{", "%&#123;")
