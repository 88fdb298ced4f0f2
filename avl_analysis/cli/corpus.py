"""`avl record --data` and `--workers`.

Many questions, recorded so that nothing is lost when it is interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from avl_analysis.errors import InputError

if TYPE_CHECKING:
    from avl_analysis.corpus.questions import Sample


def read(data: Path, image: Sequence[str], scenes: int, task: str | None) -> list[Sample]:
    """The questions of a file; nothing else may say what to ask."""
    from avl_analysis.corpus.questions import read_samples

    if image or scenes or task is not None:
        raise InputError(
            f"the questions come from {data}: leave out pictures, questions, --scenes and --task"
        )
    return read_samples(data)


def record_many(
    model: str,
    samples: Sequence[Sample],
    out: Path,
    load: Mapping[str, Any],
    *,
    force: bool,
    workers: int,
    address: str | None,
    options: Mapping[str, Any],
) -> None:
    """`record_corpus` with a progress bar, and a word about what failed."""
    from avl_analysis.cli.options import printable, progress
    from avl_analysis.corpus.record_corpus import record_corpus

    try:
        with progress("recording", unit="samples") as advance:
            result = record_corpus(
                model,
                samples,
                out,
                load=load,
                workers=workers,
                address=address,
                replace=force,
                progress=advance,
                **options,
            )
    # Raised again, so that the command ends with the exit code of an interruption.
    except KeyboardInterrupt:
        typer.echo(
            f"what was recorded is kept in {out}.parts; the same command goes on from there",
            err=True,
        )
        raise
    for one in result.failed:
        typer.echo(printable(f"{one.id} was left out: {one.reason}"), err=True)
    left_out = f" ({len(result.failed)} left out)" if result.failed else ""
    typer.echo(
        printable(
            f"{result.recorded} sample(s) of {model} in {out}{left_out}; look at it with: avl stats"
            f" {out}"
        )
    )
