"""The report for print: findings, every figure on a page of its own with its caption, provenance.

One PDF.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from avl_analysis.figures.draw_matplotlib import Paragraph, figure_pages, save_document, text_pages
from avl_reports.facts import LEAD, READING, facts, heading, provenance, verdicts
from avl_reports.findings import Finding
from avl_reports.run import Run, Section


def write_document(
    run: Run,
    sections: Mapping[str, Section],
    path: Path,
    *,
    title: str = "",
    commands: Sequence[str] = (),
) -> Path:
    """Write the PDF; sections in the order of the mapping."""
    pages = text_pages([*_cover(run, sections, title)])
    for number, section in enumerate(sections.values(), 1):
        # Question, how to read it and verdicts go above the figure; the table goes below it.
        above = [Paragraph(f"{number}  {section.question}", size=13, bold=True, after=0.14)]
        above += [Paragraph(section.text, muted=True)] if section.text else []
        above += [paragraph for finding in section.findings for paragraph in _judged(finding)]
        pages += figure_pages(section.figure, above, _table(section))
    pages += text_pages(_end(run, commands))
    return save_document(pages, path, title=heading(run, title))


def _cover(run: Run, sections: Mapping[str, Section], title: str) -> list[Paragraph]:
    words = [
        Paragraph(heading(run, title), size=18, bold=True, after=0.15),
        Paragraph(LEAD, size=9.5, after=0.15),
    ]
    words.append(
        Paragraph(
            "   ".join(f"{name}: {value}" for name, value in facts(run)), muted=True, after=0.3
        )
    )
    # All verdicts stand on the cover, and each again above its figure.
    findings = [finding for section in sections.values() for finding in section.findings]
    if findings:
        words += [
            Paragraph("What was found", size=13, bold=True),
            Paragraph(verdicts(len(findings)), muted=True, after=0.15),
        ]
        words += [paragraph for finding in findings for paragraph in _judged(finding)]
    return words


def _judged(finding: Finding) -> list[Paragraph]:
    return [
        Paragraph(f"{finding.verdict.value.upper()}: {finding.choice}", bold=True, after=0.02),
        Paragraph(f"{finding.measured} Rule: {finding.rule}.", indent=0.2, after=0.1),
    ]


_ROWS = 40
"""Rows of a table that are printed; longer ones would fill pages with small print."""


def _table(section: Section) -> list[Paragraph]:
    """A table as lines of "heading value", since a page is narrow."""
    if not section.table:
        return []
    # The first column names the row, so its heading is not repeated in every line.
    header, *rows = section.table
    if len(rows) > _ROWS:
        name = f"figures/{section.figure.name}_table.csv"
        return [Paragraph(f"The table of {len(rows)} rows is {name} beside this document.", size=8)]
    lines = [
        f"{row[0]}:  " + ";  ".join(f"{h} {v}" for h, v in zip(header[1:], row[1:], strict=True))
        for row in rows
    ]
    return [Paragraph(line, size=7, after=0.04) for line in lines]


def _end(run: Run, commands: Sequence[str]) -> list[Paragraph]:
    words = [Paragraph("Provenance", size=13, bold=True)]
    words += [
        Paragraph(f"{name}: {value}", size=7.5, after=0.03) for name, value in provenance(run)
    ]
    if commands:
        words.append(Paragraph("How to reproduce", size=13, bold=True))
        words += [Paragraph(command, size=8) for command in commands]
    return [*words, Paragraph("How to read it", size=13, bold=True), Paragraph(READING)]
