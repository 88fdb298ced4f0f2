"""What every figure script does when it is run alone: `python -m reports.fig_modality run.nc [folder]`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from avl_analysis.figures import Animation, Figure
from avl_analysis.figures.draw_matplotlib import FORMATS, save, save_animation
from avl_analysis.figures.spec import rows
from reports.run import Run, Section, load_run


def write_figure(figure: Figure, folder: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Draw a figure into `folder` as files, its numbers and its caption beside it; animations become GIF and WebP
    too."""
    paths = save(figure, folder, formats)
    for number, panel in enumerate(figure.panels):
        if isinstance(panel, Animation):
            suffix = "" if number == 0 else f"_{number}"
            paths += [save_animation(panel, folder / f"{figure.name}{suffix}.{kind}") for kind in ("gif", "webp")]
    numbers = folder / f"{figure.name}.csv"
    table = rows(figure)
    with numbers.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]) if table else ["panel"])
        writer.writeheader()
        writer.writerows(table)
    caption = folder / f"{figure.name}.txt"
    caption.write_text(f"{figure.title}. {figure.caption.text}\n", encoding="utf-8")
    return [*paths, numbers, caption]


def run_script(section: Callable[[Run], Section], arguments: Sequence[str] | None = None) -> None:
    """Draw one figure from the command line; a mistake is one line on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) not in (1, 2):
        print("usage: python -m reports.fig_<name> run.nc [output folder]", file=sys.stderr)
        sys.exit(2)
    try:
        made = section(load_run(given[0]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for path in write_figure(made.figure, Path(given[1] if len(given) == 2 else "figures")):
        print(path)
    for finding in made.findings:
        print(f"{finding.verdict.value}: {finding.text}")
