"""Small changes to plots already drawn by draw_plotly.

Cells one can click, a cell that is marked, opacity.

Plotly does not report clicks on a heat map as a selection, only clicks on points. `with_cells`
therefore lays one invisible square over every cell, which carries row and column and is what a page
is told about.
"""

from __future__ import annotations

from typing import Any

from avl_analysis.figures import palette
from avl_analysis.figures.spec import Heat


def with_cells(
    plot: Any, heat: Heat, *, marked: tuple[int, int] | None = None, dark: bool = False
) -> Any:
    """Make the cells of a drawn heat map selectable; `marked` (row, column) gets a frame.

    The points' `customdata` is [row, column, value].
    """
    rows, columns = heat.values.shape
    places = [(r, c) for r in range(rows) for c in range(columns)]
    theme = palette.DARK if dark else palette.LIGHT
    hover = (
        f"{_plain(heat.y.label)} %{{customdata[0]}}, {_plain(heat.x.label)} %{{customdata[1]}}<br>"
    )
    hover += f"{_plain(heat.value.label)}: %{{customdata[2]:.4g}}<extra></extra>"
    plot.add_scatter(
        x=[c for _, c in places],
        y=[r for r, _ in places],
        customdata=[[r, c, float(heat.values[r, c])] for r, c in places],
        mode="markers",
        marker={"symbol": "square", "size": 26, "color": "rgba(0,0,0,0)", "line": {"width": 0}},
        selected={"marker": {"color": "rgba(0,0,0,0)", "opacity": 1}},
        unselected={"marker": {"opacity": 1}},
        hovertemplate=hover,
        showlegend=False,
    )
    if marked is not None:
        row, column = marked
        corners = {
            "x0": column - 0.5,
            "x1": column + 0.5,
            "y0": row - 0.5,
            "y1": row + 0.5,
            "type": "rect",
        }
        plot.add_shape(**corners, line={"color": theme.paper, "width": 7})
        plot.add_shape(**corners, line={"color": theme.ink, "width": 3})
    # The page's heading says it.
    plot.update_traces(colorbar={"title": {"text": ""}}, selector={"type": "heatmap"})
    plot.update_layout(clickmode="event+select", dragmode=False)
    plot.update_xaxes(range=[-0.5, columns - 0.5], fixedrange=True)
    plot.update_yaxes(
        range=[-0.5, rows - 0.5] if heat.upward else [rows - 0.5, -0.5], fixedrange=True
    )
    return plot


def with_opacity(plot: Any, opacity: float) -> Any:
    """Let more or less of a picture shine through what is drawn over it.

    0 hides the patches, 1 is as drawn.
    """
    plot.update_traces(opacity=opacity, selector={"type": "heatmap"})
    return plot


def _plain(text: str) -> str:
    return text.replace("<", "&lt;").replace("%{", "%&#123;")
