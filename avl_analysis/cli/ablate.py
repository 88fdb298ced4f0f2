"""`avl ablate`: silence the heads of a kind, and as many others.

Shows which of them the answers need more.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from avl_analysis.cli.options import (
    Attention,
    BatchSize,
    Device,
    Download,
    Dtype,
    Force,
    MaxNewTokens,
    Model,
    Questions,
    Tasks,
    check_target,
    load,
    plain,
    progress,
    read_or_draw,
)
from avl_analysis.errors import InputError

if TYPE_CHECKING:
    from avl_analysis.heads.ablation import Ablation
    from avl_analysis.intervals import Estimate
    from avl_analysis.recordings.recording import Recording

EXAMPLES = """
Examples: [bold]avl ablate --out ablation.json[/], then
[bold]avl report run.nc --ablation ablation.json[/];
[bold]avl ablate my-questions.jsonl --model ./my-llava --kind text[/]
"""


def ablate(
    data: Questions = None,
    kind: Annotated[
        str, typer.Option(help="Kind of heads: visual, scanning, sink, local, text or mixed.")
    ] = "visual",
    model: Model = "scenes",
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    recording: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Recording that tells the kinds of heads. Default: other questions, half as many,"
                " are recorded: of drawn scenes those of a split of their own, of a file a third."
            )
        ),
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Drawn scenes per task.")] = 9,
    task: Tasks = None,
    draws: Annotated[int, typer.Option(min=1, help="Random sets of as many other heads.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of these draws.")] = 0,
    same_layers: Annotated[
        bool,
        typer.Option(
            "--same-layers",
            help="Take as many others from the very layers the kind's heads are in.",
        ),
    ] = False,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 32,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = "sdpa",
    download: Download = False,
    force: Force = False,
) -> None:
    """Silence the heads of one kind, then as many others drawn at random.

    Which do right answers need more?
    """
    from avl_analysis.heads.taxonomy import KINDS

    if kind not in KINDS:
        raise InputError(f"unknown kind of heads {kind!r}: choose one of {', '.join(KINDS)}")
    if out is not None:
        if out.suffix != ".json":
            raise InputError(f"--out {out}: the file's name must end in .json")
        check_target(out, force)
    samples, recorded = read_or_draw(data, scenes, task, "ablation"), None
    told = _recording(recording)
    # Kinds of heads must not be read from the questions that are asked under ablation. Questions of
    # a file are divided by `silence` itself.
    if data is None and told is None:
        recorded = read_or_draw(None, max(1, scenes // 2), task, "heads")
    vlm = load(model, dtype=dtype, device=device, attention=attention, download=download)

    from avl_analysis.corpus.questions import describe_questions
    from avl_analysis.heads.ablation import ablate as silence

    questions = (
        (str(data),)
        if data is not None
        else ("--scenes", str(scenes), *(f"--task={name}" for name in task or ()))
    )
    told_by = () if recording is None else ("--recording", str(recording))
    with progress("silencing", unit="answers") as advance:
        result = silence(
            vlm,
            samples,
            kind=kind,
            recording=told,
            recorded=recorded,
            draws=draws,
            seed=seed,
            same_layers=same_layers,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            # Kept with the result: the command that makes it again.
            command=shlex.join(
                [
                    "avl",
                    "ablate",
                    *questions,
                    "--model",
                    model,
                    "--kind",
                    kind,
                    "--draws",
                    str(draws),
                    "--seed",
                    str(seed),
                    *told_by,
                    *(("--same-layers",) if same_layers else ()),
                ]
            ),
            progress=lambda what, done, total: advance(done, total, what),
        )
    if out is not None:
        result.save(out)
    typer.echo(f"asked: {describe_questions([s for s in samples if s.id in result.samples])}")
    _show(result)


def _recording(path: Path | None) -> Recording | None:
    from avl_analysis.recordings.recording import load_recording

    return None if path is None else load_recording(path)


def _show(result: Ablation) -> None:
    console = Console()
    console.print(
        plain(
            f"{result.found} of {result.heads} heads are {result.kind}, read from {result.found_on}"
        ),
        highlight=False,
    )
    table = Table("silenced", "heads", "right answers", "95 % interval", box=None, pad_edge=False)
    for group in result.groups:
        heads = " ".join(f"{layer}.{head}" for layer, head in group.heads)
        table.add_row(group.name, heads, f"{group.accuracy.mean:.3f}", _bounds(group.accuracy))
    table.caption, table.caption_justify = "heads: layer.head", "left"
    console.print(table)
    contrast = result.contrast
    console.print(
        f"with {len(result.of_kind.heads)} {result.kind} heads silenced {contrast.mean:+.3f}"
        f" {_bounds(contrast)} more questions go wrong than with {result.others} ({contrast.n}"
        f" questions, {len(result.random)} draws)",
        highlight=False,
        soft_wrap=True,
    )


def _bounds(estimate: Estimate) -> str:
    return f"[{estimate.low:.3f}, {estimate.high:.3f}]"
