"""From numbers to pictures in three steps: compute (elsewhere), describe (`spec`), draw (`draw_*`).

A `Figure` says everything a reader sees: values, axes with units, limits, caption. It is described
once and drawn twice, for paper by matplotlib and for the screen by plotly, so that the two cannot
disagree and tests can check what would be drawn without looking at pixels. Nothing here knows
models, recordings or web pages.
"""

from avl_analysis.figures.patches import Patches
from avl_analysis.figures.spec import (
    Animation,
    Axis,
    Bar,
    Bars,
    Box,
    Caption,
    Figure,
    Heat,
    Line,
    Lines,
    Overlay,
    Panel,
    Points,
    Rule,
    Scatter,
    shown_model,
)

__all__ = [
    "Animation",
    "Axis",
    "Bar",
    "Bars",
    "Box",
    "Caption",
    "Figure",
    "Heat",
    "Line",
    "Lines",
    "Overlay",
    "Panel",
    "Patches",
    "Points",
    "Rule",
    "Scatter",
    "shown_model",
]
