"""Pictures of every view, light and dark: `python -m tests.benchmarks.screenshots folder [view
...]`.

The two in docs are made with `... docs ask --themes light` and `... docs live --themes dark
--tallest 1226 --address 'rivals=&step=13'`, and called dashboard-<view>-<theme>.png.

Starts the dashboard, opens links to views in a headless Chromium and saves each as a PNG as tall as
the page. Made for looking at: a page can be right in every test and still be hard to read.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from PIL import Image

from tests.app.server import chromium, server, settled

LINKS = {
    "ask": "view=ask",
    "heads": "view=heads&other=3.5",
    "patterns": "view=patterns&recording_of=scenes&per_task=3",
    "live": "view=live&rivals=random&step=4",
    "benchmark": "view=benchmark",
    "report": "view=report",
}
PRESSED = {
    "patterns": ("Record", "scenes are recorded"),
    "benchmark": ("Compare", "Comparison file"),
    "report": ("Build the report", "Page (HTML)"),
}
"""What is pressed before the picture is taken, and the text that then appears."""
WIDTH, COLOURS = 1360, 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "views", nargs="*", default=list(LINKS), help=f"of {', '.join(LINKS)}; default: all"
    )
    parser.add_argument("--themes", nargs="+", default=["light", "dark"], choices=["light", "dark"])
    parser.add_argument(
        "--address", default="", help="parameters put into every link, e.g. scene=3"
    )
    parser.add_argument(
        "--tallest", type=int, default=2600, help="pixels after which a page is cut off"
    )
    parser.add_argument(
        "--unpressed", action="store_true", help="as a view opens, without comparing or building"
    )
    given = parser.parse_args()
    if chromium() is None:
        raise SystemExit("no Chromium is installed, so nothing can be photographed")
    given.folder.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    with (
        tempfile.TemporaryDirectory() as log,
        server(Path(log) / "log.txt") as address,
        sync_playwright() as play,
    ):
        browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for theme in given.themes:
            page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme=theme)
            page.set_default_timeout(300_000)
            for view in given.views:
                link = urlencode(
                    {**dict(parse_qsl(LINKS[view])), **dict(parse_qsl(given.address, True))}
                )
                page.goto(f"{address}/?{link}", wait_until="domcontentloaded")
                settled(page)
                if view in PRESSED and not given.unpressed:
                    button, text = PRESSED[view]
                    page.get_by_role("button", name=button).click()
                    page.wait_for_selector(f"text={text}", timeout=600_000)
                print(
                    photograph(page, given.folder / f"{view}_{theme}.png", given.tallest),
                    flush=True,
                )
        browser.close()


def photograph(page: Any, path: Path, tallest: int) -> Path:
    """The whole page as a PNG with a palette, which keeps it small."""
    settled(page)
    page.mouse.move(WIDTH - 8, 8)  # no tooltip of what was pressed
    page.wait_for_timeout(1500)  # plots are drawn after the script has ended
    if page.locator('[data-testid="stAlertContentError"]').count():
        raise SystemExit(
            f"{path.stem} shows an error: {page.inner_text('[data-testid=stAlertContentError]')}"
        )
    height = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    page.set_viewport_size({"width": WIDTH, "height": min(max(height, 760), tallest)})
    page.wait_for_timeout(800)
    page.screenshot(path=path)
    page.set_viewport_size({"width": WIDTH, "height": 900})
    picture = Image.open(path).convert("RGB")
    few = picture.quantize(
        COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE
    )
    few.save(path, optimize=True)
    return path


if __name__ == "__main__":
    main()
