"""Draws figure specs on the screen.

One interactive plotly figure per panel, for the report page and the dashboard.

The only module that imports plotly. One plot per panel, not subplots, so that a page can lay the
panels out by its width. Whatever text a spec carries is escaped, because plotly renders a little
HTML in labels and a prompt may contain anything, `<image>` for a start.

Plots have a transparent background, and all their colours come from palette.py, so a page can
exchange the light colours for the dark ones (`palette.dark_pairs`) without drawing again.
"""

from __future__ import annotations

import json

import plotly.graph_objects as go
import plotly.offline

from avl_analysis.figures.draw_plotly.charts import draw_bars, draw_heat, draw_lines, draw_scatter
from avl_analysis.figures.draw_plotly.look import literal
from avl_analysis.figures.draw_plotly.overlays import draw_animation, draw_overlay
from avl_analysis.figures.palette import DARK, LIGHT
from avl_analysis.figures.spec import Bars, Heat, Lines, Overlay, Panel, Scatter


def draw(panel: Panel, *, dark: bool = False, titled: bool = True) -> go.Figure:
    """One panel as a plotly figure in the light or the dark theme.

    `titled=False` leaves the title to the page.
    """
    theme = DARK if dark else LIGHT
    if isinstance(panel, Lines):
        plot = draw_lines(panel, theme, dark)
    elif isinstance(panel, Heat):
        plot = draw_heat(panel, theme)
    elif isinstance(panel, Bars):
        plot = draw_bars(panel, theme, dark)
    elif isinstance(panel, Scatter):
        plot = draw_scatter(panel, theme, dark)
    elif isinstance(panel, Overlay):
        plot = draw_overlay(panel, theme)
    else:
        plot = draw_animation(panel, theme)
    if titled and panel.title:
        plot.update_layout(title={"text": literal(panel.title), "font": {"size": 14}}, margin_t=44)
    return plot


def as_json(plot: go.Figure) -> str:
    """The plot as JSON that is safe inside a script element."""
    data = json.loads(plot.to_json())
    return (
        # "</script>" in a label would end the element. In JSON the escapes mean the same
        # characters.
        json.dumps(data, separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
    )


def library() -> str:
    """Source text of plotly.js, to be put into a page once."""
    return str(plotly.offline.get_plotlyjs())
