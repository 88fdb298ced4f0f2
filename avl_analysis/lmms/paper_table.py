"""A folder of `avl eval` as a table beside the numbers that a paper reports.

    python -m avl_analysis.lmms.paper_table eval --paper docs/howto/a-vl-paper.json

The paper's numbers are entered by hand, with the place they stand at; none are filled in here. What
is not entered is printed as "not entered".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from avl_analysis.errors import InputError, blamed_on_input
from avl_analysis.lmms.plugin import STOCK
from avl_analysis.lmms.results import COSTS, newest_result, table

NOT_ENTERED = "not entered"


@dataclass(frozen=True)
class PaperNumbers:
    """What a paper reports.

    Attributes:
        source: the paper, with table and page.
        scores: folder of a policy -> column of the table, such as "mme mme_perception_score" ->
            number.
    """

    source: str
    scores: Mapping[str, Mapping[str, float]]


def read_paper(path: Path) -> PaperNumbers:
    """The numbers that were entered in a JSON file, {"source": ..., "scores": {...}}.

    Raises:
        InputError: no such file, another content, or numbers without a source.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}; docs/howto/a-vl-paper.json is an empty one")
    with blamed_on_input(f"{path} does not hold a paper's numbers"):
        content = json.loads(path.read_text(encoding="utf-8"))
        scores = {
            str(policy): {str(column): float(value) for column, value in entered.items()}
            for policy, entered in content["scores"].items()
        }
        source = str(content["source"])
    if any(scores.values()) and not source.strip():
        raise InputError(
            f"{path} holds numbers without a source: enter table and page of the paper"
        )
    return PaperNumbers(source, scores)


def result_files(folder: Path) -> dict[str, Path]:
    """Folder of each policy below a folder of `avl eval` -> its newest result.

    Raises:
        InputError: none is there, or not the one without a policy.
    """
    found = {
        child.name: result
        for child in sorted(folder.iterdir() if folder.is_dir() else ())
        if child.is_dir() and (result := newest_result(child)) is not None
    }
    if STOCK not in found:
        raise InputError(
            f"{folder} has no results without a policy ({folder / STOCK}): run avl eval with --out"
            f" {folder} first"
        )
    # The entry is taken out before the others are listed, so that it stands first and once.
    return {STOCK: found.pop(STOCK), **found}


def beside_paper(measured: pd.DataFrame, paper: PaperNumbers) -> pd.DataFrame:
    """The table with a column "... in the paper" behind every score.

    Args:
        measured: of `results.table`.
        paper: what was entered.

    Raises:
        InputError: numbers of policies or scores that were not measured.
    """
    scores = [
        column
        for column in measured.columns
        if column not in ("questions", *COSTS.values()) and not column.endswith(" kept")
    ]
    for policy, entered in paper.scores.items():
        unknown = [policy] if policy not in measured.index else sorted({*entered} - {*scores})
        if unknown:
            raise InputError(
                f"the paper's numbers name {unknown[0]!r}, which was not measured; measured are"
                f" {', '.join([*map(str, measured.index), *scores])}"
            )
    frame = measured.copy()
    for column in reversed(scores):
        entered_here = [
            paper.scores.get(str(policy), {}).get(column, NOT_ENTERED) for policy in frame.index
        ]
        frame.insert(int(frame.columns.get_loc(column)) + 1, f"{column} in the paper", entered_here)
    return frame


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it beside the results."""
    parser = argparse.ArgumentParser(
        prog="python -m avl_analysis.lmms.paper_table",
        description="Results of avl eval beside the numbers that a paper reports.",
    )
    parser.add_argument("folder", type=Path, help="what avl eval wrote (--out)")
    parser.add_argument("--paper", type=Path, required=True, help="JSON file of entered numbers")
    given = parser.parse_args(arguments)
    try:
        paper = read_paper(given.paper)
        frame = beside_paper(table(result_files(given.folder), reference=STOCK), paper)
    # InputError is a ValueError, too.
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    frame.to_csv(given.folder / "paper-table.csv", index_label="policy")
    print(frame.round(4).to_string())
    print(f"paper: {paper.source or NOT_ENTERED}; also in {given.folder / 'paper-table.csv'}")


if __name__ == "__main__":
    main()
