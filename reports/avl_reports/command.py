"""`avl report`: record a model on drawn scenes, or take a recording, and build the report.

Registered with the command line through the entry point group "avl.commands", since `avl_analysis`
may not import the packages above it.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avl_analysis.cli.options import Attention, Device, Download, Dtype, Model, load, progress
from avl_analysis.errors import InputError
from avl_analysis.files import check_folder_writable

if TYPE_CHECKING:
    import xarray as xr

    from avl_analysis.corpus.questions import Sample
    from avl_analysis.evaluation.comparison import Comparison
    from avl_analysis.heads.ablation import Ablation
    from avl_analysis.models.loading import VLM
    from avl_analysis.recordings.recording import Recording

SAMPLES = 204
"""Scenes a report records unless told otherwise: seventeen of each of the twelve tasks."""
COMPARED = 4
"""Scenes per task on which policies are compared unless told otherwise."""
BUDGETS = (0.6, 0.3)
"""Shares of the full cache's bytes at which policies are compared, beside A-VL with the paper's
settings.
"""
RIVALS = (
    "a-vl",
    "random",
    "stride",
    "streaming",
    "h2o",
    "snapkv",
    "fastv",
    "vl-cache",
    "kivi",
    "quest",
)
"""Policies that a report compares by itself; `avl compare` and `--comparison` show any others."""
ABLATED = 17
"""Scenes per task that are asked with heads silenced unless told otherwise."""
CUT = 4
"""Scenes per task on which attention between groups of tokens is cut unless told otherwise."""
SUNK = 4
"""Scenes per task on which sinks among image tokens are studied unless told otherwise."""
MAPPED = 3
"""Scenes per task of which relevance maps are computed, and patches read, unless told otherwise."""
WORDS = 12
"""Scenes per task whose words are judged, with noise on their pictures, unless told otherwise."""
DRAWS = 6
"""Random sets of other heads that are silenced."""
BATCH = 4
MAX_NEW_TOKENS = 96

EXAMPLES = """
Examples: [bold]avl report[/], [bold]avl report --model ./my-llava --samples 48[/],
[bold]avl report run.nc --comparison compare.nc --ablation ablation.json --out paper[/]
(no model needed),
[bold]avl report one.nc other.nc --out both[/] (two models or policies side by side)
"""


def report(
    recording: Annotated[
        list[Path] | None,
        typer.Argument(
            help=(
                "A recording made before, or two to set side by side; without one, the model is"
                " recorded on drawn scenes now."
            )
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write into; made if needed.")] = Path(
        "report"
    ),
    model: Model = "scenes",
    samples: Annotated[
        int, typer.Option(min=2, help="Drawn scenes to record, all kinds of questions in turn.")
    ] = SAMPLES,
    seed: Annotated[
        int, typer.Option(min=0, help="Which scenes; below 1,000,000 all are held out.")
    ] = 7,
    compare: Annotated[
        int, typer.Option(min=0, help="Scenes per task to compare policies on; 0: none.")
    ] = COMPARED,
    comparison: Annotated[
        Path | None, typer.Option(help="A file of avl compare to show instead.")
    ] = None,
    ablate: Annotated[
        int, typer.Option(min=0, help="Scenes per task to ask with heads silenced; 0: none.")
    ] = ABLATED,
    ablation: Annotated[
        list[Path] | None,
        typer.Option(help="A file of avl ablate to show instead; repeat for several."),
    ] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(help="A file of avl frontier to show too."),
    ] = None,
    cut: Annotated[
        int,
        typer.Option(min=0, help="Scenes per task to cut attention between tokens on; 0: none."),
    ] = CUT,
    sunk: Annotated[
        int,
        typer.Option(min=0, help="Scenes per task to study sinks of image tokens on; 0: none."),
    ] = SUNK,
    words: Annotated[
        int,
        typer.Option(min=0, help="Noisy scenes per task whose words are judged; 0: none."),
    ] = WORDS,
    mapped: Annotated[
        int,
        typer.Option(min=0, help="Scenes per task for relevance maps and patch words; 0: none."),
    ] = MAPPED,
    further: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Another measurement to show instead, e.g. knockout=knockout.nc; repeatable.",
        ),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "",
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = "sdpa",
    download: Download = False,
) -> None:
    """Figures and findings about a model's attention.

    One page, one PDF, and a folder of figures and numbers.
    """
    # Recording may take long, so a folder that cannot be written is refused before it.
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder to write the report into")
    check_folder_writable(out)

    # Imported inside the function so that `avl --help` and other commands do not load the models
    # and the figures.
    from avl_analysis.evaluation.comparison import load_comparison
    from avl_analysis.heads.ablation import load_ablation
    from avl_analysis.recordings.recording import load_recording
    from avl_reports.build import build
    from avl_reports.frontiers import load_frontier
    from avl_reports.further import KINDS, read_further

    # Files are read before a model is loaded, so that a wrong one is refused at once.
    compared = None if comparison is None else load_comparison(comparison)
    silenced = [load_ablation(path) for path in ablation or ()]
    held = None if frontier is None else load_frontier(frontier)
    measured = read_further(further or ())
    # The options as they were given, for the command line that the report prints.
    given = [
        *_option("--comparison", comparison),
        *(part for path in ablation or () for part in ("--ablation", path)),
    ]
    given += _option("--frontier", frontier)
    given += [part for text in further or () for part in ("--further", text)]
    beside = None
    if recording:
        # With a recording no model is loaded: what is missing beside it is left out, not measured.
        if len(recording) > 2:
            raise InputError(f"{len(recording)} recordings: pass one, or two to set side by side")
        recorded = load_recording(recording[0])
        beside = load_recording(recording[1]) if len(recording) > 1 else None
        commands = [_line("avl report", *recording, *given, "--out", out)]
    else:
        vlm = load(model, dtype=dtype, device=device, attention=attention, download=download)
        recorded = record_scenes(vlm, samples, seed)
        # A measurement that was given as a file is not made again. From here on every number of
        # scenes is per task, and 0 leaves the measurement out.
        if compared is None and compare:
            compared = compare_policies(vlm, compare)
        numbers = ["--samples", samples, "--seed", seed, "--compare", compare, "--ablate", ablate]
        numbers += ["--cut", cut, "--sunk", sunk, "--words", words, "--mapped", mapped]
        commands = [_line("avl report", "--model", model, *numbers, *given, "--out", out)]
        if not silenced and ablate:
            # Heads are found in the recording made above, so this follows it.
            silenced = silence_heads(vlm, recorded, ablate, commands[0])
        if "knockout" not in measured and cut:
            measured["knockout"] = cut_attention(vlm, cut)
        if "sinks" not in measured and sunk:
            measured["sinks"] = look_for_sinks(vlm, sunk)
        if "pointing" not in measured and mapped:
            # Joined and not assigned: without a right answer there is nothing to add.
            measured |= follow_words(vlm, mapped)
        if "patches" not in measured and mapped:
            measured["patches"] = read_patches(vlm, mapped)
        if "errors" not in measured and words:
            measured["errors"] = judge_words(vlm, words)
    # The names under which `build` writes these files: the second printed command makes the same
    # report from the folder alone.
    own = [out / "run.nc", *([out / "beside.nc"] if beside is not None else [])]
    again = _option("--comparison", out / "compare.nc" if compared is not None else None)
    for number, _ in enumerate(silenced, 1):
        again += [
            "--ablation",
            out / ("ablation.json" if number == 1 else f"ablation-{number}.json"),
        ]
    again += _option("--frontier", out / "frontier.jsonl" if held is not None else None)
    for name in measured:
        again += ["--further", f"{name}={out / KINDS[name].file}"]
    commands.append(
        _line("avl report", *own, *again) + "    # the same figures from the same recording"
    )
    commands.append(
        _line("python -m avl_reports.fig_modality", out / "run.nc") + "    # one figure alone"
    )
    with progress("figures", unit="parts") as advance:
        built = build(
            recorded,
            out,
            comparison=compared,
            ablations=silenced,
            frontier=held,
            further=measured,
            beside=beside,
            names=[str(path) for path in recording or ()],
            title=title,
            commands=commands,
            progress=lambda done, total, name: advance(done, total, name),
        )
    # These notes go to standard error; standard output has one line, where the report is.
    for name, reason in built.missing.items():
        typer.echo(f"not shown: {name.removeprefix('fig_')} ({reason})", err=True)
    # Verdicts stand in a column, right-aligned to "not supported" and one blank more.
    for section in built.sections:
        for finding in section.findings:
            typer.echo(f"{finding.verdict.value:>14}  {finding.choice}", err=True)
    typer.echo(f"report in {built.page}")


def record_scenes(vlm: VLM, count: int, seed: int) -> Recording:
    """Record the model answering `count` drawn scenes, with a bar."""
    from avl_analysis.corpus.record_samples import record_samples

    with progress("recording", unit="samples") as advance:
        recorded = record_samples(
            vlm,
            draw_samples(count, seed),
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=BATCH,
            on_token=lambda done, _: advance(done, count),
        )
    recorded.attrs["data"] = f"{count} drawn scenes of seed {seed}, all kinds of questions in turn"
    return recorded


def draw_samples(count: int, seed: int) -> list[Sample]:
    """`count` held-out scenes with the tasks in turn, sorted by task.

    Answers of one batch are then about as long.
    """
    from avl_analysis.corpus.questions import check_count, scene_sample
    from avl_analysis.scenes import TASKS, generate

    check_count(count)
    # The index runs over all tasks, so no two samples show the same scene.
    drawn = [generate(seed, index, TASKS[index % len(TASKS)]) for index in range(count)]
    return [
        scene_sample(sample)
        for sample in sorted(drawn, key=lambda sample: (TASKS.index(sample.task), sample.index))
    ]


def compare_policies(vlm: VLM, per_task: int) -> Comparison:
    """`RIVALS` at every budget, and A-VL with the paper's settings, against the full cache."""
    import avl
    from avl.policies import registry
    from avl_analysis.corpus.questions import scene_samples
    from avl_analysis.evaluation.compare import compare
    from avl_analysis.evaluation.policy_files import with_budget

    # Differences are taken to "full". The first A-VL in this order is the one that the figure of
    # policies judges.
    policies: dict[str, avl.Policy] = {
        "full": avl.FullPolicy(),
        "A-VL (paper)": avl.AdaptivePolicy(),
    }
    for name, kind in registry.policies().items():
        # In the order of the registry, not of `RIVALS`.
        if name in RIVALS:
            policies |= {f"{name}:{budget:g}": with_budget(kind, budget) for budget in BUDGETS}
    with progress("comparing policies", unit="answers") as advance:
        return compare(
            vlm,
            scene_samples(per_task),
            policies,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=8,
            progress=advance,
        )


