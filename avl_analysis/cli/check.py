"""`avl models --check`.

What is true of every model type of the installed transformers, found out on tiny models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from avl_analysis.errors import InputError
from avl_analysis.files import write_text


def check_types(names: Sequence[str] | None, write: Path | None) -> None:
    """Check types, print their table, and renew the committed one if asked to.

    Raises:
        InputError: a type that transformers does not register, or a file without a table.
        typer.Exit: with code 1 if something that should hold does not.
    """
    from avl_analysis.cli.options import progress
    from avl_analysis.conformance.build import model_types
    from avl_analysis.conformance.recording import Mismatch
    from avl_analysis.conformance.table import MARK, Row, check, counts, markdown

    known = model_types()
    if unknown := sorted(set(names or ()) - set(known)):
        raise InputError(
            f"transformers registers no image-text-to-text type {', '.join(unknown)}; its types are"
            f" {', '.join(known)}"
        )
    if write is not None and names:
        raise InputError("--write renews the whole table; leave the type names out")
    if write is not None and (not write.is_file() or MARK not in write.read_text(encoding="utf-8")):
        raise InputError(
            f"{write} is not a file with the line {MARK}, behind which the table stands"
        )
    rows: list[Row] = []
    failures: list[str] = []
    with progress("checking", unit="types") as advance:
        for done, name in enumerate(names or known):
            advance(done, len(names or known), name)
            try:
                rows.append(check(name))
            except Mismatch as mismatch:
                failures.append(f"{name}: {mismatch}")
    table = Table(box=None)
    for heading in ("type", "recorded", "adapted", "picture map", "pixels", "video"):
        # In a narrow terminal names go on in the next line, uncut.
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*astuple(row))
    Console().print(table, counts(rows), *failures, sep="\n")
    if failures:
        raise typer.Exit(1)
    if write is not None:
        text = write.read_text(encoding="utf-8").split(MARK)[0]
        write_text(write, f"{text}{MARK}\n\n{markdown(rows)}")
