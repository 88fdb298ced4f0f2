"""What every drawing on paper shares: type, line styles, legend entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from avl_analysis.figures import palette
from avl_analysis.figures.palette import LIGHT
from avl_analysis.figures.spec import (
    Animation,
    Bars,
    Line,
    Lines,
    Overlay,
    Panel,
    Points,
    Scatter,
    repeated,
)

RC = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.labelcolor": LIGHT.ink,
    "axes.edgecolor": LIGHT.muted,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT.grid,
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT.muted,
    "ytick.color": LIGHT.muted,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "text.color": LIGHT.ink,
    "text.parse_math": False,
    # A fixed salt gives elements of an SVG the same ids in every run.
    "svg.hashsalt": "avl",
    # Type 42 embeds TrueType fonts, so text of a PDF stays text that can be searched and copied.
    "pdf.fonttype": 42,
    "savefig.facecolor": LIGHT.paper,
}
"""Settings in force while something is drawn; dollar signs in labels stay dollar signs."""
HATCHES = ("", "///", "...", "xxx")
"""Patterns of bars side by side, so that they differ in grey print."""


def line_look(line: Line) -> dict[str, Any]:
    """Colour, dash, marker and width of a curve, as arguments of `Axes.plot`."""
    style = palette.style(line.slot)
    # Baselines and fits have no markers, because markers stand for measured points.
    if line.role == "baseline":
        return {
            "color": LIGHT.muted,
            "linestyle": (0, (1, 2)),
            "linewidth": 1.1,
            "label": line.name,
        }
    if line.role == "fit":
        return {
            "color": style.light,
            "linestyle": (0, (2, 1)),
            "linewidth": 0.9,
            "label": line.name,
        }
    return {
        "color": style.light,
        "linestyle": style.dash,
        "linewidth": 1.5,
        "marker": style.marker,
        "markersize": 4,
        "label": line.name,
    }


def handles_of(panel: Panel) -> list[Any]:
    """Legend entries of a panel, in drawing order."""
    if isinstance(panel, Lines):
        return [
            Line2D([], [], **line_look(line)) for line in panel.lines if not repeated(panel, line)
        ]
    if isinstance(panel, Scatter):
        return [_point_handle(points) for points in panel.points]
    if isinstance(panel, Bars) and len(panel.bars) > 1:
        return [
            Patch(
                facecolor=palette.style(bar.slot).light,
                edgecolor=LIGHT.paper,
                hatch=HATCHES[i % 4],
                label=bar.name,
            )
            for i, bar in enumerate(panel.bars)
        ]
    if isinstance(panel, Animation):
        return handles_of(panel.frames[0])
    if isinstance(panel, Overlay) and panel.classes:
        fills = zip(palette.CLASS_COLOURS, palette.CLASS_OPACITY, panel.classes, strict=False)
        return [
            Patch(facecolor=to_rgba(colour, alpha), label=name) for colour, alpha, name in fills
        ]
    return []


def _point_handle(points: Points) -> Line2D:
    style = palette.style(points.slot)
    dash = style.dash if points.joined else "none"
    return Line2D(
        [],
        [],
        color=style.light,
        marker=style.marker,
        linestyle=dash,
        markersize=5,
        label=points.name,
    )


def legend_columns(handles: Sequence[Any]) -> int:
    """Columns of a legend below one panel: as many as the longest name leaves room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    return max(1, min(len(handles), 50 // (longest + 7)))


def shared_legend(panels: Sequence[Panel]) -> bool:
    """Whether all panels with series show the same ones, so that one legend below serves them all.

    Maps have no series and need no legend.
    """
    keys = [tuple(handle.get_label() for handle in handles_of(panel)) for panel in panels]
    keys = [key for key in keys if key]
    return len(keys) > 1 and len(keys[0]) > 1 and len(set(keys)) == 1
