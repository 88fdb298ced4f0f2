"""`avl report`: record the model on drawn scenes, or take a recording made before, and build the report.

Registered with the command line through the entry point group "avl.commands", since `avl_analysis` may not import the
packages above it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from avl_analysis.errors import InputError

if TYPE_CHECKING:
    from avl_analysis.recording import Recording
    from avl_analysis.samples import Sample

SAMPLES = 60
"""Scenes a report records unless told otherwise: five of each of the twelve tasks."""
BATCH = 4
MAX_NEW_TOKENS = 96


def report(
    recording: Annotated[
        Path | None,
        typer.Argument(help="A recording made before; without one, the model is recorded on drawn scenes now."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder to write into; made if needed.")] = Path("report"),
    model: Annotated[str, typer.Option("--model", help="scenes, a folder, or a hub id.")] = "scenes",
    samples: Annotated[int, typer.Option("--samples", min=2, help="Drawn scenes to record.")] = SAMPLES,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which scenes; below 1,000,000 all are held out.")] = 7,
    title: Annotated[str, typer.Option("--title", help="Heading of the page.")] = "",
    download: Annotated[bool, typer.Option("--download", help="Allow fetching a hub id.")] = False,
) -> None:
    """Figures and findings about a model's attention: one page, and a folder of figures and numbers."""
    from reports.build import build

    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder to write the report into")
    console = Console(stderr=True)
    if recording is not None:
        from avl_analysis.recording import load_recording

        recorded = load_recording(recording)
        commands = [f"avl report {shlex.quote(str(recording))} --out {shlex.quote(str(out))}"]
    else:
        recorded = _record(model, samples, seed, download, console)
        commands = [f"avl report --model {shlex.quote(model)} --samples {samples} --seed {seed}"]
    commands.append(f"avl report {shlex.quote(str(out / 'run.nc'))}    # the same figures from the same recording")
    with _bar(console, "figures") as progress:
        task = progress.add_task("figures", total=None)
        built = build(
            recorded, out, title=title, commands=commands, progress=lambda name: progress.update(task, description=name)
        )
    for name, reason in built.missing.items():
        console.print(f"not shown: {name.removeprefix('fig_')} ({reason})", markup=False, highlight=False)
    for section in built.sections:
        for finding in section.findings:
            console.print(f"{finding.verdict.value:>14}  {finding.choice}", markup=False, highlight=False)
    print(built.page)


def _record(model: str, samples: int, seed: int, download: bool, console: Console) -> Recording:
    """Record the model answering drawn scenes, with a bar."""
    with console.status("loading the model"):
        from avl_analysis.corpus import record_samples
        from avl_analysis.models import load_model

        vlm = load_model(model, allow_download=download)
    asked = draw_samples(samples, seed)
    with _bar(console, "samples") as progress:
        task = progress.add_task("recording", total=samples)
        recorded = record_samples(
            vlm,
            asked,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=BATCH,
            on_token=lambda done, _: progress.update(task, completed=done),
        )
    recorded.attrs["data"] = f"{samples} drawn scenes of seed {seed}, all kinds of questions in turn"
    return recorded


def draw_samples(count: int, seed: int) -> list[Sample]:
    """`count` held-out scenes with the tasks in turn, sorted by task: answers of one batch are then about as long."""
    from avl_analysis.samples import scene_sample
    from avl_analysis.scenes import TASKS, generate

    drawn = [generate(seed, index, TASKS[index % len(TASKS)]) for index in range(count)]
    return [
        scene_sample(sample) for sample in sorted(drawn, key=lambda sample: (TASKS.index(sample.task), sample.index))
    ]


@contextmanager
def _bar(console: Console, unit: str) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress
