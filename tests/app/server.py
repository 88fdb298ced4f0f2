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
from collections.abc import Iterator
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


@contextmanager
def server(log: Path, *arguments: str) -> Iterator[str]:
    """`avl app` on a free port; yields its address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        "from avl_app.cli import main; main()",
        "--no-browser",
        f"--port={port}",
        *arguments,
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env={**os.environ}
        )
        try:
            wait_for(f"http://localhost:{port}/_stcore/health", process)
            yield f"http://localhost:{port}"
        finally:
            process.kill()
            process.wait(30)


def wait_for(address: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Until the server answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode}")
        try:
            urllib.request.urlopen(address, timeout=2).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"no answer from {address} within {seconds} s")


def settled(page: Any, milliseconds: int = 240_000) -> None:
    """Wait until the page is drawn."""
    page.wait_for_timeout(150)
    page.wait_for_function(READY, timeout=milliseconds)
