"""The page: sections and numbers as one HTML file that works without a network.

The template escapes everything; plots travel as JSON in which no "<" is left. Only what this
package brings itself (style, script) enters unescaped. A content security policy in the page
forbids it to load anything from anywhere, so it either works offline or not at all.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from avl_analysis.figures import Animation, Figure, Heat, Overlay, Panel, draw_plotly, palette
from avl_analysis.figures.pictures import data_uri
from avl_reports.facts import LEAD, READING, facts, heading, provenance, verdicts
from avl_reports.run import Run, Section
from avl_reports.script import csv_text

SAMPLES_SHOWN = 24


def render(
    run: Run,
    sections: dict[str, Section],
    missing: dict[str, str],
    *,
    title: str = "",
    commands: Sequence[str] = (),
    drawings: Mapping[str, bytes] | None = None,
) -> str:
    """The page as text. Everything it offers lies inside it, so it can be moved and sent alone.

    Args:
        run: what was measured.
        sections: name of the module that drew it -> section, in the order of the page.
        missing: name of a module -> why it drew nothing.
        title: heading; by default it names the model.
        commands: command lines that reproduce the report.
        drawings: name of a figure -> the figure as SVG, which the page then offers as SVG and PNG.
    """
    svgs = {name: _packed(data) for name, data in (drawings or {}).items()}
    environment = Environment(
        loader=PackageLoader("avl_reports", "templates"),
        autoescape=True,
        # A name that the template is not given is an error here and not an empty place on the page.
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    # A no-break space, so that no line ends between a number and its per cent sign.
    environment.filters["close"] = lambda text: str(text).replace(" %", "\u00a0%")
    findings = [finding for section in sections.values() for finding in section.findings]
    templates = resources.files("avl_reports") / "templates"
    return environment.get_template("page.html").render(
        title=heading(run, title),
        lead=LEAD,
        verdicts=verdicts(len(findings)),
        reading=READING,
        facts=facts(run),
        glance=_glance(sections),
        sections=[_view(name, section, svgs) for name, section in sections.items()],
        findings=findings,
        missing=[(name.removeprefix("fig_"), reason) for name, reason in missing.items()],
        samples=_samples(run),
        n=run.n,
        provenance=provenance(run),
        commands=list(commands),
        footer=(
            f"Made by avl from {run.n} recorded samples. The folder this page was made in also"
            " holds every figure as PDF, SVG and PNG, the numbers and the recording."
        ),
        # These two enter unescaped; they come from the package, not from a recording.
        css=(templates / "page.css").read_text("utf-8"),
        script=(templates / "page.js").read_text("utf-8"),
        # Compressed, the library takes a third of its size; the script of the page unpacks it.
        plotly=_packed(draw_plotly.library().encode()),
        svgs=svgs,
        colours=json.dumps(_colours()),
    )


GLANCE = ("modality", "overlay", "frontier", "policies", "coverage")
"""Figures of the summary on top, in the order in which they are looked for."""
GLANCED = 3


def _glance(sections: Mapping[str, Section]) -> list[dict[str, Any]]:
    """The first panel, of pictures one with a map, of the first figures of `GLANCE` there are."""
    figures = {section.figure.name: section for section in sections.values()}
    found: list[dict[str, Any]] = []
    for name in GLANCE:
        if name not in figures or len(found) == GLANCED:
            continue
        section = figures[name]
        # Pictures without a map only show the question.
        panels = [
            panel
            for panel in section.figure.panels
            if not isinstance(panel, Overlay) or panel.patches is not None
        ]
        if panels:
            plot = _plot(panels[0], f"glance-{name}")
            found.append({"plot": plot, "question": section.question, "name": name})
    return found


def _packed(data: bytes) -> str:
    """Base64 of the gzip, the same for the same content."""
    # gzip writes the time into its header unless told otherwise.
    return base64.b64encode(gzip.compress(data, mtime=0)).decode("ascii")


def _view(name: str, section: Section, svgs: Mapping[str, str]) -> dict[str, Any]:
    """What the template shows of a section."""
    figure = section.figure
    moving = () if section.moving is None else (section.moving,)
    return {
        "question": section.question,
        "text": section.text,
        "figure": figure,
        "findings": section.findings,
        "moving": [_plot(panel, f"moving-{figure.name}") for panel in moving],
        "groups": _groups(figure),
        "legend": _legend(figure),
        "classes": _classes(figure),
        "table": section.table,
        "csv": (
            # Inside the page, because it may be sent without its folder.
            "data:text/csv;base64," + base64.b64encode(csv_text(figure).encode()).decode("ascii")
        ),
        "drawn": figure.name in svgs,
        "script": f"avl_reports.{name}",
    }


def _plot(panel: Panel, name: str) -> dict[str, str]:
    """One plot: its place on the page and its data.

    Pictures keep their proportions, charts their height.
    """
    plot = draw_plotly.draw(panel, titled=False)
    if isinstance(panel, Overlay) and panel.classes:
        plot.update_layout(showlegend=False)  # the figure's own legend stands below all pictures
    size = f"height: {plot.layout.height}px"
    if isinstance(panel, Overlay):
        # A picture is (height, width, 3).
        size = f"aspect-ratio: {panel.picture.shape[1]} / {panel.picture.shape[0]}"
    title = "" if isinstance(panel, Animation) else panel.title
    # Maps with named columns, of words or policies for example, take the whole width.
    wide = isinstance(panel, Heat) and panel.x.ticks is not None
    return {
        "id": f"plot-{name}",
        "title": title,
        "size": size,
        "json": draw_plotly.as_json(plot),
        "kind": "wide" if wide else "",
    }


def _groups(figure: Figure) -> list[dict[str, Any]]:
    """The panels in groups that the page lays out alike: pictures, or charts, that follow."""
    numbered = list(enumerate(figure.panels))
    groups = []
    for pictures, found in groupby(numbered, lambda entry: isinstance(entry[1], Overlay)):
        plots = [_plot(panel, f"{figure.name}-{number}") for number, panel in found]
        # A chart alone does not take the whole width, unless it is one of those that need it.
        kind = "pictures" if pictures else "single" if len(plots) == 1 else "charts"
        groups.append({"kind": kind, "plots": plots})
    return groups


def _legend(figure: Figure) -> str:
    """The scale that the pictures of a figure share, in words."""
    scales = {
        (p.value.text, p.value.limits)
        for p in figure.panels
        if isinstance(p, Overlay) and not p.classes
    }
    # Pictures on different scales have no common sentence.
    if len(scales) != 1:
        return ""
    text, limits = scales.pop()
    return (
        ""
        if limits is None
        else f"Opacity of the amber patches: {text}, {limits[0]:.2g} to {limits[1]:.2g} or more."
    )


def _classes(figure: Figure) -> list[tuple[str, str]]:
    """Name and colour of the classes that the pictures of a figure show."""
    names = next((p.classes for p in figure.panels if isinstance(p, Overlay) and p.classes), ())
    fills = zip(palette.CLASS_COLOURS, palette.CLASS_OPACITY, names, strict=False)
    return [
        (name, palette.translucent(colour, max(0.8, opacity))) for colour, opacity, name in fills
    ]


def _samples(run: Run) -> list[dict[str, str]]:
    shown = []
    for example in run.examples[:SAMPLES_SHOWN]:
        fields = {
            key: getattr(example, key) for key in ("name", "task", "prompt", "answer", "truth")
        }
        shown.append(
            {**fields, "picture": "" if example.picture is None else data_uri(example.picture, 96)}
        )
    # Without any known question the table would be names alone.
    return shown if any(sample["prompt"] for sample in shown) else []


def _colours() -> list[tuple[str, str]]:
    """Pairs of light and dark colours, as hexadecimal numbers and as the start of rgba(...)."""
    pairs = []
    for light, dark in palette.dark_pairs():
        pairs.append((light, dark))
        # The page exchanges colours in the text of the plots, where translucent ones are written as
        # rgba with an opacity of their own behind.
        starts = ["rgba({},{},{},".format(*palette.rgb(colour)) for colour in (light, dark)]
        pairs.append((starts[0], starts[1]))
    return pairs
