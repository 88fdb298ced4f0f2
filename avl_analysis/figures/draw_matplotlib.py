"""Draws figure specs on paper: PNG, SVG and PDF files through matplotlib, and animated pictures as GIF or WebP.

The only module that imports matplotlib. It decides nothing about content; a spec that passes its own checks can be
drawn. No pyplot and no global state but an rc context around each drawing, so figures can be made in any thread and
without a display. Files are reproducible: no dates, fixed SVG ids, text of SVG and PDF stays text or outlines that
need no fonts of ours.

What surprises: dollar signs in labels (prompts come from anywhere) must stay dollar signs, so mathematical typesetting
is off, and log axes get plain numbers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from avl_analysis.figures import palette
from avl_analysis.figures.palette import LIGHT
from avl_analysis.figures.pictures import dimmed
from avl_analysis.figures.spec import (
    Animation,
    Axis,
    Bars,
    Box,
    Figure,
    Heat,
    Line,
    Lines,
    Overlay,
    Panel,
    Points,
    Rule,
    Scatter,
    log_ticks,
    repeated,
)

FORMATS = ("png", "svg", "pdf")
PANEL_WIDTH, PANEL_HEIGHT = 3.5, 2.65
"""Inches of one chart panel; two of them fill a text width of 7 inches."""

_RC = {
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
    "svg.hashsalt": "avl",
    "pdf.fonttype": 42,
    "savefig.facecolor": LIGHT.paper,
}
_ATTENTION = LinearSegmentedColormap.from_list("attention", ["#3a3a3a", palette.ATTENTION])


def draw(figure: Figure, *, titled: bool = True, captioned: bool = False) -> Canvas:
    """The figure as a matplotlib canvas, panels row by row; `captioned` writes title and caption around it."""
    with matplotlib.rc_context(_RC):
        columns = min(figure.columns, len(figure.panels))
        lines = -(-len(figure.panels) // columns)
        width, height = _panel_size(figure.panels)
        extra = 0.35 if titled else 0.0
        canvas = Canvas(figsize=(columns * width, lines * height + extra), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots(lines, columns, squeeze=False).ravel()
        shared = _shared_legend(figure.panels)
        for place, panel in zip(axes, figure.panels, strict=False):
            _draw_panel(canvas, place, panel, legend=not shared)
        for place in axes[len(figure.panels) :]:
            place.set_visible(False)
        _attention_bar(canvas, list(axes), figure.panels)
        if shared:
            first = figure.panels[0]
            canvas.legend(handles=_handles(first), loc="outside lower center", ncols=min(4, len(_handles(first))))
        if titled:
            canvas.suptitle(figure.title, x=0.01, ha="left", fontsize=10, fontweight="bold")
        if captioned:
            _write_caption(canvas, figure.caption.text)
    return canvas


def save(figure: Figure, folder: Path, formats: Iterable[str] = FORMATS, *, dpi: int = 200) -> list[Path]:
    """Write `folder/name.<format>` for each format and return the paths; the folder is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    canvas = draw(figure)
    with matplotlib.rc_context(_RC):
        canvas.draw_without_rendering()
    canvas.set_layout_engine("none")  # arranged once; arranging again for each file takes most of the time
    dates = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    paths = []
    for suffix in formats:
        if suffix not in dates:
            raise ValueError(f"cannot write figures as {suffix!r}; possible: {', '.join(FORMATS)}")
        path = folder / f"{figure.name}.{suffix}"
        with matplotlib.rc_context(_RC):
            canvas.savefig(path, dpi=dpi, metadata=dates[suffix])
        paths.append(path)
    return paths


def save_document(pages: Sequence[Canvas], path: Path, *, title: str) -> Path:
    """Bind canvases into one PDF, one to a page."""
    with matplotlib.rc_context(_RC), PdfPages(path, metadata={"Title": title, "CreationDate": None}) as document:
        for page in pages:
            document.savefig(page)
    return path


def save_animation(animation: Animation, path: Path, *, dpi: int = 110) -> Path:
    """Write an animation as one file, GIF or WebP by the path's suffix, endlessly repeating."""
    if path.suffix not in (".gif", ".webp"):
        raise ValueError(f"animations are written as .gif or .webp; got {path.name!r}")
    images = [_raster(frame, dpi) for frame in animation.frames]
    duration = round(1000 * animation.seconds)
    options: dict[str, Any] = {"quality": 82, "method": 4} if path.suffix == ".webp" else {"optimize": True}
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0, **options)
    return path