def silence_heads(
    vlm: VLM, recorded: Recording, per_task: int, command: str = ""
) -> list[Ablation]:
    """Visual heads silenced against as many others.

    Others of all layers and of the same layers, where both can be found.
    """
    from avl_analysis.corpus.questions import scene_samples
    from avl_analysis.heads.ablation import ablate, find_heads, plan

    found = []
    # First against heads of all layers, then against heads of the same layers, because layers
    # differ in how much every answer needs them (`avl_analysis.heads.ablation`).
    for same_layers in (False, True):
        try:
            # Only to learn whether there are heads to compare: `plan` does not run the model.
            plan(*find_heads(recorded), "visual", DRAWS, same_layers=same_layers)
        except (
            InputError
        ) as error:  # a model whose heads are all of one kind; the report says what it lacks
            typer.echo(f"no heads are silenced: {error}", err=True)
            continue
        with progress("silencing", unit="answers") as advance:
            found.append(
                ablate(
                    vlm,
                    scene_samples(per_task, split="ablation"),
                    recording=recorded,
                    draws=DRAWS,
                    same_layers=same_layers,
                    max_new_tokens=MAX_NEW_TOKENS,
                    command=command,
                    progress=lambda what, done, total: advance(done, total, what),
                )
            )
    return found


def cut_attention(vlm: VLM, per_task: int) -> xr.Dataset:
    """What answers lose when attention between two groups of tokens is cut, layer by layer."""
    from avl_analysis.corpus.questions import scene_samples
    from avl_analysis.heads.knockout import knockout

    with progress("cutting attention", unit="windows") as advance:
        return knockout(
            vlm,
            scene_samples(per_task, split="ablation"),
            max_new_tokens=MAX_NEW_TOKENS,
            progress=advance,
        )


