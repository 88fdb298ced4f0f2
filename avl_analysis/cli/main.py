"""The `avl` command: one thin subcommand per thing this package does.

Commands parse, call, print; what they call is the same public interface Python users have. Two
rules hold for all: a mistake a person can correct is one line on stderr and exit code 2, never a
traceback; anything over two seconds shows what it is doing. Heavy imports sit inside the commands,
so that `avl --help` answers at once.

The reports and the dashboard stand above this package and may import it, not the other way round.
Their commands therefore come to the command line by themselves: each installed entry point of the
group "avl.commands" names a typer command function, as any third package may declare one too.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from avl.plugins import COMMANDS, PluginWarning, left_out, plugins
from avl_analysis.cli import (
    ablate,
    calibrate,
    compare,
    errors,
    frontier,
    knockout,
    maps,
    record,
    sinks,
)
from avl_analysis.cli.eval import EXAMPLES as EVAL_EXAMPLES
from avl_analysis.cli.eval import evaluate
from avl_analysis.cli.options import Download, plain, printable
from avl_analysis.errors import InputError, one_line

app = typer.Typer(
    name="avl",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_INTERRUPTED = (
    130  # what shells report for a program ended by Ctrl-C; typer returns it for KeyboardInterrupt
)

# typer carries its own copy of click in some versions and imports it in others; the base class is
# the same either way.
_UsageError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


@app.callback(epilog="Start with: avl models, then avl record --help.")
def _avl() -> None:
    """Record, measure and adapt the attention of vision-language models."""


@app.command(
    epilog=(
        "Examples: [bold]avl models[/], [bold]avl models ./my-llava llava-hf/llava-1.5-7b-hf"
        " --download[/]"
    )
)
def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help=(
                "Models to describe: scenes, a folder or a hub id. Default: scenes. With --check:"
                " model types of "
                "transformers, default all."
            )
        ),
    ] = None,
    download: Download = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Check recording, policies and picture maps on a tiny model of each type.",
        ),
    ] = False,
    write: Annotated[
        Path | None,
        typer.Option(
            help="With --check of all types: renew the table at the end of this Markdown file."
        ),
    ] = None,
) -> None:
    """Describe models without loading their weights.

    Size, layers, heads, image tokens, recordable or why not.
    """
    if check or write is not None:
        from avl_analysis.cli.check import check_types

        check_types(names, write)
        return
    from avl_analysis.models.inventory import SAMPLE_SIZE, count_of, inspect_model

    table = Table(
        "model", "type", "parameters", "layers", "heads", "image tokens", "recordable", box=None
    )
    for name in names or ["scenes"]:
        facts = inspect_model(name, allow_download=download)
        heads = f"{facts.query_heads}" + (
            f" / {facts.kv_heads} KV" if facts.kv_heads != facts.query_heads else ""
        )
        known = (
            [str(facts.layers), heads, str(facts.image_tokens)]
            if facts.refusal is None
            else ["-"] * 3
        )
        cells = (name, facts.model_type, count_of(facts.parameters), *known, facts.refusal or "yes")
        table.add_row(*map(plain, cells))
    table.caption = f"image tokens: for one picture of {SAMPLE_SIZE[0]} x {SAMPLE_SIZE[1]} pixels"
    table.caption_justify = "left"
    Console().print(table)


# Commands live in modules of their own that do not know `app`, so they are registered here.
app.command(epilog=record.RECORD_EXAMPLES)(record.record)
app.command(epilog="Examples: [bold]avl stats run.nc[/], [bold]avl stats run.nc modality_mass[/]")(
    record.stats
)
app.command(epilog=compare.EXAMPLES)(compare.compare)
app.command(epilog=calibrate.EXAMPLES)(calibrate.calibrate)
app.command(epilog=ablate.EXAMPLES)(ablate.ablate)
app.command(epilog=knockout.EXAMPLES)(knockout.knockout)
app.command(epilog=sinks.EXAMPLES)(sinks.sinks)
app.command(epilog=maps.MAPS_EXAMPLES)(maps.maps)
app.command(epilog=maps.PATCHES_EXAMPLES)(maps.patches)
app.command(epilog=errors.EXAMPLES)(errors.errors)
app.command(epilog=frontier.EXAMPLES)(frontier.frontier)
app.command("eval", epilog=EVAL_EXAMPLES)(evaluate)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    0 on success, 2 on input that cannot be used, 130 when interrupted.
    """
    # Before anything imports the libraries that read these settings when they are imported.
    _quiet()
    words = list(sys.argv[1:] if arguments is None else arguments)
    _add_commands(words)
    try:
        # Not standalone: typer would print errors itself, in its own form and with other exit
        # codes.
        code = app(words or ["--help"], prog_name="avl", standalone_mode=False)
    except _UsageError as error:
        _fail(getattr(error, "format_message", error.__str__)())
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:  # what reads the output has seen enough, as in avl stats run.nc | head
        # Python flushes stdout once more at exit, which would raise again; what is left goes
        # nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:  # only what `explained` knows becomes a line; the rest is raised
        message = explained(error)
        if message is None:
            raise
        _fail(message)
    if code == _INTERRUPTED:
        print("avl: interrupted", file=sys.stderr)
    sys.exit(code)


def _add_commands(words: Sequence[str]) -> None:
    """Register the commands of other packages, unless the command line names one of ours.

    One that cannot be loaded is a line on stderr; the others work.
    """
    ours = {
        command.name or getattr(command.callback, "__name__", "")
        for command in app.registered_commands
    }
    if words and words[0] in ours:
        return
    with warnings.catch_warnings(record=True) as problems:
        # Shown also where the same warning was given before in this process.
        warnings.simplefilter("always", PluginWarning)
        commands = plugins(COMMANDS)
        for name, function in commands.items():
            # Another package cannot take the place of a command of this one.
            if name in ours:
                continue
            if callable(function):
                app.command(name)(function)
            else:
                left_out(COMMANDS, name, f"it names {function!r}, which is no function")
    for problem in problems:
        print(f"avl: warning: {printable(str(problem.message))}", file=sys.stderr)


def explained(error: Exception) -> str | None:
    """What to print for an exception that the program's user can do something about.

    None for any other one, which is a defect and keeps its traceback.

    Known are: input that cannot be used, models that cannot be recorded or are used in a way the
    hooks cannot follow, files that cannot be read or written, and the end of the memory.
    """
    from avl.families import UnsupportedModelError
    from avl.hooks import HookError

    if isinstance(error, (InputError, UnsupportedModelError, HookError)):
        return str(error)
    if isinstance(error, MemoryError) or _no_memory(error):
        return (
            f"there is not enough memory ({one_line(error)}): use a smaller --batch-size, fewer"
            " --layers or a smaller picture"
        )
    if isinstance(error, RecursionError):
        return f"the input is nested too deeply to be read ({one_line(error)})"
    if isinstance(error, OSError):
        where = "" if error.filename is None else f" {error.filename}"
        return f"the system refused to work with a file{where}: {error.strerror or one_line(error)}"
    return None


def _no_memory(error: Exception) -> bool:
    """Whether torch found no memory; on a CPU it says so by a plain RuntimeError."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )


def _fail(message: str) -> NoReturn:
    # One line, whatever breaks the message has.
    print(f"avl: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)


def _quiet() -> None:
    """Keep the libraries' own notices and progress bars out of the output.

    The commands show their own.
    """
    # What the user has set already stays.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*decompression bomb.*")


if __name__ == "__main__":
    main()
