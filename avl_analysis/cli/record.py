"""The commands around recordings: `avl record` makes one, `avl stats` prints what is in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from avl_analysis.cli.corpus import read, record_many
from avl_analysis.cli.options import (
    Attention,
    BatchSize,
    Device,
    Download,
    Dtype,
    Force,
    MaxNewTokens,
    Model,
    check_target,
    load,
    parse_numbers,
    plain,
    printable,
    progress,
)
from avl_analysis.errors import InputError

if TYPE_CHECKING:
    from avl_analysis.corpus.questions import Sample
    from avl_analysis.models.videos import Source
    from avl_analysis.recordings.recording import Recording


RECORD_EXAMPLES = """
Examples: [bold]avl record photo.jpg 'What do you see in the picture?'[/],
[bold]avl record --scenes 20 --out scenes.nc[/] (pictures drawn with known truth),
[bold]avl record photo.jpg 'Describe the picture.' --model ./my-llava --layers 0,8-15[/],
[bold]avl record --videos 4[/] (short drawn videos, whose truth is known),
[bold]avl record frames/ 'What happens?' --model ./my-qwen --frames 8[/] (a video as a folder),
[bold]avl record --data questions.jsonl --out run.nc --workers 4[/] (resumes an interrupted run)
"""


def record(
    image: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE... PROMPT",
            help=("One or several pictures, folders of frames or video files, then the question."),
        ),
    ] = None,
    model: Model = "scenes",
    out: Annotated[
        Path, typer.Option(help="File to write; an existing one is replaced only with --force.")
    ] = Path("run.nc"),
    data: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Instead of a picture, a JSONL file with one {image, prompt, answer} per line; can"
                " be resumed."
            )
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes; more than one needs Ray and can be resumed.")
    ] = 1,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster. Default: workers on this machine.")
    ] = None,
    batch_size: BatchSize = 1,
    scenes: Annotated[
        int, typer.Option(help="Instead of a picture, ask about this many drawn scenes.")
    ] = 0,
    videos: Annotated[
        int, typer.Option(help="Instead of a picture, ask about this many drawn videos.")
    ] = 0,
    task: Annotated[
        str | None, typer.Option(help="Kind of question about the scenes. Default: all kinds.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the drawn scenes.")] = 0,
    video: Annotated[
        bool, typer.Option("--video", help="The pictures are the frames of one video.")
    ] = False,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1, help="Frames of a video to take, evenly spread. Default: all, of a file 8."
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames per second of a video. Default: the file's, else 2."),
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Decoder layers to record, e.g. 0,4-7. Default: all.")
    ] = None,
    statistics: Annotated[
        str | None, typer.Option(help="Statistics to record, by name. Default: all.")
    ] = None,
    keep_attention: Annotated[
        bool,
        typer.Option(
            "--keep-attention", help="Keep raw attention weights too, of --heads and --queries."
        ),
    ] = False,
    heads: Annotated[
        str | None, typer.Option(help="Heads whose raw weights are kept, e.g. 0,3. Default: all.")
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(
            help=(
                "Rows whose raw weights are kept: all, prompt, last, decode, steps, or positions"
                " like 5,7-9."
            )
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = "sdpa",
    download: Download = False,
    force: Force = False,
) -> None:
    """Record where a model looks while it answers, every layer and head, as one file."""
    if out.suffix == ".zarr":
        raise InputError(
            f"--out {out}: avl record writes one netCDF file, so give it a name like"
            f" {out.with_suffix('.nc').name}; in Python, load_recording(...).save({out.name!r})"
            " makes a zarr folder of it"
        )
    check_target(out, force)
    # All options are read before the model is loaded, so that a mistake in them shows at once.
    samples = (
        (_drawn_videos(videos, image or [], scenes, task, seed, frames))
        if videos and data is None
        else _samples(image or [], scenes, task, seed, _Videos(video, frames, fps))
        if data is None
        else read(data, image or [], scenes, task)
    )
    numbers = None if layers is None else parse_numbers(layers, "--layers")
    kept = _raw(keep_attention, heads, queries)
    names = None if statistics is None else [n for n in re.split(r"[,\s]+", statistics) if n]
    if names == []:
        raise InputError(
            f"--statistics {statistics!r} names none: avl stats --list prints their names, and"
            " without the option all are recorded"
        )
    options = {
        "system": system,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "layers": numbers,
        "statistics": names,
        **kept,
    }
    # Only these runs keep parts beside the file and can be resumed; others are recorded in one go.
    if data is not None or workers > 1 or address is not None:
        how = {
            "dtype": dtype,
            "device": device,
            "attn_implementation": attention,
            "allow_download": download,
        }
        record_many(
            model, samples, out, how, force=force, workers=workers, address=address, options=options
        )
        return
    vlm = load(model, dtype=dtype, device=device, attention=attention, download=download)

    from avl_analysis.corpus.record_samples import record_samples

    # The most there can be: answers may end earlier, and the bar then jumps to the next question.
    total = len(samples) * max_new_tokens
    with progress("recording") as advance:
        recording = record_samples(
            vlm,
            samples,
            on_token=lambda done, token: advance(done * max_new_tokens + token, total),
            **options,
        )
    if kept:
        _check_kept(recording, queries)
    recording.save(out)
    for index in range(min(len(samples), 3)):
        answer = recording.facts(index)["answer"] or "(an empty answer)"
        typer.echo(printable(f"{samples[index].prompt}\n  {answer}"))
    typer.echo(
        printable(
            f"{len(recording)} sample(s) of {vlm.name} in {out}; look at it with: avl stats {out}"
        )
    )


def stats(
    recording: Annotated[Path | None, typer.Argument(help="A file written by avl record.")] = None,
    names: Annotated[
        list[str] | None, typer.Argument(help="Statistics to print. Default: all by layer.")
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Print what every statistic is, and stop.")
    ] = False,
) -> None:
    """Print a recording's statistics by layer, with 95 % intervals over samples."""
    if list_:
        _print_catalogue()
        return
    if recording is None:
        raise InputError("name a recording, as avl record wrote it, or pass --list")
    from avl_analysis.recordings.recording import load_recording
    from avl_analysis.recordings.tables import layer_tables

    loaded = load_recording(recording)
    tables = layer_tables(loaded, names)
    console = Console()
    _heading(console, loaded)
    for table in tables:
        console.print(f"\n[bold]{plain(table.title)}[/]", highlight=False, soft_wrap=True)
        drawn = Table("layer", *map(plain, table.columns), box=None, pad_edge=False)
        for layer, row in zip(table.layers, table.cells, strict=True):
            drawn.add_row(str(layer), *row)
        console.print(drawn)


