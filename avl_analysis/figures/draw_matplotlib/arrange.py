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
from avl_analysis.figures.rows import across, alike, panel_rows, pictures, wide
from avl_analysis.figures.spec import Animation, Bars, Figure, Heat, Lines, Overlay, Panel, Scatter

PANEL_WIDTH, PANEL_HEIGHT = 3.5, 2.65
"""Inches of one chart panel; two of them fill a text width of 7 inches."""
_SHARED_COLUMNS = 4
"""Of a legend that serves several panels."""
ALONE_WIDTH = 4.8
"""Inches of a figure with one panel, which has room for its title and its legend."""


def size_of(figure: Figure) -> tuple[float, float]:
    """Width and height of a figure in inches, without a title."""
    if len(figure.panels) == 1:
        return ALONE_WIDTH, sum(_heights(figure))
    # Pictures are narrower than charts, so the widest row is not always the one with most panels.
    widths = [
        across(figure, row) * _panel_size(alike(figure, row))[0] for row in panel_rows(figure)
    ]
    return max(widths), sum(_heights(figure))


def fill(canvas: FigureBase, figure: Figure) -> None:
    """Draw the panels of a figure onto an empty canvas or part of one.

    Pictures stand in one grid; rows of charts are laid out one by one, so that a colour bar in one
    row does not narrow the panels of another.
    """
    rows = panel_rows(figure)
    shared = shared_legend(figure.panels)
    if len(rows) == 1 or pictures(figure.panels):
        columns = min(figure.columns, len(figure.panels))
        axes = canvas.subplots(len(rows), columns, squeeze=False).ravel()
        _fill(canvas, list(axes), figure.panels, shared)
        return
    last = _last_with_series(rows)
    parts = canvas.subfigures(len(rows), 1, height_ratios=_heights(figure))
    for number, (part, row) in enumerate(zip(parts, rows, strict=True)):
        columns = across(figure, row)
        if len(row) == columns:
            axes = part.subplots(1, columns, squeeze=False).ravel()
        elif wide(row):
            axes = part.subplots(1, 1, squeeze=False).ravel()
        else:  # a row that is not full stands in the middle
            # Hidden axes on both sides take half of the missing width each.
            gap = (columns - len(row)) / 2
            every = part.subplots(1, len(row) + 2, width_ratios=[gap, *[1] * len(row), gap])
            for edge in (every[0], every[-1]):
                edge.set_visible(False)
            axes = every[1:-1]
        # A legend that serves all rows stands once, below the last of them.
        _fill(part, list(axes), row, shared, legend=number == last)


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
        # Maps come without handles, and may stand before the charts.
        handles = next(found for panel in panels if (found := handles_of(panel)))
        columns = min(_SHARED_COLUMNS, len(handles))
        canvas.legend(handles=handles, loc="outside lower center", ncols=columns)


def _heights(figure: Figure) -> list[float]:
    """Inches of each row."""
    rows, shared = panel_rows(figure), shared_legend(figure.panels)
    last = _last_with_series(rows)
    found = []
    for number, row in enumerate(rows):
        legends = [_legend_rows(panel) for panel in row]
        if shared or shared_legend(row):
            # One legend, of more columns than one panel has room for, below the last row it serves.
            entries = max(len(handles_of(panel)) for panel in row)
            wanted = not shared or number == last
            legends = [max(0, -(-entries // _SHARED_COLUMNS) - 1) if wanted else 0]
        found.append(_panel_size(alike(figure, row), max(legends))[1])
    return found


def _last_with_series(rows: Sequence[Sequence[Panel]]) -> int:
    """Place of the last row that a legend belongs to."""
    known = [at for at, row in enumerate(rows) if any(handles_of(panel) for panel in row)]
    return known[-1] if known else len(rows) - 1


def _panel_size(panels: Sequence[Panel], legend_rows: int = 0) -> tuple[float, float]:
    """Inches of each panel: pictures are square-ish, heat maps grow with their rows.

    `legend_rows` are those of the legend below, beyond the first.
    """
    shown = [
        p.frames[0] if isinstance(p, Animation) else p
        for p in panels
        if isinstance(p, Overlay | Animation)
    ]
    if pictures(panels):
        written = any(isinstance(p, Overlay) and p.words for p in panels)
        # Words on patches need the wide format, also where several pictures stand side by side.
        width = 2.1 if len(panels) > 1 and not written else 3.6
        return width, 0.94 * width * max(
            p.picture.shape[0] / p.picture.shape[1] for p in shown
        ) + 0.42
    rows = max((p.values.shape[0] for p in panels if isinstance(p, Heat)), default=0)
    bars = max(
        (len(p.categories) for p in panels if isinstance(p, Bars) and p.horizontal), default=0
    )
    legend = 0.16 * legend_rows
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
