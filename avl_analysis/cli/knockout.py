"""`avl knockout`: what is lost when attention between two groups of tokens is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avl_analysis.cli.options import (
    Attention,
    BatchSize,
    Device,
    Download,
    Dtype,
    Force,
    MaxNewTokens,
    Model,
    NetCDFFile,
    PerTask,
    Questions,
    Tasks,
    check_netcdf,
    load,
    parse_numbers,
    progress,
    read_or_draw,
)
from avl_analysis.errors import InputError

EXAMPLES = """
Examples: [bold]avl knockout --scenes 4 --out knockout.nc[/],
[bold]avl knockout questions.jsonl --model ./my-llava --window 3 --flow image:last[/]
"""


def knockout(
    data: Questions = None,
    flow: Annotated[
        list[str] | None,
        typer.Option(help="SOURCE:TARGET, e.g. image:question; repeat. Default: six flows."),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Layers cut at once.")] = 1,
    heads: Annotated[
        str | None, typer.Option(help="Query heads to cut, e.g. 0,4-7. Default: all.")
    ] = None,
    model: Model = "scenes",
    out: NetCDFFile = Path("knockout.nc"),
    scenes: PerTask = 4,
    task: Tasks = None,
    max_new_tokens: MaxNewTokens = 32,
    batch_size: BatchSize = 16,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = "sdpa",
    download: Download = False,
    force: Force = False,
) -> None:
    """Cut attention between two groups of tokens, layer by layer: what does the answer lose?"""
    check_netcdf(out, force)
    flows = [_flow(text) for text in flow or ()]
    samples = read_or_draw(data, scenes, task, "ablation")
    vlm = load(model, dtype=dtype, device=device, attention=attention, download=download)

    from avl_analysis.corpus.questions import describe_questions
    from avl_analysis.heads.knockout import FLOWS, save_knockout
    from avl_analysis.heads.knockout import knockout as cut
    from avl_analysis.plots import knockout_table

    with progress("cutting", unit="windows") as advance:
        result = cut(
            vlm,
            samples,
            flows or FLOWS,
            window=window,
            heads=None if heads is None else parse_numbers(heads, "--heads"),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=advance,
        )
    save_knockout(result, out)
    typer.echo(knockout_table(result).round(3).to_string())
    typer.echo(f"asked: {describe_questions(samples)}")
    typer.echo(f"change of the answer's log-probability, nats per token; everything in {out}")


def _flow(text: str) -> tuple[str, str]:
    source, colon, target = text.partition(":")
    if not colon:
        raise InputError(f"--flow {text!r}: write SOURCE:TARGET, for example image:question")
    return source, target
