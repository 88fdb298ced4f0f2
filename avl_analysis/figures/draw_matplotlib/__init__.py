"""Draws figure specs on paper.

PNG, SVG and PDF files through matplotlib, and animated pictures as GIF or WebP.

The only module that imports matplotlib. It decides nothing about content; a spec that passes its
own checks can be drawn. No pyplot and no global state but an rc context around each drawing, so
figures can be made in any thread and without a display. Files are reproducible: no dates, fixed SVG
ids, text of SVG and PDF stays text or outlines that need no fonts of ours.

Note: dollar signs in labels (prompts come from anywhere) must stay dollar signs, so
mathematical typesetting is off, and log axes get plain numbers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from avl_analysis.figures.draw_matplotlib.arrange import fill, size_of
from avl_analysis.figures.draw_matplotlib.look import RC
from avl_analysis.figures.draw_matplotlib.overlays import raster
from avl_analysis.figures.draw_matplotlib.pages import (
    Paragraph,
    figure_pages,
    save_document,
    text_pages,
)
from avl_analysis.figures.spec import Animation, Figure
from avl_analysis.files import atomic_write

__all__ = [
    "FORMATS",
    "Paragraph",
    "draw",
    "figure_pages",
    "save",
    "save_animation",
    "save_document",
    "text_pages",
    "write",
]

FORMATS = ("png", "svg", "pdf")
TITLE_LETTERS = 10.5
"""Letters of a title that fit into an inch."""
_UNDATED: dict[str, dict[str, None]] = {
    "png": {},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}
"""Metadata that leaves dates out, so that equal figures are equal files."""


def draw(figure: Figure, *, titled: bool = True) -> Canvas:
    """The figure as a matplotlib canvas of its own size, panels row by row."""
    width, height = size_of(figure)
    title = textwrap.fill(figure.title, int(TITLE_LETTERS * width))
    above = 0.18 + 0.17 * len(title.splitlines()) if titled else 0.0
    with matplotlib.rc_context(RC):
        canvas = Canvas(figsize=(width, height + above), layout="constrained")
        FigureCanvasAgg(canvas)
        fill(canvas, figure)
        if titled:
            canvas.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return canvas


def save(
    figure: Figure, folder: Path, formats: Iterable[str] = FORMATS, *, dpi: int = 200
) -> list[Path]:
    """Write `folder/name.<format>` for each format and return the paths.

    The folder is made if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    canvas = draw(figure)
    # Letters are not twice as wide at twice the dots per inch, so panels arranged for other dots
    # than they are drawn with can push the name of an axis over the edge.
    canvas.set_dpi(dpi)
    with matplotlib.rc_context(RC):
        canvas.draw_without_rendering()
    # Arranged once; arranging again for each file takes most of the time.
    canvas.set_layout_engine("none")
    paths = []
    for suffix in formats:
        if suffix not in _UNDATED:
            raise ValueError(f"cannot write figures as {suffix!r}; possible: {', '.join(FORMATS)}")
        path = folder / f"{figure.name}.{suffix}"
        # svg.hashsalt and pdf.fonttype are read while a file is written, so the settings must be in
        # force here, not only while the canvas is made.
        with matplotlib.rc_context(RC), atomic_write(path) as unfinished:
            canvas.savefig(unfinished, dpi=dpi, metadata=_UNDATED[suffix])
        paths.append(path)
    return paths


def write(figure: Figure, file: IO[bytes], suffix: str, *, dpi: int = 200) -> None:
    """Write the figure into an open binary file.

    Args:
        figure: what to draw.
        file: open for writing bytes.
        suffix: one of `FORMATS`.
        dpi: dots per inch of a PNG.
    """
    with matplotlib.rc_context(RC):
        draw(figure).savefig(file, format=suffix, dpi=dpi, metadata=_UNDATED[suffix])


def save_animation(animation: Animation, path: Path, *, dpi: int = 110) -> Path:
    """Write an animation as one file, GIF or WebP by the path's suffix, endlessly repeating."""
    if path.suffix not in (".gif", ".webp"):
        raise ValueError(f"animations are written as .gif or .webp; got {path.name!r}")
    images = [raster(frame, dpi) for frame in animation.frames]
    # Pillow takes milliseconds for each frame; loop=0 below repeats without end.
    duration = round(1000 * animation.seconds)
    options: dict[str, Any] = (
        {"quality": 82, "method": 4} if path.suffix == ".webp" else {"optimize": True}
    )
    with atomic_write(path) as unfinished:
        images[0].save(
            unfinished,
            save_all=True,
            append_images=images[1:],
            duration=duration,
            loop=0,
            **options,
        )
    return path