def _raster(frame: Overlay, dpi: int) -> Image.Image:
    with matplotlib.rc_context(_RC):
        canvas = Canvas(figsize=(3.2, 3.6), dpi=dpi)
        agg = FigureCanvasAgg(canvas)
        place = canvas.add_axes((0.03, 0.1, 0.94, 0.8))
        _overlay(canvas, place, frame, legend=True)
        agg.draw()
        return Image.fromarray(np.asarray(agg.buffer_rgba())[..., :3].copy())


def _panel_size(panels: Sequence[Panel]) -> tuple[float, float]:
    """Inches of each panel: pictures are square-ish, heat maps grow with their rows."""
    pictures = [p.frames[0] if isinstance(p, Animation) else p for p in panels if isinstance(p, Overlay | Animation)]
    if len(pictures) == len(panels):
        width = 2.1 if len(panels) > 1 else 3.2
        return width, 0.94 * width * max(p.picture.shape[0] / p.picture.shape[1] for p in pictures) + 0.42
    rows = max((p.values.shape[0] for p in panels if isinstance(p, Heat)), default=0)
    bars = max((len(p.categories) for p in panels if isinstance(p, Bars) and p.horizontal), default=0)
    return PANEL_WIDTH, min(6.0, max(PANEL_HEIGHT, 0.9 + 0.17 * rows, 0.9 + 0.26 * bars))


def _draw_panel(canvas: Canvas, place: Axes, panel: Panel, *, legend: bool) -> None:
    if panel.title:
        crowned = any(rule.axis == "x" for rule in getattr(panel, "rules", ()))  # rule labels stand above the frame
        width = 34 if isinstance(panel, Overlay | Animation) else 56
        place.set_title(textwrap.fill(panel.title, width), pad=15 if crowned else None)
    if isinstance(panel, Lines):
        _lines(place, panel)
    elif isinstance(panel, Heat):
        _heat(canvas, place, panel)
    elif isinstance(panel, Bars):
        _bars(place, panel)
    elif isinstance(panel, Scatter):
        _scatter(place, panel)
    elif isinstance(panel, Overlay):
        _overlay(canvas, place, panel, legend=legend)
    else:
        _overlay(canvas, place, panel.frames[0], legend=legend)
    handles = _handles(panel)
    if legend and len(handles) > 1 and not isinstance(panel, Overlay | Animation):
        below = place.transAxes + ScaledTranslation(0, -32 / 72, canvas.dpi_scale_trans)  # clear of the axis label
        place.legend(handles=handles, ncols=_legend_columns(handles), loc="upper center", bbox_to_anchor=(0.5, 0),
                     bbox_transform=below, borderaxespad=0.0)  # fmt: skip


def _lines(place: Axes, panel: Lines) -> None:
    for line in panel.lines:
        look = _line_look(line)
        every = max(1, line.x.size // 9)
        place.plot(line.x, line.y, markevery=every, **look)
        if line.low is not None and line.high is not None:
            place.fill_between(line.x, line.low, line.high, color=look["color"], alpha=0.2, linewidth=0)
    _axes(place, panel.x, panel.y)
    _rules(place, panel.rules)


def _line_look(line: Line) -> dict[str, Any]:
    style = palette.style(line.slot)
    if line.role == "baseline":
        return {"color": LIGHT.muted, "linestyle": (0, (1, 2)), "linewidth": 1.1, "label": line.name}
    if line.role == "fit":
        return {"color": style.light, "linestyle": (0, (2, 1)), "linewidth": 0.9, "label": line.name}
    return {
        "color": style.light,
        "linestyle": style.dash,
        "linewidth": 1.5,
        "marker": style.marker,
        "markersize": 4,
        "label": line.name,
    }


def _heat(canvas: Canvas, place: Axes, panel: Heat) -> None:
    limits = panel.value.limits or (float(np.nanmin(panel.values)), float(np.nanmax(panel.values)))
    norm = Normalize(*limits)
    place.set_facecolor(LIGHT.grid)
    place.imshow(panel.values, cmap="cividis", norm=norm, aspect="auto", origin="lower" if panel.upward else "upper")
    place.grid(False)
    bar = canvas.colorbar(ScalarMappable(norm, "cividis"), ax=place, pad=0.02)
    bar.set_label(panel.value.text)
    bar.outline.set_visible(False)
    if panel.annotate:
        middle = (limits[0] + limits[1]) / 2
        for (row, column), value in np.ndenumerate(panel.values):
            if np.isfinite(value):
                colour = LIGHT.ink if value > middle else LIGHT.paper
                place.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=colour)
    rows, columns = panel.values.shape
    _category_ticks(place.xaxis, panel.x, columns)
    _category_ticks(place.yaxis, panel.y, rows)
    place.set_xlabel(panel.x.text)
    place.set_ylabel(panel.y.text)


