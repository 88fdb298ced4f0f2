"""`avl frontier`: every policy at every budget on the drawn scenes' tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avl_analysis.cli.options import (
    Force,
    Model,
    Tasks,
    check_target,
    parse_floats,
    progress,
)
from avl_analysis.errors import InputError

if TYPE_CHECKING:
    from avl_analysis.evaluation.frontier import FrontierSettings

EXAMPLES = """
Examples: [bold]avl frontier --out frontier.jsonl --scenes 200 --workers 2[/],
[bold]avl frontier --out quick.jsonl --scenes 8 --task colour --budgets 0.5,0.25[/],
[bold]avl frontier --show frontier.jsonl[/] (a table, and what beats what);
then [bold]avl report run.nc --frontier frontier.jsonl[/]
"""


def frontier(
    out: Annotated[Path | None, typer.Option(help="JSON-lines file to write.")] = None,
    show: Annotated[
        Path | None, typer.Option(help="Print the table of a file that was written before.")
    ] = None,
    model: Model = "scenes",
    scenes: Annotated[int, typer.Option(min=1, help="Drawn scenes of each task.")] = 200,
    task: Tasks = None,
    budgets: Annotated[
        str,
        typer.Option(
            help="Shares of the full cache's bytes, or, above 1, image tokens beside all text."
        ),
    ] = "1,0.75,0.5,0.35,0.25,0.1,128,64,32",
    options: Annotated[
        Path | None,
        typer.Option(
            help=(
                "File of policies' options beside the budget, as python -m"
                " avl_analysis.evaluation.search writes it. Default: their defaults."
            )
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per pass.")] = 16,
    seed: Annotated[int | None, typer.Option(help="First seed of the scenes.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the parts done so far. Default: OUT.work.")
    ] = None,
    force: Force = False,
) -> None:
    """Accuracy against measured bytes, for every policy and budget; goes on where it stopped."""
    from avl_analysis.corpus.sharded_run import NOTE
    from avl_analysis.evaluation import frontier as frontiers
    from avl_analysis.evaluation.frontier_table import show as table
    from avl_analysis.scenes import ALL_TASKS
    from avl_analysis.scenes.samples import split_of

    # Both or neither.
    if (out is None) == (show is None):
        raise InputError("pass either --out FILE to make a frontier or --show FILE to print one")
    if show is not None:
        typer.echo(table(frontiers.read(show)[1]))
        return
    assert out is not None
    check_target(out, force)
    if unknown := [name for name in task or () if name not in ALL_TASKS]:
        raise InputError(f"unknown task {unknown[0]!r}: choose among {', '.join(ALL_TASKS)}")
    settings = frontiers.FrontierSettings(
        model=model,
        tasks=tuple(task or ALL_TASKS),
        samples=scenes,
        budgets=tuple(parse_floats(budgets, "--budgets")),
        batch=batch_size,
        options="" if options is None else str(options),
        # Without the option the default of FrontierSettings holds.
        **({} if seed is None else {"seed": seed}),
    )
    for budget in settings.budgets:
        if not (0 < budget <= 1 or (budget > 1 and budget == int(budget))):
            raise InputError(
                f"--budgets: {budget:g} is not a share above 0 and at most 1, nor a whole number of"
                " image tokens above 1"
            )
    # The result is not used here: a file that cannot be read is refused before any work begins.
    frontiers.options_of(settings)
    folder = work or out.with_name(out.name + ".work")
    with progress("frontier", unit="parts") as advance:
        lines = frontiers.run(settings, folder, workers, advance)
    about = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    split = split_of(settings.seed) or f"none, seed {settings.seed}"
    frontiers.write(
        out,
        lines,
        {
            **about,
            "settings": repr(settings),
            "split": split,
            "scenes": scenes,
            "command": _command(out, settings),
        },
    )
    typer.echo(
        f"{len(lines)} points of {len(settings.tasks)} tasks with {scenes} scenes each"
        f" (questions of split {split}) in {out}; {folder} can be deleted now."
        f" Look at it with: avl frontier --show {out}"
    )


def _command(out: Path, settings: FrontierSettings) -> str:
    """The command that makes this file again."""
    tasks = " ".join(f"--task {name}" for name in settings.tasks)
    budgets = ",".join(f"{budget:g}" for budget in settings.budgets)
    options = f" --options {settings.options}" if settings.options else ""
    return (
        f"avl frontier --out {out.name}{options} --batch-size {settings.batch}"
        f" --model {settings.model} --scenes {settings.samples} --seed {settings.seed}"
        f" --budgets {budgets} {tasks}"
    )