def _print_catalogue() -> None:
    from avl_analysis.statistics import catalogue

    console = Console()
    for entry in catalogue():
        console.print(
            f"[bold]{entry['name']}[/] ({entry['unit']})", highlight=False, soft_wrap=True
        )
        for text in (entry["meaning"], entry["source"] and f"source: {entry['source']}"):
            if text:
                console.print(f"    {plain(text)}", highlight=False, soft_wrap=True)


def _raw(keep: bool, heads: str | None, queries: str | None) -> dict[str, Any]:
    """Arguments of `record` for raw weights."""
    if not keep:
        if heads is not None or queries is not None:
            raise InputError(
                "--heads and --queries choose raw weights, which are kept with --keep-attention"
                " only"
            )
        return {}
    # A text that begins with a digit lists positions; any other names a kind of rows.
    named = queries is None or not queries[:1].isdigit()
    return {
        "keep": "attention",
        "heads": None if heads is None else parse_numbers(heads, "--heads"),
        "queries": queries if named else parse_numbers(str(queries), "--queries"),
    }


def _check_kept(recording: Recording, queries: str | None) -> None:
    """Refuse rows that no prompt has."""
    # How long prompts are is known only after recording, so this cannot be refused before.
    if any(array.size for array in recording.data["attention"].values()):
        return
    longest = int(recording.tokens["prompt_length"].max())
    raise InputError(
        f"--queries {queries} names no row that was computed: the longest prompt has {longest}"
        f" tokens, counted from 0 to {longest - 1}"
    )


