"""`avl sinks`: sinks among image tokens, where they are born, and what hiding them does."""

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
    progress,
    read_or_draw,
)

EXAMPLES = """
Examples: [bold]avl sinks --scenes 4 --out sinks.nc[/],
[bold]avl sinks questions.jsonl --model ./my-llava --by 'massive activation'[/]
"""


def sinks(
    data: Questions = None,
    by: Annotated[
        str,
        typer.Option(
            help="Signature that chooses the sinks that are hidden: concentration, value drain or"
            " massive activation."
        ),
    ] = "concentration",
    draws: Annotated[int, typer.Option(min=1, help="Random sets of other tokens.")] = 3,
    model: Model = "scenes",
    out: NetCDFFile = Path("sinks.nc"),
    scenes: PerTask = 4,
    task: Tasks = None,
    max_new_tokens: MaxNewTokens = 32,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = "sdpa",
    download: Download = False,
    force: Force = False,
) -> None:
    """Sinks among image tokens by three signatures: where they are born, what hiding them does."""
    check_netcdf(out, force)

    from avl_analysis.heads.sinks import SIGNATURES, check_signature, flags, save_sinks

    # Before the model is loaded, so that a wrong name is refused at once.
    check_signature(by)
    samples = read_or_draw(data, scenes, task, "ablation")
    vlm = load(model, dtype=dtype, device=device, attention=attention, download=download)

    from avl_analysis.corpus.questions import describe_questions
    from avl_analysis.heads.sink_study import study_sinks
    from avl_analysis.intervals import mean_interval

    with progress("studying sinks", unit="questions") as advance:
        study = study_sinks(
            vlm,
            samples,
            signature=by,
            draws=draws,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=advance,
        )
    save_sinks(study, out)
    typer.echo("image tokens that are sinks, mean per question, by layer:")
    for signature in SIGNATURES:
        # (layers,)
        counts = flags(study, signature).sum("token").mean("sample").values
        typer.echo(f"  {signature:20}" + "".join(f"{count:8.2f}" for count in counts))
    typer.echo(f"sink dimensions of the model: {study.attrs['dimensions'] or 'none'}")
    typer.echo("attention of the sinks, times the mean image token:")
    for name, what in (
        ("before", "before the exchange"),
        ("followed", "where the embedding went"),
        ("stayed", "where it had been"),
    ):
        typer.echo(f"  {what:38}{mean_interval(study[name].values).words()}")
    typer.echo("change of the answer's log-probability, nats per token; answers that stay:")
    for condition in study["condition"].values:
        part = study.sel(condition=condition)
        change, same = (mean_interval(part[n].values) for n in ("log_prob_change", "same_answer"))
        typer.echo(f"  {condition:38}{change.words():24}{same.words('%')}")
    typer.echo(f"asked: {describe_questions(samples)}; everything in {out}")
