"""What every figure script does when it is run alone.

`python -m avl_reports.fig_modality run.nc [--out folder]`.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from avl_analysis.figures import Figure
from avl_analysis.figures.draw_matplotlib import FORMATS, save, save_animation
from avl_analysis.figures.spec import rows
from avl_analysis.files import write_text
from avl_reports.run import Run, Section, load_run

MOVING = ("gif", "webp")
"""Formats an animation is written in."""


def write_section(section: Section, folder: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Write a section's figure into `folder`.

    Drawn, as numbers (CSV), its caption, its table and its animation.
    """
    figure = section.figure
    paths = save(figure, folder, formats)
    # No formats means no drawings, moving ones among them: numbers and words only.
    if section.moving is not None and formats:
        paths += [
            save_animation(section.moving, folder / f"{figure.name}.{kind}") for kind in MOVING
        ]
    numbers, caption = folder / f"{figure.name}.csv", folder / f"{figure.name}.txt"
    write_text(numbers, csv_text(figure))
    write_text(caption, f"{figure.title}. {figure.caption.text}\n")
    paths += [numbers, caption]
    if section.table:
        paths.append(folder / f"{figure.name}_table.csv")
        text = io.StringIO()
        # As `csv_text` ends its lines; the writer's own ending is that of Windows.
        csv.writer(text, lineterminator="\n").writerows(section.table)
        write_text(paths[-1], text.getvalue())
    return paths


def csv_text(figure: Figure) -> str:
    """Every number of a figure as CSV."""
    text, table = io.StringIO(), rows(figure)
    # A figure without numbers still gets a header, so that the file can be read as CSV.
    writer = csv.DictWriter(text, list(table[0]) if table else ["panel"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def run_script(section: Callable[[Run], Section], arguments: Sequence[str] | None = None) -> None:
    """Draw one figure from the command line; a mistake is one line on stderr and exit code 2."""
    # The first line of a figure module is its question, which --help then shows.
    parser = argparse.ArgumentParser(description=sys.modules[section.__module__].__doc__)
    parser.add_argument("recording", help="file written by avl record or avl report (run.nc)")
    parser.add_argument("--comparison", help="file written by avl compare --out compare.nc")
    parser.add_argument(
        "--ablation", action="append", default=[], help="file written by avl ablate; repeatable"
    )
    parser.add_argument("--frontier", help="file written by avl frontier")
    parser.add_argument(
        "--further",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="another measurement, e.g. knockout=knockout.nc; repeatable",
    )
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder to write into")
    given = parser.parse_args(arguments)
    try:
        run = load_run(
            given.recording, given.comparison, given.ablation, given.frontier, given.further
        )
        made = section(run)
    # InputError and NotMeasured are ValueErrors; line breaks go, so that the message is one line.
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    for path in write_section(made, given.out):
        print(path)
    for finding in made.findings:
        print(f"{finding.verdict.value}: {finding.text}")