def _category_ticks(axis: Any, spec: Axis, count: int) -> None:
    if spec.ticks is not None:
        axis.set_ticks([at for at, _ in spec.ticks], [name for _, name in spec.ticks])
    else:
        axis.set_ticks(np.arange(0, count, max(1, -(-count // 12))))


def _bars(place: Axes, panel: Bars) -> None:
    at = np.arange(len(panel.categories), dtype=float)
    width = 0.8 / len(panel.bars)
    for number, bar in enumerate(panel.bars):
        offset = at + (number - (len(panel.bars) - 1) / 2) * width
        colour = palette.style(bar.slot).light
        hatch = ("", "///", "...", "xxx")[number % 4] if len(panel.bars) > 1 else ""
        error = None if bar.low is None or bar.high is None else np.abs([bar.values - bar.low, bar.high - bar.values])
        look: dict[str, Any] = {
            "color": colour,
            "edgecolor": LIGHT.paper,
            "hatch": hatch,
            "linewidth": 0.4,
            "label": bar.name,
        }
        marks: dict[str, Any] = {"ecolor": LIGHT.ink, "capsize": 2.0, "error_kw": {"linewidth": 0.9}}
        if panel.horizontal:
            place.barh(offset, bar.values, width * 0.95, xerr=error, **look, **marks)
        else:
            place.bar(offset, bar.values, width * 0.95, yerr=error, **look, **marks)
    if panel.horizontal:
        _axes(place, panel.value, panel.category)
        place.set_yticks(at, panel.categories)
        place.invert_yaxis()
        place.grid(False, axis="y")
    else:
        _axes(place, panel.category, panel.value)
        place.set_xticks(at, panel.categories)
        place.grid(False, axis="x")
    _rules(place, panel.rules)


def _scatter(place: Axes, panel: Scatter) -> None:
    for points in panel.points:
        style = palette.style(points.slot)
        if points.low is not None and points.high is not None:
            error = np.abs([points.y - points.low, points.high - points.y])
            place.errorbar(points.x, points.y, error, fmt="none", ecolor=style.light, elinewidth=0.8, capsize=1.8)
        dash = style.dash if points.joined else "none"
        place.plot(points.x, points.y, linestyle=dash, marker=style.marker, color=style.light, markersize=5)
        for x, y, label in zip(points.x, points.y, points.labels, strict=False):
            place.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6.5)
    _axes(place, panel.x, panel.y)
    _rules(place, panel.rules)


def _overlay(canvas: Canvas, place: Axes, panel: Overlay, *, legend: bool) -> None:
    height, width = panel.picture.shape[:2]
    extent = (0.0, float(width), float(height), 0.0)
    picture = panel.picture if panel.patches is None or panel.classes else dimmed(panel.picture)
    place.imshow(picture, extent=extent, interpolation="bilinear")
    if panel.patches is not None:
        place.imshow(_patch_colours(panel), extent=extent, interpolation="nearest")
    for box in panel.boxes:
        _box(place, box)
    place.set_title(textwrap.fill(panel.title, 34))
    place.set_axis_off()
    place.set(xlim=(0, width), ylim=(height, 0))
    if legend and panel.classes:
        handles = _handles(panel)
        place.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, handlelength=1.2)


def _patch_colours(panel: Overlay) -> np.ndarray:
    """RGBA of every patch: the class's fill, or the attention hue with the value as its opacity."""
    assert panel.patches is not None
    if panel.classes:
        fills = np.array([to_rgba(c, a) for c, a in zip(palette.CLASS_COLOURS, palette.CLASS_OPACITY, strict=True)])
        colours = fills[np.nan_to_num(panel.patches).astype(int)]
        colours[np.isnan(panel.patches)] = 0
        return colours
    low, high = panel.value.limits or (0.0, float(np.nanmax(panel.patches)))
    colours = np.empty((*panel.patches.shape, 4))
    colours[:] = to_rgba(palette.ATTENTION)
    colours[..., 3] = 0.92 * np.clip(np.nan_to_num((panel.patches - low) / (high - low)), 0, 1)
    return colours


def _box(place: Axes, box: Box) -> None:
    outline = Rectangle(
        (box.left, box.top),
        box.right - box.left,
        box.bottom - box.top,
        fill=False,
        edgecolor=palette.BOX,
        linewidth=1.3,
    )
    effects = [Stroke(linewidth=2.8, foreground=palette.BOX_EDGE), Normal()]
    outline.set_path_effects(effects)
    place.add_patch(outline)
    if box.label:
        text = place.text(box.left + 1, box.top - 1, box.label, fontsize=6, color=palette.BOX, va="bottom")
        text.set_path_effects([Stroke(linewidth=1.6, foreground=palette.BOX_EDGE), Normal()])


def _attention_bar(canvas: Canvas, axes: list[Axes], panels: Sequence[Panel]) -> None:
    """One colour bar for all pictures of the figure that share one scale."""
    found = [(a, p) for a, p in zip(axes, panels, strict=False) if isinstance(p, Overlay) and p.patches is not None]
    scales = {(p.value.text, p.value.limits) for _, p in found if not p.classes}
    if len(scales) != 1:
        return
    text, limits = scales.pop()
    if limits is None:
        return
    bar = canvas.colorbar(ScalarMappable(Normalize(*limits), _ATTENTION), ax=axes, shrink=0.55, pad=0.01, aspect=28)
    bar.set_label(text)
    bar.outline.set_visible(False)


def _axes(place: Axes, x: Axis, y: Axis) -> None:
    for axis, spec, scale, limit in (
        (place.xaxis, x, place.set_xscale, place.set_xlim),
        (place.yaxis, y, place.set_yscale, place.set_ylim),
    ):
        axis.set_label_text(spec.text)
        if spec.log:
            scale("log")
            axis.set_major_locator(
                LogLocator(subs=(1, 2, 5)) if spec.limits is None else FixedLocator(log_ticks(*spec.limits))
            )
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        else:
            axis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], nbins=8))
        if spec.limits is not None:
            limit(*spec.limits)
        if spec.ticks is not None:
            axis.set_ticks([at for at, _ in spec.ticks], [name for _, name in spec.ticks])


