"""How the panels of a figure are laid out row by row, on paper and in the dashboard.

A figure says in how many columns its panels stand. Pictures are narrow and charts wide, so in a
figure of both they do not share a row. Sizes are decided where something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from avl_analysis.figures.spec import Animation, Figure, Heat, Overlay, Panel

CHARTS = 2
"""Charts side by side in a figure that shows pictures, too."""


def panel_rows(figure: Figure) -> list[tuple[Panel, ...]]:
    """The panels row by row."""
    rows: list[tuple[Panel, ...]] = []
    for picture, found in groupby(figure.panels, _is_picture):
        run = tuple(found)
        # A map of things with names has a row of its own.
        while not picture and _mixed(figure) and run and wide(run[:1]):
            rows.append(run[:1])
            run = run[1:]
        columns = across(figure, run) if run else 1
        rows += [run[start : start + columns] for start in range(0, len(run), columns)]
    return rows


def across(figure: Figure, row: Sequence[Panel]) -> int:
    """How many panels stand side by side in rows of this kind; the last one may hold fewer."""
    if not _mixed(figure):
        return min(figure.columns, len(figure.panels))
    return min(figure.columns, len(alike(figure, row))) if pictures(row) else CHARTS


def alike(figure: Figure, row: Sequence[Panel]) -> Sequence[Panel]:
    """The panels of a figure that are as large as those of a row: all pictures are one size."""
    return [panel for panel in figure.panels if _is_picture(panel)] if pictures(row) else row


def pictures(panels: Sequence[Panel]) -> bool:
    """Whether all of these are pictures."""
    return all(_is_picture(panel) for panel in panels)


def wide(row: Sequence[Panel]) -> bool:
    """Whether a row holds one heat map of things with names, which need room."""
    return len(row) == 1 and isinstance(row[0], Heat) and row[0].x.ticks is not None


def _is_picture(panel: Panel) -> bool:
    return isinstance(panel, Overlay | Animation)


def _mixed(figure: Figure) -> bool:
    """Whether a figure shows pictures and charts."""
    return len({_is_picture(panel) for panel in figure.panels}) > 1
