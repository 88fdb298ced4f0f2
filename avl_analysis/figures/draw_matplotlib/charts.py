"""Charts on paper.

Curves with bands, heat maps, bars and points with intervals, their axes and reference lines.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import FigureBase
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from avl_analysis.figures import palette
from avl_analysis.figures.draw_matplotlib.look import HATCHES, line_look
from avl_analysis.figures.palette import LIGHT
from avl_analysis.figures.spec import Axis, Bars, Heat, Lines, Rule, Scatter, log_ticks


def draw_lines(place: Axes, panel: Lines) -> None:
    """Draw curves with their bands and reference lines onto axes."""
    for line in panel.lines:
        look = line_look(line)
        # Markers on every n-th point only: on a long curve they would touch and hide its dashes.
        every = max(1, line.x.size // 9)
        place.plot(line.x, line.y, markevery=every, **look)
        if line.low is not None and line.high is not None:
            place.fill_between(
                line.x, line.low, line.high, color=look["color"], alpha=0.2, linewidth=0
            )
    _axes(place, panel.x, panel.y)
    _rules(place, panel.rules)


def draw_heat(canvas: FigureBase, place: Axes, panel: Heat) -> None:
    """Draw a matrix with its colour bar onto axes."""
    limits = panel.value.limits or (float(np.nanmin(panel.values)), float(np.nanmax(panel.values)))
    norm = Normalize(*limits)
    named = panel.value.ticks
    colours: Colormap = (
        ListedColormap(palette.class_colours(len(named)))
        if named is not None
        else colormaps["cividis"]
    )
    # NaN cells are not painted, so the colour of the grid shows where nothing was measured.
    place.set_facecolor(LIGHT.grid)
    place.imshow(
        panel.values,
        cmap=colours,
        norm=norm,
        aspect="auto",
        origin="lower" if panel.upward else "upper",
    )
    place.grid(False)
    bar = canvas.colorbar(ScalarMappable(norm, colours), ax=place, pad=0.02)
    bar.outline.set_visible(False)
    if named is None:  # the names of classes say what they are, and need the room
        bar.set_label(_two_lines(panel.value))
    if named is not None:
        bar.set_ticks([at for at, _ in named], labels=[name for _, name in named])
    if panel.annotate:
        middle = (limits[0] + limits[1]) / 2
        for (row, column), value in np.ndenumerate(panel.values):
            if np.isfinite(value):
                # Cividis rises in lightness, so dark ink is read above the middle of the scale and
                # light ink below it. The fills of classes are pale throughout.
                dark = named is not None or value > middle
                colour = LIGHT.ink if dark else LIGHT.paper
                text = panel.texts[row][column]
                size = 6.5 if named is None else 5.0
                # imshow centres cell (row, column) at x = column, y = row.
                place.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    rows, columns = panel.values.shape
    _category_ticks(place.xaxis, panel.x, columns)
    _category_ticks(place.yaxis, panel.y, rows)
    place.set_xlabel(panel.x.text)
    place.set_ylabel(panel.y.text)


def _category_ticks(axis: Any, spec: Axis, count: int) -> None:
    if spec.ticks is not None:
        axis.set_ticks([at for at, _ in spec.ticks], [name for _, name in spec.ticks])
        if axis.axis_name == "x" and sum(len(name) for _, name in spec.ticks) > 40:
            axis.set_tick_params(rotation=40)
            # Rotated around their right end, which then stays at the tick.
            for label in axis.get_ticklabels():
                label.set(ha="right", rotation_mode="anchor")
    else:
        # At most twelve ticks, a whole number of cells apart.
        axis.set_ticks(np.arange(0, count, max(1, -(-count // 12))))


def draw_bars(place: Axes, panel: Bars) -> None:
    """Draw bars with their intervals onto axes."""
    at = np.arange(len(panel.categories), dtype=float)
    width = 0.8 / len(panel.bars)
    for number, bar in enumerate(panel.bars):
        # Bars of a category share 0.8 of its width and are centred on its whole number.
        offset = at + (number - (len(panel.bars) - 1) / 2) * width
        colour = palette.style(bar.slot).light
        hatch = HATCHES[number % 4] if len(panel.bars) > 1 else ""
        # (2, categories): distances below and above. Within the tolerance of the spec a bound may
        # lie on the wrong side of its value, and matplotlib refuses negative distances.
        error = (
            None
            if bar.low is None or bar.high is None
            else np.abs([bar.values - bar.low, bar.high - bar.values])
        )
        look: dict[str, Any] = {
            "color": colour,
            "edgecolor": LIGHT.paper,
            "hatch": hatch,
            "linewidth": 0.4,
            "label": bar.name,
        }
        marks: dict[str, Any] = {
            "ecolor": LIGHT.ink,
            "capsize": 2.0,
            "error_kw": {"linewidth": 0.9},
        }
        if panel.horizontal:
            place.barh(offset, bar.values, width * 0.95, xerr=error, **look, **marks)
        else:
            place.bar(offset, bar.values, width * 0.95, yerr=error, **look, **marks)
    if panel.horizontal:
        _axes(place, panel.value, panel.category)
        place.set_yticks(at, panel.categories)
        place.invert_yaxis()
        place.grid(False, axis="y")
    else:
        _axes(place, panel.category, panel.value)
        place.set_xticks(at, panel.categories)
        place.grid(False, axis="x")
    _rules(place, panel.rules)


def draw_scatter(place: Axes, panel: Scatter) -> None:
    """Draw points with their intervals onto axes."""
    for points in panel.points:
        style = palette.style(points.slot)
        if points.low is not None and points.high is not None:
            error = np.abs([points.y - points.low, points.high - points.y])
            place.errorbar(
                points.x,
                points.y,
                error,
                # Intervals only; the points follow below, so that they lie on top.
                fmt="none",
                ecolor=style.light,
                elinewidth=0.8,
                capsize=1.8,
                alpha=0.55,
            )
        dash = style.dash if points.joined else "none"
        place.plot(
            points.x, points.y, linestyle=dash, marker=style.marker, color=style.light, markersize=5
        )
        # Labels are one per point or none at all, hence the zip that is not strict.
        for x, y, label in zip(points.x, points.y, points.labels, strict=False):
            place.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6.5)
    _axes(place, panel.x, panel.y)
    _rules(place, panel.rules)


def _axes(place: Axes, x: Axis, y: Axis) -> None:
    for axis, spec, scale, limit in (
        (place.xaxis, x, place.set_xscale, place.set_xlim),
        (place.yaxis, y, place.set_yscale, place.set_ylim),
    ):
        axis.set_label_text(_label(spec, axis))
        if spec.log:
            # Setting the scale replaces locators and formatters, so it must come before them.
            scale("log")
            axis.set_major_locator(
                LogLocator(subs=(1, 2, 5))
                if spec.limits is None
                else FixedLocator(log_ticks(*spec.limits))
            )
            # The formatter of log axes would write powers of ten as mathematical typesetting, which
            # is off.
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        else:
            axis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], nbins=8, integer=spec.counted))
        if spec.limits is not None:
            limit(*spec.limits)
        # Named ticks come last, because they replace the locators set above.
        if spec.ticks is not None:
            axis.set_ticks([at for at, _ in spec.ticks], [name for _, name in spec.ticks])


def _label(spec: Axis, axis: Any) -> str:
    """Label and unit; beside a panel, which is less tall than wide, in several lines if long."""
    return _two_lines(spec) if axis.axis_name == "y" or len(spec.text) > 52 else spec.text


def _two_lines(spec: Axis) -> str:
    """Label and unit, the unit in a line of its own if both are long."""
    if len(spec.text) <= 30:
        return spec.text
    return textwrap.fill(spec.label, 34) + "\n" + textwrap.fill(f"({spec.unit})", 34)


def _rules(place: Axes, rules: Sequence[Rule]) -> None:
    for rule in rules:
        line = place.axvline if rule.axis == "x" else place.axhline
        line(rule.at, color=LIGHT.muted, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        # The name stands at the end of the line: one coordinate in units of the data, the other as
        # a fraction of the frame, where 1.0 is the upper or right edge.
        if rule.axis == "x":
            at, frame, shift, align = (
                (rule.at, 1.0),
                place.get_xaxis_transform(),
                (0, 2),
                ("center", "bottom"),
            )
        else:
            at, frame, shift, align = (
                (1.0, rule.at),
                place.get_yaxis_transform(),
                (-2, 1),
                ("right", "bottom"),
            )
        place.annotate(
            rule.label,
            at,
            xycoords=frame,
            xytext=shift,
            textcoords="offset points",
            ha=align[0],
            va=align[1],
            fontsize=6.5,
            color=LIGHT.muted,
            bbox={"facecolor": LIGHT.paper, "edgecolor": "none", "alpha": 0.75, "pad": 0.4},
        )