def look_for_sinks(vlm: VLM, per_task: int) -> xr.Dataset:
    """Sinks among image tokens, where they are born, and what hiding them does."""
    from avl_analysis.corpus.questions import scene_samples
    from avl_analysis.heads.sink_study import study_sinks

    with progress("studying sinks", unit="questions") as advance:
        return study_sinks(
            vlm,
            scene_samples(per_task, split="ablation"),
            max_new_tokens=MAX_NEW_TOKENS,
            progress=advance,
        )


def judge_words(vlm: VLM, per_task: int) -> xr.Dataset:
    """Attention while right and wrong words are written, about noisy pictures."""
    from avl_analysis.corpus.questions import scene_samples
    from avl_analysis.heads.word_errors import word_errors

    samples = scene_samples(per_task)
    with progress("judging words", unit="questions") as advance:
        return word_errors(
            vlm,
            samples,
            max_new_tokens=MAX_NEW_TOKENS,
            on_token=lambda done, _: advance(done, len(samples)),
        )


def follow_words(vlm: VLM, per_task: int) -> dict[str, xr.Dataset]:
    """Which relevance map points at what words are about; nothing where no answer is right."""
    from avl_analysis.corpus.questions import scene_samples
    from avl_analysis.relevance.pointing import point

    samples = scene_samples(per_task, split="recording")
    with progress("following words", unit="questions") as advance:
        try:
            # A map can be judged only for a right word, so a model without a right answer has none;
            # the report is built without them.
            return {"pointing": point(vlm, samples, progress=advance)}
        except InputError as error:
            typer.echo(f"no relevance maps: {error}", err=True)
            return {}


def read_patches(vlm: VLM, per_task: int) -> xr.Dataset:
    """Which share of an object's patches say its name."""
    from avl_analysis.corpus.questions import scene_samples
    from avl_analysis.heads.patch_words import say_names

    samples = scene_samples(per_task, split="recording")
    with progress("reading patches", unit="questions") as advance:
        return say_names(vlm, samples, progress=advance)


def _option(name: str, value: object) -> list[object]:
    return [] if value is None else [name, value]


def _line(command: str, *parts: object) -> str:
    # Quoted for a shell, so that paths with blanks can be pasted.
    return " ".join([command, *(shlex.quote(str(part)) for part in parts if part is not None)])
