"""Builds a report: one page that works without a network, a folder of figures, and the numbers behind them.

    out/index.html          everything in one file: figures, findings, numbers, provenance
    out/figures/<name>.*    each figure as SVG, PDF and PNG, its numbers as CSV, its caption as text
    out/numbers.json        every number of every figure with the findings
    out/run.nc              the recording, from which every figure can be drawn again

The page is put together by a template that escapes everything; plots travel as JSON in which no "<" is left. Only what
this package brings itself (style, script, plotly.js) enters unescaped. A content security policy in the page forbids it
to load anything from anywhere, so it either works offline or not at all.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from avl_analysis.figures import Animation, Figure, Overlay, draw_plotly, palette
from avl_analysis.figures.draw_matplotlib import FORMATS
from avl_analysis.figures.pictures import data_uri
from avl_analysis.figures.spec import rows
from avl_analysis.recording import Recording
from reports import (
    fig_core_age,
    fig_coverage,
    fig_layer_agreement,
    fig_localisation,
    fig_modality,
    fig_overlay,
    fig_persistence,
    fig_position_bias,
    fig_ppci,
    fig_prefill_recall,
    fig_sinks,
    fig_sparsity,
    fig_text_age,
    fig_values,
)
from reports.run import NotMeasured, Run, Section
from reports.script import write_figure

FIGURES: tuple[ModuleType, ...] = (
    fig_modality,
    fig_overlay,
    fig_localisation,
    fig_persistence,
    fig_sparsity,
    fig_coverage,
    fig_text_age,
    fig_prefill_recall,
    fig_ppci,
    fig_core_age,
    fig_sinks,
    fig_position_bias,
    fig_layer_agreement,
    fig_values,
)
"""Figure modules in the order of the report; each has `QUESTION` and `section(run)`."""
SAMPLES_SHOWN = 24


@dataclass(frozen=True)
class Report:
    """What was built: the page, the folder, the figures' sections, and why others are missing (name -> reason)."""

    page: Path
    folder: Path
    sections: tuple[Section, ...]
    missing: dict[str, str]


