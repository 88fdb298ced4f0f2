"""The committed reference report: a report folder without what is large or can be drawn again.

    avl report --out out/report && python -m avl_reports.reference out/report

builds reports/reference from the recording and the other measurements in out/report: the page, the
document, every figure's numbers and caption, the animation, and the small measurements (silenced
heads, accuracy against bytes). Recording, comparison and drawn figures stay behind; other files
beside the reference stay as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from avl_analysis.errors import InputError
from avl_analysis.evaluation.comparison import load_comparison
from avl_analysis.heads.ablation import load_ablation
from avl_analysis.recordings.recording import load_recording
from avl_reports.build import Report, build
from avl_reports.frontiers import load_frontier
from avl_reports.further import KINDS, found_in

FOLDER = Path(__file__).parents[1] / "reference"
_LARGE = ("run.nc", "compare.nc", *(kind.file for kind in KINDS.values()))
_ANIMATION = "sets.webp"


def condense(source: Path, target: Path = FOLDER, frontier: Path | None = None) -> Report:
    """Build the reference report.

    Args:
        source: a folder that `avl report` wrote.
        target: folder to write; what an earlier reference left there is replaced, other files stay.
        frontier: accuracy against bytes, if it is not in `source`.

    Raises:
        InputError: `source` is no report.
    """
    about = source / "provenance.json"
    if not about.is_file():
        raise InputError(f"{source} is no folder that avl report wrote: it has no provenance.json")
    known = json.loads(about.read_text(encoding="utf-8"))
    # Others in the folder are of an earlier report. By length first: ablation.json,
    # ablation-2.json, ..., ablation-10.json.
    names = known.get("measurements") or [path.name for path in source.iterdir()]
    files = [source / name for name in sorted(names, key=lambda name: (len(name), name))]
    comparison, held = source / "compare.nc", source / "frontier.jsonl"
    silenced = [path for path in files if path.name.startswith("ablation")]
    if frontier is None and held in files:
        frontier = held
    # Drawings that an earlier report left here would be put into the new page.
    shutil.rmtree(target / "figures", ignore_errors=True)
    built = build(
        load_recording(source / "run.nc"),
        target,
        comparison=load_comparison(comparison) if comparison in files else None,
        ablations=[load_ablation(path) for path in silenced],
        frontier=None if frontier is None else load_frontier(frontier),
        further=found_in(files),
        title=known["title"],
        # Those that measured, not the one that condenses.
        commands=known["commands"],
        formats=(),
    )
    for name in _LARGE:
        # `build` writes everything it was given; what is large goes again.
        (target / name).unlink(missing_ok=True)
    # Without formats no animation is drawn, so the one of the source is taken.
    if (moving := source / "figures" / _ANIMATION).exists():
        shutil.copyfile(moving, target / "figures" / _ANIMATION)
    return built


def main(arguments: Sequence[str] | None = None) -> None:
    """Renew the reference report from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m avl_reports.reference", description="Renew the reference report."
    )
    parser.add_argument("source", type=Path, help="folder that avl report wrote")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--frontier", type=Path, help="file of avl frontier")
    given = parser.parse_args(arguments)
    try:
        built = condense(given.source, given.out, given.frontier)
    # InputError and NotMeasured are ValueErrors.
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    size = sum(path.stat().st_size for path in given.out.rglob("*") if path.is_file())
    print(f"{built.page}, {size / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
