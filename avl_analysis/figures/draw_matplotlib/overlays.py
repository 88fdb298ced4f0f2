"""Pictures on paper.

Patches of attention or of classes over them, outlines, and frames of animations.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.figure import Figure as Canvas
from matplotlib.figure import FigureBase
from matplotlib.image import PcolorImage
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from PIL import Image

from avl_analysis.figures import palette
from avl_analysis.figures.draw_matplotlib.look import RC, handles_of
from avl_analysis.figures.pictures import dimmed
from avl_analysis.figures.spec import Box, Overlay, Panel

_ATTENTION = LinearSegmentedColormap.from_list("attention", ["#3a3a3a", palette.ATTENTION])


def draw_overlay(canvas: FigureBase, place: Axes, panel: Overlay, *, legend: bool) -> None:
    """Draw an image with its patches and outlines onto axes."""
    height, width = panel.picture.shape[:2]
    # Left, right, bottom and top in pixels; y runs downwards, as it does for boxes.
    extent = (0.0, float(width), float(height), 0.0)
    # Quantities are drawn over a grey picture, so that the only colour is the measurement; under
    # the fills of classes the picture stays as it is.
    picture = panel.picture if panel.patches is None or panel.classes else dimmed(panel.picture)
    place.imshow(picture, extent=extent, interpolation="bilinear")
    if panel.patches is not None:
        raster = panel.patches.raster
        colours = _patch_colours(panel, raster.take(panel.patches.values))
        # Without any token that has a place the raster is empty.
        if colours.size:
            # An image whose cells differ in size; unlike a mesh it has no seams between them. It
            # does not know its extent, so layout must not ask it; the picture below has the same.
            cells = PcolorImage(place, raster.x * width, raster.y * height, colours, zorder=1)
            cells.set_in_layout(False)
            place.add_image(cells)
        _words(place, panel)
    for box in panel.boxes:
        _box(place, box, height)
    place.set_title(textwrap.fill(panel.title, 28))
    place.set_axis_off()
    place.set(xlim=(0, width), ylim=(height, 0))
    if legend and panel.classes:
        handles = handles_of(panel)
        place.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=3,
            handlelength=1.2,
        )


_MOST_WORDS = 16
"""Patches side by side up to which words are written on them; more are too small to read."""


def _words(place: Axes, panel: Overlay) -> None:
    """Write the word of every patch on it, so small that it fits in a picture of 3.6 inches."""
    assert panel.patches is not None
    raster = panel.patches.raster
    if not panel.words or max(raster.token.shape) > _MOST_WORDS:
        return
    height, width = panel.picture.shape[:2]
    effects = [Stroke(linewidth=1.0, foreground="black"), Normal()]
    # Only tokens that are seen: the words of covered ones would lie under those of others.
    for token in np.unique(raster.token[raster.token >= 0]):
        left, top, right, bottom = panel.patches.boxes[token]
        word = panel.words[int(token)]
        text = place.text(
            width * (left + right) / 2,
            height * (top + bottom) / 2,
            word,
            # Points. Smaller for words of more than seven letters and for more patches side by
            # side.
            fontsize=min(1.0, 7 / max(1, len(word))) * 56 / max(12, raster.token.shape[1]),
            color="white",
            ha="center",
            va="center",
        )
        text.set_path_effects(effects)


def _patch_colours(panel: Overlay, values: np.ndarray) -> np.ndarray:
    """RGBA of every cell: the class's fill, or the attention hue with the value as its opacity.

    Args:
        panel: what is drawn.
        values: (rows, columns) of the raster, NaN where there is no token.

    Returns:
        (rows, columns, 4), clear where there is no token.
    """
    colours = np.zeros((*values.shape, 4))
    seen = np.isfinite(values)
    if panel.classes:
        fills = np.array(
            [
                to_rgba(c, a)
                for c, a in zip(palette.CLASS_COLOURS, palette.CLASS_OPACITY, strict=True)
            ]
        )
        # NaN has no whole number, so only cells with a token are looked up.
        colours[seen] = fills[values[seen].astype(int)]
        return colours
    low, high = panel.scale
    colours[...] = to_rgba(palette.ATTENTION, 0.0)
    colours[seen, 3] = palette.ATTENTION_OPACITY * np.clip(
        (values[seen] - low) / (high - low), 0, 1
    )
    return colours


def _box(place: Axes, box: Box, height: int) -> None:
    """Outline a box; its name stands above it, at the upper border of the picture inside it."""
    outline = Rectangle(
        (box.left, box.top),
        box.right - box.left,
        box.bottom - box.top,
        fill=False,
        edgecolor=palette.BOX,
        linewidth=1.3,
    )
    effects = [Stroke(linewidth=2.8, foreground=palette.BOX_EDGE), Normal()]
    # A dark stroke below the light line, so that it is visible on any picture.
    outline.set_path_effects(effects)
    place.add_patch(outline)
    if box.label:
        inside = box.top < 0.1 * height
        text = place.text(
            box.left + 1,
            box.top + 1 if inside else box.top - 1,
            box.label,
            fontsize=6,
            color=palette.BOX,
            va="top" if inside else "bottom",
        )
        text.set_path_effects([Stroke(linewidth=1.6, foreground=palette.BOX_EDGE), Normal()])


def attention_bar(canvas: FigureBase, axes: list[Axes], panels: Sequence[Panel]) -> None:
    """One colour bar for all pictures of the figure that share one scale."""
    found = [
        (a, p)
        for a, p in zip(axes, panels, strict=False)
        if isinstance(p, Overlay) and p.patches is not None
    ]
    scales = {(p.value.text, p.value.limits) for _, p in found if not p.classes}
    # One bar cannot serve pictures on different scales; then there is none.
    if len(scales) != 1:
        return
    text, limits = scales.pop()
    if limits is None:
        return
    bar = canvas.colorbar(
        ScalarMappable(Normalize(*limits), _ATTENTION), ax=axes, shrink=0.55, pad=0.01, aspect=28
    )
    # The bar of a single row of pictures is shorter than the words beside it.
    bar.set_label(textwrap.fill(text, 28))
    bar.outline.set_visible(False)


def raster(frame: Overlay, dpi: int) -> Image.Image:
    """An overlay as pixels, as an animation needs its frames."""
    with matplotlib.rc_context(RC):
        canvas = Canvas(figsize=(3.2, 3.6), dpi=dpi)
        agg = FigureCanvasAgg(canvas)
        # A fixed place on the canvas, not a layout engine, so that the picture stands at the same
        # pixels in every frame.
        place = canvas.add_axes((0.03, 0.1, 0.94, 0.8))
        draw_overlay(canvas, place, frame, legend=True)
        agg.draw()
        # (height, width, 3). The canvas owns the buffer, hence the copy.
        return Image.fromarray(np.asarray(agg.buffer_rgba())[..., :3].copy())
