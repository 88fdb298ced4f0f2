"""What several commands share: their options, loading a model, progress, and checks of --out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from avl_analysis.errors import InputError
from avl_analysis.files import check_writable

if TYPE_CHECKING:
    from avl_analysis.corpus.questions import Sample
    from avl_analysis.models.loading import VLM

Model = Annotated[
    str, typer.Option(help="scenes (the embedded model), a model folder, or a hub id.")
]
Download = Annotated[
    bool,
    typer.Option(
        "--download", help="Allow fetching a hub id; otherwise only this machine is searched."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16 or auto. Default: float32 on a CPU, else auto."),
]
Device = Annotated[str | None, typer.Option(help="Torch device. Default: cuda where there is one.")]
Attention = Annotated[
    str, typer.Option(help="Attention backend of transformers: sdpa, eager, flash_attention_2, ...")
]
Tasks = Annotated[list[str] | None, typer.Option(help="Tasks of the scenes; repeat for several.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Questions = Annotated[
    Path | None,
    typer.Argument(help="JSONL file, one {image, prompt, answer} per line. Default: drawn scenes."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions per pass.")]
PerTask = Annotated[int, typer.Option(min=1, help="Drawn scenes per task.")]
NetCDFFile = Annotated[Path, typer.Option(help="netCDF file to write.")]


def load(
    name: str, *, dtype: str | None, device: str | None, attention: str, download: bool
) -> VLM:
    """`load_model` with the options of the command line, saying that it is at work."""
    # On stderr, and only on a terminal, so that output sent to a file holds results alone.
    console = Console(stderr=True)
    with console.status(f"loading {plain(name)}") if console.is_terminal else _nothing():
        from avl_analysis.models.loading import load_model

        return load_model(
            name, dtype=dtype, device=device, attn_implementation=attention, allow_download=download
        )


MOST_NUMBERS = 1_000_000
"""Numbers an option may list; prompts have fewer tokens."""


def printable(text: str) -> str:
    """The text with every character that a terminal would not show, or would obey, written out."""
    return "".join(
        char
        if char.isprintable() or char in "\n\t"
        else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def plain(text: str) -> str:
    """Text from outside (names of models, samples, policies) for rich: no markup in it counts."""
    return escape(printable(text))


def parse_numbers(text: str, option: str) -> list[int]:
    """Whole numbers and ranges, e.g. "0,4-7" as [0, 4, 5, 6, 7].

    Raises:
        InputError: anything else.
    """
    numbers: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        # Without a match the range is empty, which the next line refuses.
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise InputError(f"{option} {shown!r} is not a list of numbers: write it like 0,4-7")
        # Before the range is built, so that 0-999999999 takes no memory.
        if last - first + len(numbers) >= MOST_NUMBERS:
            raise InputError(f"{option} lists more than {MOST_NUMBERS} numbers: name fewer")
        numbers += range(first, last + 1)
    return numbers


def parse_floats(text: str, option: str) -> list[float]:
    """Numbers with commas between them, e.g. "1,0.5" as [1.0, 0.5].

    Raises:
        InputError: anything else.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"{option} {text!r} is not a list of numbers: write it like 1,0.5"
        ) from error


@contextmanager
def progress(what: str, unit: str = "tokens") -> Iterator[Callable[..., None]]:
    """A progress bar on stderr where that is a terminal.

    Yields:
        `advance(done, total, what=what)`.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
    )
    console = Console(stderr=True)
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        # How much there is to do is known with the first call of `advance`.
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int, what: str = what) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield advance


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def check_target(out: Path, force: bool) -> None:
    """Refuse a file that cannot or should not be written, before anything is computed.

    Raises:
        InputError: an existing file without --force, and whatever `check_writable` refuses.
    """
    check_writable(out)
    if out.exists() and not force:
        raise InputError(f"{out} exists already: choose another --out, or replace it with --force")


def check_netcdf(out: Path, force: bool) -> None:
    """Refuse a result file that does not end in .nc or cannot be written.

    Args:
        out: where a command writes what it measured.
        force: whether an existing file may be replaced.

    Raises:
        InputError: another ending, an existing file without `force`, no right to write.
    """
    if out.suffix != ".nc":
        raise InputError(f"--out {out}: the file's name must end in .nc")
    check_target(out, force)


def read_or_draw(
    data: Path | None, scenes: int, task: list[str] | None, split: str
) -> list[Sample]:
    """The questions of a file, or drawn ones.

    Args:
        data: the file; None draws.
        scenes: drawn scenes of each task.
        task: names of tasks; None takes all.
        split: the split that is drawn from.

    Raises:
        InputError: a file that cannot be read, an unknown task, a task beside a file.
    """
    from avl_analysis.corpus.questions import read_samples, scene_samples

    if data is None:
        return scene_samples(scenes, task, split=split)
    if task:
        raise InputError(
            f"--task chooses among drawn scenes, but the questions come from {data}: leave one out"
        )
    return read_samples(data)
