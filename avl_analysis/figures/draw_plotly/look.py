"""What every plot on the screen shares.

Frame, axes, reference lines, hover texts, escaped words.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from avl_analysis.figures.palette import Theme
from avl_analysis.figures.spec import Array, Axis, Rule, log_ticks

HEIGHT = 340
"""Pixels of a chart; pictures keep their own proportions."""
_LINE = 40
"""Letters of an axis title that fit the narrowest plots, 330 pixels wide."""
_ROW = 19
"""Pixels of a row of a legend."""
_ROWS = 2
"""Rows of a legend for which `HEIGHT` has room."""
CLEAR = "rgba(0,0,0,0)"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def frame(plot: go.Figure, x: Axis, y: Axis, theme: Theme, rules: tuple[Rule, ...]) -> None:
    """Give a plot its axes, limits and reference lines."""
    dress(plot, theme)
    plot.update_xaxes(**_axis(x, theme))
    plot.update_yaxes(**_axis(y, theme))
    # At the bottom of the whole plot: placed by the height of the axes, a legend of many rows would
    # squeeze them and lie over the name of the axis.
    plot.update_layout(legend={"yref": "container", "y": 0, "yanchor": "bottom"})
    for rule in rules:
        _rule(plot, rule, x if rule.axis == "x" else y, theme)


def _rule(plot: go.Figure, rule: Rule, axis: Axis, theme: Theme) -> None:
    """A line across the panel with its name at the end.

    On a log axis notes, unlike lines, are placed by logarithm.
    """
    other = "y" if rule.axis == "x" else "x"
    line = {"color": theme.muted, "width": 1.2, "dash": "5px,3px"}
    plot.add_shape(
        {
            "type": "line",
            "line": line,
            f"{rule.axis}0": rule.at,
            f"{rule.axis}1": rule.at,
            f"{rule.axis}ref": rule.axis,
        }
        | {f"{other}0": 0, f"{other}1": 1, f"{other}ref": f"{other} domain"}
    )
    note: dict[str, Any] = {
        "text": literal(rule.label),
        "showarrow": False,
        "font": {"size": 10, "color": theme.muted},
    }
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
        "title": {"text": title(axis), "standoff": 8, "font": {"size": 12}},
        "gridcolor": theme.grid,
        "linecolor": theme.muted,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": theme.muted,
        "ticklen": 4,
        "automargin": True,
    }
    if axis.counted:
        settings |= {"tickformat": "d", "minallowed": 0, "nticks": 12}
    if axis.log:
        settings["type"] = "log"
    if axis.limits is not None:
        # Plotly takes the range of a log axis as exponents of ten, its ticks as values.
        settings["range"] = list(np.log10(axis.limits)) if axis.log else list(axis.limits)
        if axis.log:
            ticks = log_ticks(*axis.limits)
            settings |= {
                "tickmode": "array",
                "tickvals": ticks,
                "ticktext": [f"{tick:g}" for tick in ticks],
            }
    # Named ticks replace whatever ticks were chosen above.
    if axis.ticks is not None:
        settings |= {"tickmode": "array", "tickvals": [at for at, _ in axis.ticks]}
        settings["ticktext"] = [literal(name) for _, name in axis.ticks]
    return settings


def title(axis: Axis, letters: int = _LINE) -> str:
    """Label and unit, on two lines where one would be cut off at the edge of a narrow plot.

    `letters` is how many fit.
    """
    if len(axis.text) <= letters:
        return literal(axis.text)
    return f"{literal(axis.label)}<br>({literal(axis.unit)})"


def room_for_legend(plot: go.Figure) -> None:
    """Make a chart taller by the rows that its legend needs in a narrow place."""
    if plot.layout.showlegend is False:
        return
    entries = sum(trace.showlegend is not False for trace in plot.data)
    rows = -(-entries // 2)  # of two columns
    plot.update_layout(height=plot.layout.height + _ROW * max(0, rows - _ROWS))


def whole_ticks(values: Sequence[Array]) -> dict[str, Any]:
    """Ticks at whole numbers where an axis is so short that they would fall between them too."""
    finite = np.concatenate([v[np.isfinite(v)] for v in values] or [np.zeros(0)])
    return {"dtick": 1} if finite.size and np.ptp(finite) <= 12 else {}


def dress(plot: go.Figure, theme: Theme) -> None:
    """Give a plot the colours, fonts and margins of a theme."""
    plot.update_layout(
        template="none",
        height=HEIGHT,
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        font={"family": _FONT, "size": 12, "color": theme.ink},
        margin={"l": 56, "r": 16, "t": 22, "b": 48},
        legend={"orientation": "h", "y": -0.24, "yanchor": "top", "x": 0, "font": {"size": 11}},
        hoverlabel={
            "bgcolor": theme.paper,
            "bordercolor": theme.muted,
            "font": {"color": theme.ink},
        },
    )


def interval_of(low: Array | None, high: Array | None) -> Array | None:
    """Bounds as plotly takes them for hover texts, (points, 2); None without an interval."""
    return (
        None
        if low is None or high is None
        else np.array(np.stack([low, high], axis=-1), dtype=np.float64)
    )


def range_text(interval: bool) -> str:
    """The part of a hover text that says the interval."""
    return " [%{customdata[0]:.4g}, %{customdata[1]:.4g}]" if interval else ""


def hover_text(x: Axis, y: Axis, z: Axis | None = None, *, interval: bool) -> str:
    """Hover text with every quantity named and the interval behind the value."""
    places = f"{literal(x.label)}: %{{x}}<br>"
    if z is None:
        return (
            places + f"{literal(y.label)}:"
            f" %{{y:.4g}}{range_text(interval)}<extra>%{{fullData.name}}</extra>"
        )
    return (
        places + f"{literal(y.label)}: %{{y}}<br>{literal(z.label)}:"
        f" %{{z:.4g}}{range_text(interval)}<extra></extra>"
    )


def literal(text: str) -> str:
    """Text that plotly shows as it is: neither HTML nor TeX nor a template."""
    # "$" would begin TeX and "%{" a placeholder. They are replaced after escaping, or the "&" of
    # their entities would be escaped too.
    return html.escape(text, quote=False).replace("$", "&#36;").replace("%{", "%&#123;")