def build(
    recording: Recording,
    out: Path | str,
    *,
    title: str = "",
    commands: Sequence[str] = (),
    figures: Sequence[ModuleType] = FIGURES,
    formats: tuple[str, ...] = FORMATS,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Write the report of a recording into the folder `out`, which is made if needed.

    Args:
        title: heading of the page; by default it names the model.
        commands: command lines that reproduce the report, as printed on the page.
        figures: which figure modules to ask.
        formats: in which formats figures are written, of "png", "svg" and "pdf".
        progress: called with the name of each file group before it is written.

    Raises:
        NotMeasured: the recording is empty or answers none of the figures.
    """
    run = Run(recording)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Section] = {}
    missing: dict[str, str] = {}
    for module in figures:
        name = module.__name__.rpartition(".")[2]
        if progress is not None:
            progress(name.removeprefix("fig_"))
        try:
            sections[name] = module.section(run)
        except NotMeasured as error:
            missing[name] = str(error)
            continue
        write_figure(sections[name].figure, folder / "figures", formats)
    if not sections:
        raise NotMeasured(f"the recording answers no figure of the report: {'; '.join(missing.values())}")
    if progress is not None:
        progress("page")
    recording.save(folder / "run.nc")
    numbers = {name: _numbers(section) for name, section in sections.items()}
    (folder / "numbers.json").write_text(json.dumps(_plain(numbers), indent=1), encoding="utf-8")
    page = folder / "index.html"
    page.write_text(render(run, sections, missing, title=title, commands=commands, formats=formats), encoding="utf-8")
    return Report(page, folder, tuple(sections.values()), missing)


def render(
    run: Run,
    sections: dict[str, Section],
    missing: dict[str, str],
    *,
    title: str = "",
    commands: Sequence[str] = (),
    formats: tuple[str, ...] = FORMATS,
) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("reports", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["close"] = lambda text: str(text).replace(" %", "\u00a0%")
    templates = resources.files("reports") / "templates"
    views = [_view(name, section, formats) for name, section in sections.items()]
    return environment.get_template("page.html").render(
        title=title or f"Attention report: {run.model}",
        lead=LEAD,
        facts=_facts(run),
        sections=views,
        findings=[finding for section in sections.values() for finding in section.findings],
        missing=[(name.removeprefix("fig_"), reason) for name, reason in missing.items()],
        samples=_samples(run),
        n=run.n,
        provenance=[(name.replace("_", " "), value) for name, value in _provenance(run)],
        commands=list(commands),
        footer=f"Made by avl from {run.n} recorded samples. Figures, numbers and the recording lie beside this page.",
        css=(templates / "page.css").read_text("utf-8"),
        script=(templates / "page.js").read_text("utf-8"),
        plotly=draw_plotly.library(),
        colours=json.dumps(_colours()),
    )


LEAD = (
    "Where a vision-language model looks while it reads a prompt and while it answers, measured layer by layer and "
    "head by head, and what that says about the choices made in A-VL (adaptive attention for large vision-language "
    "models, AAAI 2025)."
)


def _view(name: str, section: Section, formats: tuple[str, ...]) -> dict[str, Any]:
    """What the template shows of a section."""
    figure = section.figure
    plots = []
    for number, panel in enumerate(figure.panels):
        plot = draw_plotly.draw(panel, titled=False)
        height = f"height: {plot.layout.height}px"
        if isinstance(panel, Overlay):
            height = f"aspect-ratio: {panel.picture.shape[1]} / {panel.picture.shape[0]}"
        plots.append(
            {
                "id": f"plot-{figure.name}-{number}",
                "title": panel.title if not isinstance(panel, Animation) else "",
                "size": height,
                "json": draw_plotly.as_json(plot),
            }
        )
    return {
        "question": section.question,
        "text": section.text,
        "figure": figure,
        "findings": section.findings,
        "kind": _kind(figure),
        "plots": plots,
        "legend": _legend(figure),
        "csv": "data:text/csv;base64," + base64.b64encode(_csv(figure).encode()).decode("ascii"),
        "files": [f"figures/{figure.name}.{suffix}" for suffix in _suffixes(figure, formats)],
        "script": f"reports.{name}",
    }


def _kind(figure: Figure) -> str:
    """How the page lays the panels out."""
    if all(isinstance(panel, Animation) for panel in figure.panels):
        return "animated"
    if all(isinstance(panel, Overlay) for panel in figure.panels):
        return "pictures"
    return "single" if len(figure.panels) == 1 else "charts"


def _legend(figure: Figure) -> str:
    """The scale that the pictures of a figure share, in words."""
    scales = {(p.value.text, p.value.limits) for p in figure.panels if isinstance(p, Overlay) and not p.classes}
    if len(scales) != 1:
        return ""
    text, limits = scales.pop()
    return "" if limits is None else f"Opacity of the amber patches: {text}, {limits[0]:g} to {limits[1]:g} or more."


def _suffixes(figure: Figure, formats: tuple[str, ...]) -> tuple[str, ...]:
    moving = any(isinstance(panel, Animation) for panel in figure.panels)
    return (*formats, *(("gif", "webp") if moving else ()))


def _csv(figure: Figure) -> str:
    text = io.StringIO()
    table = rows(figure)
    writer = csv.DictWriter(text, list(table[0]) if table else ["panel"])
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def _numbers(section: Section) -> dict[str, Any]:
    return {
        "question": section.question,
        "caption": section.figure.caption.text,
        "findings": [
            {"choice": f.choice, "measured": f.measured, "rule": f.rule, "verdict": f.verdict.value}
            for f in section.findings
        ],
        "rows": rows(section.figure),
    }


def _plain(value: Any) -> Any:
    """NaN as null: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _facts(run: Run) -> list[tuple[str, str]]:
    attrs, recording = run.recording.attrs, run.recording
    sums = recording.tokens["modality_count"].sum("sample")
    phases = recording.tokens["phase"]
    shape = run["modality_mass"].sizes if "modality_mass" in recording.names else {}
    facts = [
        ("model", run.model),
        ("class", str(attrs.get("model_class", ""))),
        ("layers x heads", f"{shape['layer']} x {shape['head']}" if shape else ""),
        ("samples", str(run.n)),
        ("image tokens per sample", f"{float(sums.sel(key_modality='image')) / run.n:.0f}"),
        ("decode steps", f"{int((phases > 0).sum())}"),
        ("recorded", str(attrs.get("date", ""))[:10]),
    ]
    known = [example for example in run.examples if example.truth]
    if known:
        right = sum(example.correct for example in known)
        facts.insert(4, ("answers exactly right", f"{right} of {len(known)}"))
    return [(name, value) for name, value in facts if value]


def _provenance(run: Run) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in sorted(run.recording.attrs.items()) if str(value)]


def _samples(run: Run) -> list[dict[str, str]]:
    shown = []
    for example in run.examples[:SAMPLES_SHOWN]:
        fields = {key: getattr(example, key) for key in ("name", "task", "prompt", "answer", "truth")}
        shown.append({**fields, "picture": "" if example.picture is None else data_uri(example.picture, 96)})
    return shown if any(sample["prompt"] for sample in shown) else []


def _colours() -> list[tuple[str, str]]:
    """Pairs of light and dark colours, as hexadecimal numbers and as the start of rgba(...)."""
    pairs = []
    for light, dark in palette.dark_pairs():
        pairs.append((light, dark))
        starts = ["rgba({},{},{},".format(*palette.rgb(colour)) for colour in (light, dark)]
        pairs.append((starts[0], starts[1]))
    return pairs
