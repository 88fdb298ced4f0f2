"""Puts the panels of a figure onto a canvas, and says how large that canvas wants to be."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.transforms import ScaledTranslation

from avl_analysis.figures.draw_matplotlib.charts import draw_bars, draw_heat, draw_lines, draw_scatter
from avl_analysis.figures.draw_matplotlib.look import handles_of, legend_columns, shared_legend
from avl_analysis.figures.draw_matplotlib.overlays import attention_bar, draw_overlay
from avl_analysis.figures.spec import Animation, Bars, Figure, Heat, Lines, Overlay, Panel, Scatter

PANEL_WIDTH, PANEL_HEIGHT = 3.5, 2.65
"""Inches of one chart panel; two of them fill a text width of 7 inches."""


def size_of(figure: Figure) -> tuple[float, float]:
    """Width and height of a figure in inches, without a title."""
    columns = min(figure.columns, len(figure.panels))
    width, height = _panel_size(figure.panels)
    return columns * width, -(-len(figure.panels) // columns) * height


def fill(canvas: FigureBase, figure: Figure) -> None:
    """Draw the panels of a figure onto an empty canvas or part of one."""
    columns = min(figure.columns, len(figure.panels))
    axes = canvas.subplots(-(-len(figure.panels) // columns), columns, squeeze=False).ravel()
    shared = shared_legend(figure.panels)
    for place, panel in zip(axes, figure.panels, strict=False):
        _draw_panel(canvas, place, panel, legend=not shared)
    for place in axes[len(figure.panels) :]:
        place.set_visible(False)
    attention_bar(canvas, list(axes), figure.panels)
    if shared:
        handles = handles_of(figure.panels[0])
        canvas.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))


def _panel_size(panels: Sequence[Panel]) -> tuple[float, float]:
    """Inches of each panel: pictures are square-ish, heat maps grow with their rows."""
    pictures = [p.frames[0] if isinstance(p, Animation) else p for p in panels if isinstance(p, Overlay | Animation)]
    if len(pictures) == len(panels):
        width = 2.1 if len(panels) > 1 else 3.2
        return width, 0.94 * width * max(p.picture.shape[0] / p.picture.shape[1] for p in pictures) + 0.42
    rows = max((p.values.shape[0] for p in panels if isinstance(p, Heat)), default=0)
    bars = max((len(p.categories) for p in panels if isinstance(p, Bars) and p.horizontal), default=0)
    return PANEL_WIDTH, min(6.0, max(PANEL_HEIGHT, 0.9 + 0.17 * rows, 0.9 + 0.26 * bars))


def _draw_panel(canvas: FigureBase, place: Axes, panel: Panel, *, legend: bool) -> None:
    if panel.title:
        crowned = any(rule.axis == "x" for rule in getattr(panel, "rules", ()))  # rule labels stand above the frame
        width = 34 if isinstance(panel, Overlay | Animation) else 56
        place.set_title(textwrap.fill(panel.title, width), pad=15 if crowned else None)
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
        draw_overlay(canvas, place, panel.frames[0], legend=legend)
    handles = handles_of(panel)
    if legend and len(handles) > 1 and not isinstance(panel, Overlay | Animation):
        below = place.transAxes + ScaledTranslation(0, -32 / 72, canvas.dpi_scale_trans)  # clear of the axis label
        place.legend(handles=handles, ncols=legend_columns(handles), loc="upper center", bbox_to_anchor=(0.5, 0),
                     bbox_transform=below, borderaxespad=0.0)  # fmt: skip
