"""Puts the panels of a figure onto a canvas, and says how large that canvas wants to be."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.transforms import ScaledTranslation

from avl_analysis.figures.draw_matplotlib.charts import (
    draw_bars,
    draw_heat,
    draw_lines,
    draw_scatter,
)
from avl_analysis.figures.draw_matplotlib.look import handles_of, legend_columns, shared_legend
from avl_analysis.figures.draw_matplotlib.overlays import attention_bar, draw_overlay
from avl_analysis.figures.spec import Animation, Bars, Figure, Heat, Lines, Overlay, Panel, Scatter

PANEL_WIDTH, PANEL_HEIGHT = 3.5, 2.65
"""Inches of one chart panel; two of them fill a text width of 7 inches."""
ALONE_WIDTH = 4.8
"""Inches of a figure with one panel, which has room for its title and its legend."""


def size_of(figure: Figure) -> tuple[float, float]:
    """Width and height of a figure in inches, without a title."""
    columns = min(figure.columns, len(figure.panels))
    width = ALONE_WIDTH if len(figure.panels) == 1 else columns * _panel_size(figure.panels)[0]
    return width, sum(_heights(figure))


def fill(canvas: FigureBase, figure: Figure) -> None:
    """Draw the panels of a figure onto an empty canvas or part of one.

    Pictures stand in one grid; rows of charts are laid out one by one, so that a colour bar in one
    row does not narrow the panels of another.
    """
    columns = min(figure.columns, len(figure.panels))
    rows = _rows(figure)
    shared = shared_legend(figure.panels)
    if len(rows) == 1 or _pictures(figure.panels):
        axes = canvas.subplots(len(rows), columns, squeeze=False).ravel()
        _fill(canvas, list(axes), figure.panels, shared)
        return
    parts = canvas.subfigures(len(rows), 1, height_ratios=_heights(figure))
    for number, (part, row) in enumerate(zip(parts, rows, strict=True)):
        if len(row) == columns:
            axes = part.subplots(1, columns, squeeze=False).ravel()
        elif _wide(row):
            axes = part.subplots(1, 1, squeeze=False).ravel()
        else:  # a row that is not full stands in the middle
            # Hidden axes on both sides take half of the missing width each.
            gap = (columns - len(row)) / 2
            every = part.subplots(1, len(row) + 2, width_ratios=[gap, *[1] * len(row), gap])
            for edge in (every[0], every[-1]):
                edge.set_visible(False)
            axes = every[1:-1]
        # A legend that serves all rows stands once, below the last of them.
        _fill(part, list(axes), row, shared, legend=number == len(rows) - 1)


def _fill(
    canvas: FigureBase, axes: list[Axes], panels: Sequence[Panel], shared: bool, legend: bool = True
) -> None:
    """Draw panels onto axes; below them one legend, if they share it and it is wanted here."""
    # `shared` is about all panels of the figure, `shared_legend` here about those of this row. A
    # legend of one row alone is always drawn with its row.
    together = shared or shared_legend(panels)
    for place, panel in zip(axes, panels, strict=False):
        _draw_panel(canvas, place, panel, legend=not together)
    # The last row of a grid may have more places than pictures.
    for place in axes[len(panels) :]:
        place.set_visible(False)
    attention_bar(canvas, axes, panels)
    if together and (legend or not shared):
        handles = handles_of(panels[0])
        canvas.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))


def _rows(figure: Figure) -> list[tuple[Panel, ...]]:
    panels = figure.panels
    return [
        panels[start : start + figure.columns] for start in range(0, len(panels), figure.columns)
    ]


def _heights(figure: Figure) -> list[float]:
    """Inches of each row."""
    # Rows of one grid are all as tall as the tallest picture needs; a row of charts has its own
    # height.
    return [
        _panel_size(figure.panels if _pictures(figure.panels) else row)[1] for row in _rows(figure)
    ]


def _pictures(panels: Sequence[Panel]) -> bool:
    return all(isinstance(panel, Overlay | Animation) for panel in panels)


def _wide(row: Sequence[Panel]) -> bool:
    """Whether a row holds one heat map of things with names, which need room."""
    return len(row) == 1 and isinstance(row[0], Heat) and row[0].x.ticks is not None


def _panel_size(panels: Sequence[Panel]) -> tuple[float, float]:
    """Inches of each panel: pictures are square-ish, heat maps grow with their rows."""
    pictures = [
        p.frames[0] if isinstance(p, Animation) else p
        for p in panels
        if isinstance(p, Overlay | Animation)
    ]
    if _pictures(panels):
        written = any(isinstance(p, Overlay) and p.words for p in panels)
        # Words on patches need the wide format, also where several pictures stand side by side.
        width = 2.1 if len(panels) > 1 and not written else 3.6
        return width, 0.94 * width * max(
            p.picture.shape[0] / p.picture.shape[1] for p in pictures
        ) + 0.42
    rows = max((p.values.shape[0] for p in panels if isinstance(p, Heat)), default=0)
    bars = max(
        (len(p.categories) for p in panels if isinstance(p, Bars) and p.horizontal), default=0
    )
    legend = 0.16 * max(_legend_rows(panel) for panel in panels)
    # Inches: 0.17 for a row of a heat map, 0.26 for a category of lying bars, and no panel above 6.
    return PANEL_WIDTH, min(6.0, max(PANEL_HEIGHT + legend, 0.9 + 0.17 * rows, 0.9 + 0.26 * bars))


def _legend_rows(panel: Panel) -> int:
    """Rows of a panel's legend beyond the first."""
    handles = handles_of(panel)
    # -(-a // b) is a / b, rounded up.
    return -(-len(handles) // legend_columns(handles)) - 1 if handles else 0


_TITLE_LETTER = 0.066
"""Inches of a bold letter of a title, 8.5 points of DejaVu Sans on average."""


def _letters(canvas: FigureBase, place: Axes) -> int:
    """Letters of a title that fit above a panel, so that titles side by side never touch."""
    spec = place.get_subplotspec()
    columns = 1 if spec is None else spec.get_gridspec().ncols
    # The box of a canvas or subfigure is in pixels of the root figure.
    inches = canvas.bbox.width / canvas.get_figure(root=True).dpi / columns
    return max(12, int((inches - 0.1) / _TITLE_LETTER))


def _draw_panel(canvas: FigureBase, place: Axes, panel: Panel, *, legend: bool) -> None:
    if isinstance(panel, Lines):
        draw_lines(place, panel)
    elif isinstance(panel, Heat):
        draw_heat(canvas, place, panel)
    elif isinstance(panel, Bars):
        draw_bars(place, panel)
    elif isinstance(panel, Scatter):
        draw_scatter(place, panel)
    elif isinstance(panel, Overlay):
        draw_overlay(canvas, place, panel, legend=legend)
    else:
        # An animation on paper is its first frame.
        draw_overlay(canvas, place, panel.frames[0], legend=legend)
    if panel.title:
        # Rule labels stand above the frame.
        crowned = any(rule.axis == "x" and rule.label for rule in getattr(panel, "rules", ()))
        width = min(28 if isinstance(panel, Overlay | Animation) else 46, _letters(canvas, place))
        place.set_title(textwrap.fill(panel.title, width), pad=15 if crowned else None)
    handles = handles_of(panel)
    if legend and len(handles) > 1 and not isinstance(panel, Overlay | Animation):
        # Clear of the axis label, which may have several lines.
        lines = 1 + place.get_xlabel().count("\n")
        below = place.transAxes + ScaledTranslation(
            0, -(21 + 11 * lines) / 72, canvas.dpi_scale_trans
        )
        place.legend(
            handles=handles,
            ncols=legend_columns(handles),
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            bbox_transform=below,
            borderaxespad=0.0,
        )
