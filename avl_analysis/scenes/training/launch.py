"""What the training commands share: one process per core, runs that resume, settings by name."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch


def open_run(checkpoint: Path, log: Path, line: dict[str, Any], resume: bool) -> None:
    """Begin or continue a run.

    Args:
        checkpoint: what the run resumes from; its folder is made if it does not exist.
        log: file of one JSON object a line.
        line: what the log gets first.
        resume: whether the checkpoint must be there (True) or must not be (False).

    Raises:
        FileNotFoundError: nothing to resume from.
        FileExistsError: there is a checkpoint already.
    """
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if resume and not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: nothing to resume from; run without --resume")
    if not resume and checkpoint.exists():
        raise FileExistsError(
            f"{checkpoint} is there already; continue it with --resume or choose another folder"
        )
    append(log, line)


def append(log: Path, line: dict[str, Any]) -> None:
    """Add one line to a log."""
    with open(log, "a") as file:
        file.write(json.dumps(line) + "\n")


def in_processes(
    run: Callable[..., None], arguments: tuple[Any, ...], count: int, meeting: Path
) -> None:
    """Call ``run(rank, *arguments, address)`` in ``count`` processes, or in this one.

    Args:
        run: what each process does; ``rank`` counts from 0.
        arguments: passed on as they are.
        count: number of processes of one thread each.
        meeting: file through which the processes find each other; ``address`` is its URL.
    """
    # An allocator that keeps freed memory is about 15 % faster; the processes inherit it.
    keep = str(2**33)
    for name, value in {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": keep,
        "MALLOC_TRIM_THRESHOLD_": keep,
    }.items():
        os.environ.setdefault(name, value)
    # The rendezvous of torch must not find the file of an earlier run.
    meeting.unlink(missing_ok=True)
    arguments = (*arguments, f"file://{meeting.resolve()}")
    if count > 1:
        torch.multiprocessing.spawn(run, arguments, nprocs=count)
    else:
        run(0, *arguments)


class SettingsOption:
    """``--set NAME=VALUE`` for the fields of a dataclass that have a default."""

    def __init__(self, parser: argparse.ArgumentParser, settings: Any, without: int = 0) -> None:
        """Add the option; the first ``without`` fields cannot be set with it."""
        self.parser = parser
        # The type of the default turns the text of an option into a value.
        self.kinds: dict[str, Any] = {
            field.name: type(field.default) for field in fields(settings)[without:]
        }
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"one of {', '.join(self.kinds)}",
        )

    def read(self, pairs: list[str]) -> dict[str, Any]:
        """The settings given, by name; an unknown name ends the program with a message."""
        given = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if len(given) != len(pairs) or not set(given) <= set(self.kinds):
            self.parser.error(
                f"--set {' '.join(pairs)}: give NAME=VALUE with a NAME of {', '.join(self.kinds)}"
            )
        return {name: self.kinds[name](value) for name, value in given.items()}
