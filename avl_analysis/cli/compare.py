"""`avl compare`: several policies on the same questions, measured against the full cache."""

from __future__ import annotations

from collections.abc import Sequence
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
    check_target,
    load,
    plain,
    printable,
    progress,
    read_or_draw,
)
from avl_analysis.errors import InputError

if TYPE_CHECKING:
    from avl import Policy
    from avl_analysis.corpus.questions import Sample
    from avl_analysis.evaluation.comparison import Comparison
    from avl_analysis.intervals import Estimate

DEFAULT_POLICIES = ("a-vl", "random:0.5", "stride:0.5")
"""A-VL with the paper's settings, and two baselines that any policy has to beat."""

SHOWN = (
    "correct",
    "kl",
    "agreement",
    "same_text",
    "rouge_l",
    "kv_row_share",
    "keys_attended",
    "ttft",
    "tpot",
)
"""Numbers that are printed; the file holds all of them."""

EXAMPLES = """
Examples: [bold]avl compare[/],
[bold]avl compare -p a-vl -p h2o:0.5 -p 'a-vl,core=0.2,text=none' --scenes 20[/],
[bold]avl compare my-questions.jsonl -p tuned.json --model ./my-llava --out compare.nc[/]
"""


def compare(
    data: Questions = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            help=(
                "A policy: a name (--policies lists them), name:share of the full cache's bytes,"
                " name,setting=value, or a .json file. Repeat for several."
            ),
        ),
    ] = None,
    policies: Annotated[
        bool,
        typer.Option("--policies", help="List every policy with its settings, and end."),
    ] = False,
    model: Model = "scenes",
    out: Annotated[
        Path | None,
        typer.Option(help="File to write: .nc for everything, .csv or .json for the tables."),
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Drawn scenes per task.")] = 5,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of the scenes; repeat for several. Default: all."),
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 8,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="fidelity, text, accuracy, cost; repeat for several. Default: all."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = "sdpa",
    download: Download = False,
    force: Force = False,
) -> None:
    """Compare policies with the full cache: the same answers? right ones? at what cost?

    With 95 % intervals.
    """
    from avl_analysis.scenes import ALL_TASKS

    if policies:
        _list_policies()
        return
    if out is not None:
        _check_out(out, force)
    compared = _policies(policy or DEFAULT_POLICIES)
    # A file brings its own questions, so tasks apply to drawn scenes only.
    tasks = task or (list(ALL_TASKS) if data is None else None)
    samples = read_or_draw(data, scenes, tasks, "comparison")
    _warn_of_seen(policy or DEFAULT_POLICIES, samples)
    vlm = load(model, dtype=dtype, device=device, attention=attention, download=download)

    from avl_analysis.evaluation.compare import compare as measure
    from avl_analysis.evaluation.comparison import METRICS

    with progress("comparing", unit="answers") as advance:
        comparison = measure(
            vlm,
            samples,
            compared,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            metrics=metric or METRICS,
            progress=advance,
        )
    if out is not None:
        {".nc": comparison.save, ".csv": comparison.to_csv, ".json": comparison.to_json}[
            out.suffix
        ](out)
    Console().print(
        f"asked: {comparison.dataset.attrs['questions']}", markup=False, highlight=False
    )
    _show(comparison)
    # Only after the tables and the file: what the other policies gave is kept.
    failed = comparison.failures
    for name in comparison.policies:
        reasons = failed[failed["policy"] == name]["reason"]
        if len(reasons) == len(samples):
            raise InputError(
                f"policy {name} could not be measured on any of the {len(samples)} questions:"
                f" {reasons.iloc[0]}"
            )


def _list_policies() -> None:
    """One line per policy: its name, what it is called, its settings, and what it does."""
    from dataclasses import fields

    from avl.policies.registry import PRESETS, policies

    table = Table("name", "called", "settings", "what it does", box=None, pad_edge=False)
    for name, kind in policies().items():
        settings = ", ".join(f"{field.name}={field.default}" for field in fields(kind))
        what = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        table.add_row(name, kind.label, settings, what)
    for preset in PRESETS.values():
        table.add_row(preset.name, preset.label, "as a-vl", preset.about)
    Console().print(table)


