"""Builds a report: one page, one document, a folder of figures, and the numbers behind them.

    out/index.html          everything in one file that works without a network
    out/report.pdf          the same for print
    out/figures/<name>.*    each figure as SVG, PDF and PNG, its numbers as CSV, its caption as
                            text, its animation
    out/numbers.json        every number of every figure with the findings
    out/provenance.json     the commands that make it again, and everything the recording says about
                            where it comes from
    out/run.nc              the recording, from which every figure can be drawn again; likewise
                            compare.nc, ablation.json, ablation-2.json, frontier.jsonl and the files
                            of `further.KINDS` where these were measured

It decides which figures are asked and writes files; what a figure shows is said in the fig_*.py
modules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import xarray as xr

from avl_analysis.evaluation import frontier as frontier_file
from avl_analysis.evaluation.comparison import Comparison
from avl_analysis.figures.draw_matplotlib import FORMATS
from avl_analysis.figures.spec import rows
from avl_analysis.files import write_text
from avl_analysis.heads.ablation import Ablation
from avl_analysis.recordings.recording import Recording
from avl_reports import (
    fig_ablation,
    fig_core_age,
    fig_coverage,
    fig_errors,
    fig_frontier,
    fig_grounding,
    fig_head_maps,
    fig_heads,
    fig_knockout,
    fig_layer_agreement,
    fig_localisation,
    fig_modality,
    fig_overlay,
    fig_patch_words,
    fig_persistence,
    fig_policies,
    fig_position_bias,
    fig_ppci,
    fig_prefill_recall,
    fig_relevance,
    fig_sets,
    fig_sink_tokens,
    fig_sinks,
    fig_sparsity,
    fig_text_age,
    fig_values,
    fig_video,
    pair,
)
from avl_reports.document import write_document
from avl_reports.facts import provenance
from avl_reports.frontiers import Frontier
from avl_reports.further import KINDS
from avl_reports.page import render
from avl_reports.run import NotAsked, NotMeasured, Run, Section
from avl_reports.script import write_section

FIGURES: tuple[ModuleType, ...] = (
    fig_modality,
    fig_overlay,
    fig_video,
    fig_localisation,
    fig_relevance,
    fig_grounding,
    fig_patch_words,
    fig_errors,
    fig_persistence,
    fig_sparsity,
    fig_coverage,
    fig_text_age,
    fig_prefill_recall,
    fig_ppci,
    fig_core_age,
    fig_sets,
    fig_heads,
    fig_head_maps,
    fig_ablation,
    fig_knockout,
    fig_sinks,
    fig_sink_tokens,
    fig_position_bias,
    fig_layer_agreement,
    fig_values,
    fig_policies,
    fig_frontier,
)
"""Figure modules in the order of the report; each has `QUESTION` and `section(run)`."""


@dataclass(frozen=True)
class Report:
    """What was built.

    The page, the folder, the figures' sections, and why others are missing (name -> reason).
    """

    page: Path
    folder: Path
    sections: tuple[Section, ...]
    missing: dict[str, str]


def build(
    recording: Recording,
    out: Path | str,
    *,
    comparison: Comparison | None = None,
    ablations: Sequence[Ablation] = (),
    frontier: Frontier | None = None,
    further: Mapping[str, xr.Dataset] | None = None,
    beside: Recording | None = None,
    names: Sequence[str] = ("first", "second"),
    title: str = "",
    commands: Sequence[str] = (),
    figures: Sequence[ModuleType] = FIGURES,
    formats: tuple[str, ...] = FORMATS,
    document: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Write the report of a recording into the folder `out`, which is made if needed.

    Args:
        recording: at least one sample.
        out: the folder.
        comparison: policies against the full cache; figures without their numbers are left out.
        ablations: heads of the same model silenced.
        frontier: accuracy of the same model against bytes.
        further: other measurements of the same model by name, see `avl_reports.further`.
        beside: another recording, to be shown to the right of the first one, panel by panel.
        names: files of the two, which name them where their models and policies are the same.
        title: heading of the page; by default it names the model.
        commands: command lines that reproduce the report, as printed on the page.
        figures: which figure modules to ask.
        formats: in which formats figures are written, of "png", "svg" and "pdf".
        document: whether the PDF is written.
        progress: called with (parts done, parts in all, name of the next part).

    Raises:
        NotMeasured: the recording is empty or answers none of the figures.
    """
    # Run refuses measurements of another model, before anything is written.
    run = Run(recording, comparison, ablations, frontier, further)
    # The second recording has no further measurements, so figures that need a comparison, an
    # ablation or a frontier are listed as missing when two recordings are shown.
    runs = [run] if beside is None else [run, Run(beside)]
    called = pair.labels(runs, names) if len(runs) > 1 else []
    title = title or (f"Attention report: {' and '.join(called)}" if called else "")
    # What `progress` names, in the order of the work. The JSON files are written under the name of
    # the part before them.
    parts = [
        *(module.__name__.rpartition(".")[2] for module in figures),
        "recording",
        "document",
        "page",
    ]

    def say(part: str) -> None:
        if progress is not None:
            progress(parts.index(part), len(parts), part.removeprefix("fig_"))

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Section] = {}
    missing: dict[str, str] = {}
    for module in figures:
        name = module.__name__.rpartition(".")[2]
        say(name)
        try:
            sections[name] = (
                module.section(run) if len(runs) == 1 else pair.section(module, runs, called)
            )
        # NotAsked is a NotMeasured, so it has to be caught first: such a figure is not listed as
        # missing.
        except NotAsked:
            continue
        except NotMeasured as error:
            missing[name] = str(error)
            continue
        # The page reads the SVG files written here, so figures come before the page.
        write_section(sections[name], folder / "figures", formats)
    if not sections:
        raise NotMeasured(
            f"the recording answers no figure of the report: {'; '.join(missing.values())}"
        )
    say("recording")
    # In a folder that is used again there may be measurements of an earlier report, too.
    files = ["run.nc"]
    recording.save(folder / "run.nc")
    if beside is not None:
        files.append("beside.nc")
        beside.save(folder / "beside.nc")
    if comparison is not None:
        files.append("compare.nc")
        comparison.save(folder / "compare.nc")
    for number, ablation in enumerate(ablations, 1):
        # `avl report` prints the same names in the command that draws the report again; the two
        # must agree (command.py).
        files.append("ablation.json" if number == 1 else f"ablation-{number}.json")
        ablation.save(folder / files[-1])
    if frontier is not None:
        files.append("frontier.jsonl")
        frontier_file.write(
            folder / "frontier.jsonl", [dict(line) for line in frontier.lines], frontier.about
        )
    for name, dataset in (further or {}).items():
        files.append(KINDS[name].file)
        KINDS[name].write(dataset, folder / KINDS[name].file)
    # Every number of every figure by the name of its module, "fig_modality" for example.
    numbers = {name: _numbers(section) for name, section in sections.items()}
    write_text(folder / "numbers.json", json.dumps(_plain(numbers), indent=1))
    about = {
        "title": title,
        "commands": list(commands),
        "measurements": files,
        "recording": dict(provenance(run)),
    }
    write_text(folder / "provenance.json", json.dumps(about, indent=1) + "\n")
    if document:
        say("document")
        write_document(run, sections, folder / "report.pdf", title=title, commands=commands)
    say("page")
    page = folder / "index.html"
    write_text(
        page,
        render(
            run,
            sections,
            missing,
            title=title,
            commands=commands,
            # Without "svg" among the formats, such files are those of an earlier report.
            drawings=(_drawings(folder / "figures", sections.values()) if "svg" in formats else {}),
        ),
    )
    return Report(page, folder, tuple(sections.values()), missing)


def _drawings(folder: Path, sections: Iterable[Section]) -> dict[str, bytes]:
    """Name of a figure -> its SVG, as it was just written into `folder`."""
    names = [section.figure.name for section in sections]
    return {name: (folder / f"{name}.svg").read_bytes() for name in names}


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
    # Infinities as well: JSON has no number for them either.
    return None if isinstance(value, float) and not math.isfinite(value) else value
