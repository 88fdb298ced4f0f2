"""Runs commands in forks of one process that has imported everything, and kills them when told.

A command starts at once, so that many can be run; what it does is what it always does. Needs a
system with fork and /proc. `Forked` starts the process and talks to it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMPORTED = (
    "avl_analysis.calibration.calibrate",
    "avl_analysis.corpus.sharded_run",
    "avl_analysis.evaluation.frontier",
    "avl_analysis.heads.knockout",
    "avl_reports.build",
)
"""What commands import when they need it."""
TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; None if it was killed.
        said: what it wrote to standard output and standard error.
        seconds: processor time that it and the processes it had started took.
        left: processes it had started that did not end by themselves within a minute.
    """

    code: int | None
    said: str
    seconds: float
    left: int


class Forked:
    """The process in which commands are forked."""

    def __init__(self, folder: Path) -> None:
        """Start it; `folder` takes what commands say."""
        self._said = folder / "said.txt"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.avl_analysis.cli.forked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )

    def run(
        self, *arguments: object, kill_after: float | None = None, largest_file: int | None = None
    ) -> Ended:
        """Run `avl` with arguments.

        Args:
            arguments: as on the command line.
            kill_after: processor time after which it is killed, in seconds.
            largest_file: bytes beyond which no file can be written.
        """
        job = {
            "arguments": [str(argument) for argument in arguments],
            "said": str(self._said),
            "kill_after": kill_after,
            "largest_file": largest_file,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Ended(said=self._said.read_text(errors="replace"), **answer)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        with self._process:  # closes its pipes, which ends it
            self._process.stdin.close()


def _times(session: int) -> dict[int, float]:
    """Processor time of each process of a session that has not ended, in seconds."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(entry.name)] = (int(fields[11]) + int(fields[12])) * TICK
    return found


def _run(job: dict[str, Any]) -> dict[str, Any]:
    process = os.fork()
    if process == 0:
        _command(job)
    seconds, killed, status = 0.0, False, 0
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            break
        seconds = max(seconds, sum(_times(process).values()))
        if job["kill_after"] is not None and seconds >= job["kill_after"]:
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            killed = os.WIFSIGNALED(status)
            break
        time.sleep(0.005)
    end = time.monotonic() + 60
    while (left := _times(process)) and time.monotonic() < end:
        time.sleep(0.05)
    for other in left:
        os.kill(other, signal.SIGKILL)
    code = None if killed else os.waitstatus_to_exitcode(status)
    return {"code": code, "seconds": seconds, "left": len(left)}


def _command(job: dict[str, Any]) -> None:
    """What the forked process does; it does not return."""
    from avl_analysis.cli.main import main

    code: Any = 1
    try:
        os.setsid()  # processes it starts are found by their session
        said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(said, stream)
        if job["largest_file"] is not None:
            # Python ignores the signal of this limit, so that a write beyond it is an OSError.
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
        main(job["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import torch

    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