def _rules(place: Axes, rules: Sequence[Rule]) -> None:
    for rule in rules:
        line = place.axvline if rule.axis == "x" else place.axhline
        line(rule.at, color=LIGHT.muted, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        if rule.axis == "x":
            at, frame, shift, align = (rule.at, 1.0), place.get_xaxis_transform(), (0, 2), ("center", "bottom")
        else:
            at, frame, shift, align = (1.0, rule.at), place.get_yaxis_transform(), (-2, 1), ("right", "bottom")
        place.annotate(
            rule.label, at, xycoords=frame, xytext=shift, textcoords="offset points", ha=align[0], va=align[1],
            fontsize=6.5, color=LIGHT.muted,
        )  # fmt: skip


def _handles(panel: Panel) -> list[Any]:
    """Legend entries of a panel, in drawing order."""
    if isinstance(panel, Lines):
        return [Line2D([], [], **_line_look(line)) for line in panel.lines if not repeated(panel, line)]
    if isinstance(panel, Scatter):
        return [_point_handle(points) for points in panel.points]
    if isinstance(panel, Bars) and len(panel.bars) > 1:
        hatches = ("", "///", "...", "xxx")
        return [
            Patch(facecolor=palette.style(bar.slot).light, edgecolor=LIGHT.paper, hatch=hatches[i % 4], label=bar.name)
            for i, bar in enumerate(panel.bars)
        ]
    if isinstance(panel, Animation):
        return _handles(panel.frames[0])
    if isinstance(panel, Overlay) and panel.classes:
        fills = zip(palette.CLASS_COLOURS, palette.CLASS_OPACITY, panel.classes, strict=False)
        return [Patch(facecolor=to_rgba(colour, alpha), label=name) for colour, alpha, name in fills]
    return []


def _legend_columns(handles: Sequence[Any]) -> int:
    """Columns of a legend below one panel: as many as the longest name leaves room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    return max(1, min(len(handles), 58 // (longest + 7)))


def _point_handle(points: Points) -> Line2D:
    style = palette.style(points.slot)
    dash = style.dash if points.joined else "none"
    return Line2D([], [], color=style.light, marker=style.marker, linestyle=dash, markersize=5, label=points.name)


def _shared_legend(panels: Sequence[Panel]) -> bool:
    """Whether all panels show the same series, so that one legend below serves them all."""
    keys = [tuple(handle.get_label() for handle in _handles(panel)) for panel in panels]
    return len(panels) > 1 and len(keys[0]) > 1 and len(set(keys)) == 1


def _write_caption(canvas: Canvas, text: str) -> None:
    wrapped = textwrap.fill(text, int(canvas.get_figwidth() * 17))
    lines = wrapped.count("\n") + 1
    width, height = canvas.get_size_inches()
    canvas.set_size_inches(width, height + 0.16 * lines + 0.1)
    canvas.supxlabel(wrapped, x=0.01, ha="left", fontsize=8, color=LIGHT.muted)
