"""Printed pages: flowing text, and figures with their words, bound into one PDF.

Widths of letters are estimated, not measured, which is enough for ragged text and needs no drawing
pass.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure as Canvas

from avl_analysis.figures.draw_matplotlib.arrange import fill, size_of
from avl_analysis.figures.draw_matplotlib.look import RC
from avl_analysis.figures.palette import LIGHT
from avl_analysis.figures.spec import Figure
from avl_analysis.files import atomic_write

WIDTH, HEIGHT, MARGIN = 8.27, 11.69, 0.7
"""Inches: A4 upright."""
_LETTER = 0.56  # width of a letter of the sans font, as a share of its size
_LINE = 1.38  # distance of lines, likewise
_GLUED = 0.02  # inches of space behind a heading that stays with the next paragraph
_LEAST = 0.75  # share of its wanted height that a figure gets at least


@dataclass(frozen=True)
class Paragraph:
    """Words on a page. `size` in points, `indent` and `after` (space behind) in inches."""

    text: str
    size: float = 8.5
    bold: bool = False
    muted: bool = False
    indent: float = 0.0
    after: float = 0.08

    def lines(self) -> list[str]:
        # 72 points are an inch; bold letters are taken to be a tenth wider.
        letters = int(
            (WIDTH - 2 * MARGIN - self.indent)
            * 72
            / (self.size * _LETTER * (1.1 if self.bold else 1.0))
        )
        return [
            line for part in self.text.split("\n") for line in textwrap.wrap(part, letters) or [""]
        ]

    def height(self) -> float:
        return len(self.lines()) * self.size * _LINE / 72 + self.after


def text_pages(paragraphs: Sequence[Paragraph]) -> list[Canvas]:
    """Paragraphs one after the other, on as many pages as they need.

    A paragraph is not split, and one with hardly any space behind it (a heading) stays with the
    next.
    """
    pages: list[Canvas] = []
    # Inches still free on the current page; none, so the first paragraph opens one.
    left = 0.0
    for number, paragraph in enumerate(paragraphs):
        with_next = paragraph.after <= _GLUED and number + 1 < len(paragraphs)
        if paragraph.height() + (paragraphs[number + 1].height() if with_next else 0.0) > left:
            pages.append(_page())
            left = HEIGHT - 2 * MARGIN
        # _write counts from the lower edge of the page, `left` from the lower margin.
        left = _write(pages[-1], [paragraph], left + MARGIN) - MARGIN
    return pages


def figure_pages(
    figure: Figure, above: Sequence[Paragraph] = (), below: Sequence[Paragraph] = ()
) -> list[Canvas]:
    """A figure as wide as the page, with words above and its caption and further words below.

    Words that would leave the figure less than `_LEAST` of its height move to pages of their own.
    """
    caption = Paragraph(f"{figure.title}. {figure.caption.text}", size=8)
    width, height = size_of(figure)
    wanted = min(height * (WIDTH - 2 * MARGIN) / width, 1.15 * height)
    # Inches for words, once the caption and the least height of the figure are taken off.
    room = HEIGHT - 2 * MARGIN - 0.3 - caption.height() - _LEAST * wanted
    before: list[Canvas] = []
    behind: list[Canvas] = []
    # Words above are decided first: once they have moved away, their room goes to the words below.
    if _tall(above) > room:
        before, above = text_pages(above), ()
    if _tall(above) + _tall(below) > room:
        behind, below = text_pages(below), ()
    under = [caption, *below]
    page = _page()
    top = _write(page, above, HEIGHT - MARGIN) - 0.1
    bottom = max(top - wanted, MARGIN + _tall(under) + 0.1)
    inner = min(WIDTH - 2 * MARGIN, 1.25 * width)
    with matplotlib.rc_context(RC):
        # The figure stands in the middle cell; the outer cells are the margins and the room for
        # words.
        grid = page.add_gridspec(
            3,
            3,
            height_ratios=[HEIGHT - top, top - bottom, bottom],
            width_ratios=[MARGIN, inner, WIDTH - MARGIN - inner],
        )
        fill(page.add_subfigure(grid[1, 1]), figure)
    _write(page, under, bottom - 0.1)
    return [*before, page, *behind]


def _tall(paragraphs: Sequence[Paragraph]) -> float:
    return sum(paragraph.height() for paragraph in paragraphs)


def save_document(pages: Sequence[Canvas], path: Path, *, title: str) -> Path:
    """Bind pages into one PDF."""
    with (
        matplotlib.rc_context(RC),
        atomic_write(path) as unfinished,
        PdfPages(unfinished, metadata={"Title": title, "CreationDate": None}) as document,
    ):
        for number, page in enumerate(pages, 1):
            page.text(0.5, 0.35 / HEIGHT, f"{number}", ha="center", fontsize=7.5, color=LIGHT.muted)
            document.savefig(page)
    return path


def _page() -> Canvas:
    with matplotlib.rc_context(RC):
        page = Canvas(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasAgg(page)
    return page


def _write(page: Canvas, paragraphs: Sequence[Paragraph], y: float) -> float:
    """Write downwards from `y` inches above the page's lower edge; returns where the text ends."""
    for paragraph in paragraphs:
        colour = LIGHT.muted if paragraph.muted else LIGHT.ink
        weight = "bold" if paragraph.bold else "normal"
        with matplotlib.rc_context(RC):
            for number, line in enumerate(paragraph.lines()):
                at = y - number * paragraph.size * _LINE / 72
                page.text(
                    (MARGIN + paragraph.indent) / WIDTH,
                    at / HEIGHT,
                    line,
                    va="top",
                    fontsize=paragraph.size,
                    color=colour,
                    fontweight=weight,
                )
        y -= paragraph.height()
    return y