class _Videos(NamedTuple):
    """How videos are read: whether all pictures are frames of one, how many frames, their rate."""

    together: bool
    frames: int | None
    fps: float | None

    def sources(self, names: list[str]) -> tuple[Source, ...]:
        """The pictures and videos of a question."""
        from avl_analysis.models.videos import Video, is_video

        if self.together:
            # One name is a folder or a file that holds the frames; several names are the frames.
            source = names[0] if len(names) == 1 else names
            return (Video(source, self.frames, self.fps),)
        shown = tuple(
            Video(name, self.frames, self.fps) if is_video(name) else name for name in names
        )
        if (self.frames or self.fps) and not any(isinstance(one, Video) for one in shown):
            raise InputError(
                "--frames and --fps are about videos, and none was given: add --video if the"
                " pictures are the frames of one"
            )
        return shown


def _drawn_videos(
    videos: int, image: list[str], scenes: int, task: str | None, seed: int, frames: int | None
) -> list[Sample]:
    """Questions about drawn videos.

    Args:
        videos: how many.
        image: pictures and a question, which do not go with them.
        scenes: drawn pictures, which do not either.
        task: of drawn pictures.
        seed: that the videos are drawn from.
        frames: of each; None takes the usual number.
    """
    from avl_analysis.corpus.questions import check_count, moving_sample
    from avl_analysis.scenes.moving import FRAMES, moving

    if videos < 0 or seed < 0 or (frames is not None and frames < 2):
        raise InputError(
            f"--videos {videos}, --seed {seed}, --frames {frames}: 0 or more videos, of at least 2"
            " frames, from a seed of 0 or more"
        )
    if image or scenes or task is not None:
        raise InputError("--videos brings its own videos and questions: leave out everything else")
    check_count(videos)
    return [moving_sample(moving(seed, index, frames or FRAMES)) for index in range(videos)]


def _samples(
    image: list[str], scenes: int, task: str | None, seed: int, videos: _Videos
) -> list[Sample]:
    from avl_analysis.corpus.questions import Sample, check_count, scene_sample
    from avl_analysis.scenes import ALL_TASKS, TASKS, generate

    if scenes < 0 or seed < 0:
        raise InputError(f"--scenes {scenes} and --seed {seed}: both must be 0 or more")
    check_count(scenes)
    if task is not None and task not in ALL_TASKS:
        raise InputError(f"unknown task {task!r}: choose one of {', '.join(ALL_TASKS)}")
    if scenes:
        if image:
            raise InputError(
                f"--scenes brings its own pictures and questions; leave out {' '.join(image)!r}"
            )
        # One task after the other, so that any number covers them evenly.
        kinds = (task,) if task else TASKS
        return [
            scene_sample(generate(seed, index, kinds[index % len(kinds)]))
            for index in range(scenes)
        ]
    if task is not None:
        raise InputError("--task chooses questions about drawn scenes: add --scenes with how many")
    if not image:
        raise InputError("nothing to record: pass a picture and a question, or --scenes 20")
    # The question is the last argument, everything before it a picture or video.
    *pictures, prompt = image
    if not pictures:
        if Path(prompt).exists():
            raise InputError(
                f"a picture without a question: add one, for example avl record {prompt} 'what is"
                " this?'"
            )
        raise InputError(
            f"a prompt without an image: pass the picture first, avl record photo.jpg {prompt!r}"
        )
    return [Sample("000000", videos.sources(pictures), prompt)]


def _heading(console: Console, recording: Recording) -> None:
    attrs = recording.attrs
    lengths = recording.tokens["prompt_length"]
    # The phase is -1 behind a sample's last step. Step 0, the last prompt row, gives the first
    # token, so an answer has one token more than it has decode steps.
    steps = (recording.tokens["phase"] >= 0).sum("step") - 1
    console.print(
        plain(
            f"{attrs.get('model')} ({attrs.get('model_type')}, {attrs.get('dtype')}), recorded"
            f" {attrs.get('date')}"
        )
        + f"\n{len(recording)} sample(s), prompts of {int(lengths.min())} to"
        f" {int(lengths.max())} tokens, answers of {int(steps.min()) + 1} to"
        f" {int(steps.max()) + 1}",
        highlight=False,
        soft_wrap=True,
    )
