"""The dashboard in a process of its own and a real headless browser to look at it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
READY = """() => {
    const app = document.querySelector('[data-testid="stApp"]');
    return app && app.getAttribute('data-test-script-state') === 'notRunning'
        && document.querySelectorAll('[data-testid="stMarkdown"]').length > 1
        && !document.querySelector('[data-testid="stSkeleton"]')
        && !document.querySelector('[data-stale="true"]');
}"""
"""True once the page is drawn and nothing runs any more."""


def chromium() -> str | None:
    """Path of an installed Chromium, None if there is none."""
    return next(
        (
            path
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (path := shutil.which(name))
        ),
        None,
    )


TRIES = 5
"""How often a port is taken anew: another process may take a free one before the server does."""


@contextmanager
def server(
    log: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """`avl app` on a free port, with other variables if given; yields its address."""
    with log.open("w") as output:
        for _ in range(TRIES):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "from avl_app.cli import main; main()",
                    "--no-browser",
                    f"--port={port}",
                    *arguments,
                ],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(os.environ if environment is None else environment),
            )
            try:
                if answers(f"http://localhost:{port}/_stcore/health", process):
                    yield f"http://localhost:{port}"
                    return
            finally:
                process.kill()
                process.wait()
            if "not available" not in log.read_text() and "in use" not in log.read_text():
                break
    raise RuntimeError(f"the server ended with code {process.returncode}: {log.read_text()}")


def answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the server answers (True) or ends (False); the test's own limit holds."""
    while process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=10).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
        else:
            return True
    return False


def settled(page: Any, milliseconds: int = 240_000) -> None:
    """Wait until the page is drawn."""
    page.wait_for_timeout(150)
    page.wait_for_function(READY, timeout=milliseconds)
