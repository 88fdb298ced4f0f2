"""How soon the first screen is there, and how long a change of view takes: `python -m
tests.benchmarks.dashboard`.

Starts the dashboard as `avl app` does, opens it in a headless Chromium, and measures in the
browser: from starting the process to the first screen with its answer (targets: at most 10 s on two
cores), then changes of view after everything has been answered once (at most 1 s, median).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.app.server import READY, chromium, server, settled

VIEWS = ("Heads", "Patterns", "A-VL live", "Benchmark", "Report", "Ask")
DRAWN = {
    "Ask": "The words it looked at",
    "Heads": "Compare with",
    "Patterns": "How is attention divided",
    "A-VL live": "What happens to every patch",
    "Benchmark": "Nothing is compared yet",
    "Report": "Build the report",
}
"""Text that is on the page once the view is drawn."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all views")
    rounds = parser.parse_args().rounds
    browser_path = chromium()
    if browser_path is None:
        raise SystemExit("no Chromium is installed, so nothing can be measured")
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(300_000)
        print(f"load of this machine before     {load()}")
        start = time.perf_counter()
        with server(Path(folder) / "log.txt") as address:
            up = time.perf_counter() - start
            page.goto(address, wait_until="domcontentloaded")
            drawn(page, "Ask")
            first = time.perf_counter() - start
            print(f"server answers after            {up:6.2f} s")
            print(f"first screen answered after     {first:6.2f} s   (target 10 s)")
            times: dict[str, list[float]] = {view: [] for view in VIEWS}
            for number in range(rounds + 1):
                for view in VIEWS:
                    settled(page)
                    start = time.perf_counter()
                    page.locator(".st-key-view").get_by_role("radio", name=view).click()
                    drawn(page, view)
                    if number:  # the first round answers and records
                        times[view].append(time.perf_counter() - start)
            for view, seconds in times.items():
                print(
                    f"change to {view:<12} median {statistics.median(seconds):6.2f} s   worst"
                    f" {max(seconds):6.2f} s"
                )
            everything = [second for seconds in times.values() for second in seconds]
            print(
                f"all changes of view  median {statistics.median(everything):6.2f} s   (target 1 s)"
            )
        print(f"load of this machine after      {load()}")
        browser.close()


def load() -> str:
    """Processes that run or wait to, mean over 1 and 5 minutes; times mean little far above cores.

    In words for people, with the number of cores.
    """
    one, five, _ = os.getloadavg()
    return f"{one:.1f}, {five:.1f} over 5 minutes, on {os.cpu_count()} cores"


def drawn(page: Any, view: str) -> None:
    """Wait until a view is drawn and nothing runs any more; looked at every 20 ms, in the page."""
    there = f"text => ({READY})() && document.body.innerText.includes(text)"
    page.wait_for_function(there, arg=DRAWN[view], polling=20, timeout=300_000)


if __name__ == "__main__":
    main()
