"""`avl calibrate`: choose A-VL's settings from a model's own attention.

They are saved with their evidence.
"""

from __future__ import annotations

import warnings
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
    progress,
    read_or_draw,
)
from avl_analysis.errors import InputError

if TYPE_CHECKING:
    from avl import AdaptivePolicy
    from avl_analysis.calibration.calibrate import Evidence

EXAMPLES = """
Examples: [bold]avl calibrate --out tuned.json[/], then [bold]avl compare -p tuned.json -p a-vl[/];
[bold]avl calibrate my-questions.jsonl --model ./my-llava --target 0.9 --out tuned.json[/]
"""


def calibrate(
    data: Questions = None,
    target: Annotated[
        float, typer.Option(help="Share of the attention to keep, between 0 and 1.")
    ] = 0.95,
    model: Model = "scenes",
    out: Annotated[Path, typer.Option(help="Policy file to write.")] = Path("policy.json"),
    scenes: Annotated[
        int,
        typer.Option(
            min=2,
            help=(
                "Drawn scenes per task: two thirds are of the split that settings are chosen by,"
                " a third is of the split that verifies them."
            ),
        ),
    ] = 9,
    task: Tasks = None,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 8,
    prefill: Annotated[
        bool, typer.Option("--prefill", help="Look for a prefill filter too.")
    ] = False,
    prefill_layer: Annotated[int, typer.Option(help="Layer after which the filter would act.")] = 2,
    per_layer: Annotated[
        bool,
        typer.Option("--per-layer", help="Give every layer a share to hold and a core of its own."),
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = "sdpa",
    download: Download = False,
    force: Force = False,
) -> None:
    """Choose A-VL's settings from a model's attention, check them on held-out questions.

    Questions of a file are parted in two thirds and one third; neither part, and no split of scenes
    used here, is what `avl compare` asks by default.
    """
    if out.suffix != ".json":
        raise InputError(f"--out {out}: a policy file's name must end in .json")
    if not 0 < target < 1:
        raise InputError(
            f"--target {target}: choose a share of the attention between 0 and 1, for example 0.95"
        )
    check_target(out, force)
    # Each part has at least one scene of a task: the option takes two or more.
    verifying = max(1, scenes // 3)
    if data is None:
        samples = read_or_draw(None, scenes - verifying, task, "calibration")
        held_out = read_or_draw(None, verifying, task, "verification")
    else:
        samples, held_out = read_or_draw(data, scenes, task, ""), None
    vlm = load(model, dtype=dtype, device=device, attention=attention, download=download)

    from avl_analysis.calibration.calibrate import calibrate as choose
    from avl_analysis.evaluation.policy_files import save_policy

    with progress("calibrating", unit="steps") as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # printed below, with the evidence
        policy, evidence = choose(
            vlm,
            samples,
            target,
            held_out=held_out,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            prefill=prefill,
            prefill_layer=prefill_layer,
            per_layer=per_layer,
            progress=lambda what, done, total: advance(done, total, what),
        )
    save_policy(policy, out, evidence.to_dict())
    _show(policy, evidence, out)


def _show(policy: AdaptivePolicy, evidence: Evidence, out: Path) -> None:
    console = Console()
    for choice in evidence.choices:
        where = f" in {choice.place}" if choice.place else ""
        line = f"{choice.setting} = {choice.value}{where}: {choice.reason}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table(
        "kept of", "mean on held-out questions", "95 % interval", box=None, pad_edge=False
    )
    for setting, entry in evidence.kept.items():
        mean, low, high = (
            f"{value:.3f}" if (value := entry[key]) is not None else "-"
            for key in ("mean", "low", "high")
        )
        table.add_row(setting, mean, f"[{low}, {high}]")
    console.print(table)
    verdict = {True: "kept", False: "missed", None: "undecided"}[evidence.holds]
    console.print(
        f"target {evidence.target:g} on the held-out questions, by the bounds of these intervals:"
        f" {verdict}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(evidence.questions, markup=False, highlight=False, soft_wrap=True)
    for warning in evidence.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    shown = ("correct", "agreement", "kl", "kv_row_share")
    for metric, entry in (
        (name, evidence.measured[name]) for name in shown if name in evidence.measured
    ):
        if entry["mean"] is not None:
            bounds = (
                f" [{entry['low']:.3f}, {entry['high']:.3f}]" if entry["low"] is not None else ""
            )
            console.print(
                f"{metric} on them: {entry['mean']:.3f}{bounds}", markup=False, highlight=False
            )
    console.print(
        f"{policy}\nin {out}; try it on other questions with: avl compare -p {out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
