"""Small changes to plots already drawn by draw_plotly.

Cells and patches one can click, ones that are marked, opacity.

Plotly does not report clicks on a heat map as a selection, only clicks on points. `with_cells`
therefore lays one invisible square over every cell, which carries row and column and is what a page
is told about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from avl_analysis.figures import palette
from avl_analysis.figures.spec import Heat, Overlay


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
        # Cells are centred on whole numbers, so a cell reaches half a unit to either side.
        corners = {
            "x0": column - 0.5,
            "x1": column + 0.5,
            "y0": row - 0.5,
            "y1": row + 0.5,
            "type": "rect",
        }
        # A wide frame in the paper's colour below a narrow one in ink: visible on cells of any
        # colour.
        plot.add_shape(**corners, line={"color": theme.paper, "width": 7})
        plot.add_shape(**corners, line={"color": theme.ink, "width": 3})
    # The page's heading says it.
    plot.update_traces(colorbar={"title": {"text": ""}}, selector={"type": "heatmap"})
    plot.update_layout(clickmode="event+select", dragmode=False)
    plot.update_xaxes(range=[-0.5, columns - 0.5], fixedrange=True)
    # Left to itself, the axis makes room for the squares' full size, beyond the cells.
    plot.update_yaxes(
        range=[-0.5, rows - 0.5] if heat.upward else [rows - 0.5, -0.5],
        autorange=False,
        fixedrange=True,
    )
    return plot


def with_patches(plot: Any, overlay: Overlay, marked: Sequence[int] = ()) -> Any:
    """Make the patches of a drawn overlay selectable, by a click or by a frame around several.

    The points' `customdata` is [image token].

    Args:
        plot: the drawn overlay.
        overlay: what was drawn; it has patches.
        marked: image tokens that get a frame.
    """
    assert overlay.patches is not None
    height, width = overlay.picture.shape[:2]
    raster, boxes = overlay.patches.raster, overlay.patches.boxes
    # -1 marks cells of the raster without a token. Tokens that finer ones cover are not in the
    # raster, so they cannot be chosen.
    shown = [int(token) for token in sorted(set(raster.token.ravel().tolist()) - {-1})]
    # Boxes are fractions of the picture, the axes of an overlay are in its pixels.
    plot.add_scatter(
        x=[width * (boxes[token, 0] + boxes[token, 2]) / 2 for token in shown],
        y=[height * (boxes[token, 1] + boxes[token, 3]) / 2 for token in shown],
        customdata=[[token] for token in shown],
        mode="markers",
        marker={"symbol": "square", "size": 14, "color": "rgba(0,0,0,0)", "line": {"width": 0}},
        selected={"marker": {"color": "rgba(0,0,0,0)", "opacity": 1}},
        unselected={"marker": {"opacity": 1}},
        hovertemplate="image token %{customdata[0]}<extra></extra>",
        showlegend=False,
    )
    for token in marked:
        left, top, right, bottom = boxes[token]
        edges = {"x0": left * width, "x1": right * width, "y0": top * height, "y1": bottom * height}
        plot.add_shape(type="rect", **edges, line={"color": palette.BOX_EDGE, "width": 4})
        plot.add_shape(type="rect", **edges, line={"color": palette.BOX, "width": 2})
    # Dragging stays allowed, unlike for cells, because a frame may be drawn around several patches.
    plot.update_layout(clickmode="event+select")
    plot.update_xaxes(fixedrange=True)
    plot.update_yaxes(fixedrange=True)
    return plot


def with_opacity(plot: Any, opacity: float) -> Any:
    """Let more or less of a picture shine through what is drawn over it.

    0 hides the patches, 1 is as drawn.
    """
    plot.update_traces(opacity=opacity, selector={"type": "heatmap"})
    return plot


COLOURS: Mapping[str, str | None] = {
    "amber": None,
    "cividis": "Cividis",
    "viridis": "Viridis",
    "inferno": "Inferno",
    "greys": "Greys",
}
"""Colour maps of overlays by name; None is amber that fades to nothing, as figures are drawn."""


def with_colours(plot: Any, name: str, *, smooth: bool = False) -> Any:
    """Draw the quantities over a picture in another colour map, or smoothed between patches.

    Args:
        plot: a drawn overlay of quantities.
        name: one of `COLOURS`.
        smooth: whether colours pass into each other; the values on hover stay those of patches.
    """
    scale = COLOURS[name]
    if scale is not None:
        # these maps do not fade to nothing, so the picture needs some room below them
        for trace in plot.select_traces(selector={"type": "heatmap"}):
            trace.update(
                colorscale=scale, opacity=0.6 * (1 if trace.opacity is None else trace.opacity)
            )
    if smooth:
        plot.update_traces(zsmooth="best", selector={"type": "heatmap"})
    return plot


def _plain(text: str) -> str:
    # "%{" would begin a placeholder of plotly's hover templates.
    return text.replace("<", "&lt;").replace("%{", "%&#123;")
