"""`avl errors`: does attention say which words of an answer are wrong?"""

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
    Tasks,
    check_netcdf,
    load,
    progress,
    read_or_draw,
)

EXAMPLES = """
Examples: [bold]avl errors --scenes 20 --out errors.nc[/],
[bold]avl errors questions.jsonl --model ./my-llava --noise 0[/]
"""


def errors(
    data: Annotated[
        Path | None,
        typer.Argument(help="JSONL file of questions with answers. Default: drawn scenes."),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(help="Noise on the pictures, share of a pixel's range. Default: 0.15."),
    ] = None,
    model: Model = "scenes",
    out: NetCDFFile = Path("errors.nc"),
    scenes: PerTask = 12,
    task: Tasks = None,
    max_new_tokens: MaxNewTokens = 96,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = "sdpa",
    download: Download = False,
    force: Force = False,
) -> None:
    """Ask about noisy pictures: does attention tell wrong words from right ones?"""
    check_netcdf(out, force)
    samples = read_or_draw(data, scenes, task, "comparison")
    vlm = load(model, dtype=dtype, device=device, attention=attention, download=download)

    from avl_analysis.corpus.questions import describe_questions
    from avl_analysis.heads.word_attention import SIGNALS, comparable, error_auroc
    from avl_analysis.heads.word_errors import NOISE, save_word_errors, word_errors

    with progress("asking", unit="questions") as advance:
        table = word_errors(
            vlm,
            samples,
            # The option cannot have this default itself: its module is imported only when the
            # command runs.
            noise=NOISE if noise is None else noise,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_token=lambda done, _: advance(done, len(samples)),
        )
    save_word_errors(table, out)
    judged = comparable(table)["right"].values
    typer.echo(f"{'signal':42} {'within kinds':22} all words")
    for signal in SIGNALS:
        within, overall = (error_auroc(table, signal, within=part) for part in (True, False))
        typer.echo(f"{signal.title:42} {within.words():22} {overall.words()}")
    typer.echo(
        f"area under the ROC curve for wrong words, {int((judged == 0).sum())} of {judged.size}"
        f" words; asked: {describe_questions(samples)}; everything in {out}"
    )