def _policies(names: list[str] | tuple[str, ...]) -> dict[str, Policy]:
    from avl_analysis.evaluation.policy_files import named_policy

    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"policy {', '.join(sorted(twice))} is named twice: leave one out")
    policies: dict[str, Policy] = {}
    written: dict[str, str] = {}
    for name in names:
        # A policy file becomes a row under its name without folder and ending, which may collide.
        row = Path(name).stem if name.endswith(".json") else name
        if row in policies:
            raise InputError(
                f"policies {written[row]} and {name} would both be the row {row!r} of the result:"
                " rename one of the files"
            )
        policies[row], written[row] = named_policy(name), name
    return policies


def _warn_of_seen(names: Sequence[str], samples: Sequence[Sample]) -> None:
    """Say so where a policy file was chosen or verified by some of these questions."""
    from avl_analysis.corpus.questions import question_digest
    from avl_analysis.evaluation.policy_files import load_evidence

    for name in (name for name in names if name.endswith(".json")):
        # A policy file that was not calibrated has no evidence and names no questions.
        seen = set((load_evidence(name) or {}).get("asked", ()))
        if count := sum(question_digest(sample) in seen for sample in samples):
            typer.echo(
                f"warning: {name} was calibrated with {count} of these {len(samples)} questions;"
                " what it does on them says little about others",
                err=True,
            )


def _check_out(out: Path, force: bool) -> None:
    if out.suffix not in (".nc", ".csv", ".json"):
        raise InputError(
            f"--out {out}: the name must end in .nc (everything), .csv or .json (tables)"
        )
    check_target(out, force)


def _show(comparison: Comparison) -> None:
    """One small table per number, so that any number of policies fits on a screen."""
    from avl_analysis.evaluation.comparison import VARIABLES

    console = Console()
    for metric in (name for name in SHOWN if name in comparison.metrics):
        unit = "" if VARIABLES[metric].unit == "1" else f" [{VARIABLES[metric].unit}]"
        for asked, which in _questions_of(metric, comparison):
            console.print(
                f"{metric}: {VARIABLES[metric].meaning}{unit}{which}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            console.print(_means(asked, metric))
            console.print()
    failures = comparison.failures
    if len(failures):
        reason = f"{failures.iloc[0]['sample']}: {failures.iloc[0]['reason']}"
        console.print(
            printable(f"{failures['sample'].nunique()} sample(s) could not be measured; {reason}"),
            markup=False,
        )


def _questions_of(metric: str, comparison: Comparison) -> list[tuple[Comparison, str]]:
    """The questions a number is printed of, and what to say about them.

    Right answers of one token are counted apart: that token comes from the prompt's own pass, so
    they cannot show what a policy loses while decoding.
    """
    alone = comparison.one_token_tasks
    if metric != "correct" or not alone:
        return [(comparison, "")]
    listed = ", ".join(name or "unnamed" for name in alone)
    apart = f"; tasks answered in one token, which cannot show a loss: {listed}"
    if not comparison.telling:
        return [(comparison, apart)]
    return [
        (comparison.pooled(), "; tasks with longer answers"),
        (comparison.select_tasks(alone), apart),
    ]


def _means(comparison: Comparison, metric: str) -> Table:
    """One row per policy: a number's mean, and its paired difference to the full cache."""
    reference = comparison.reference
    table = Table("policy", "mean", f"minus {plain(reference)}", box=None, pad_edge=False)
    for name in comparison.policies:
        change = comparison.difference(metric, name)
        table.add_row(
            plain(name),
            _cell(comparison.mean(metric, name)),
            "" if name == reference else _cell(change, sign="+"),
        )
    return table


def _cell(estimate: Estimate, sign: str = "") -> str:
    if not estimate.n:
        return "-"
    spread = (
        f" [{estimate.low:{sign}.3g}, {estimate.high:{sign}.3g}]"
        if estimate.low < estimate.high
        else ""
    )
    return f"{estimate.mean:{sign}.3g}{spread}"
