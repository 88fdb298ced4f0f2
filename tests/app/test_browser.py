"""The dashboard in a real browser, from the first screen to a downloaded report, without a single console error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import avl
from app.examples import questions
from avl_analysis import load_model
from tests.app.server import chromium, server, settled

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need the extra [test]")
pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(chromium() is None, reason="no Chromium is installed"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("server") / "log.txt") as where:
        yield where


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield opened
        opened.close()


class Visitor:
    """A browser window of its own, with everything the page complained about."""

    def __init__(self, browser: Any, address: str) -> None:
        self.context = browser.new_context(viewport={"width": 1400, "height": 1000}, accept_downloads=True)
        self.context.set_default_timeout(300_000)  # the machine may be busy
        self.page, self.address, self.complaints = self.context.new_page(), address, []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))

    def go(self, link: str = "") -> Visitor:
        self.page.goto(f"{self.address}/?{link}", wait_until="domcontentloaded")
        settled(self.page)
        return self

    def says(self, text: str) -> bool:
        return text in self.page.inner_text("body")

    def answer(self, policy: str) -> str:
        """The answer below a policy's name in A-VL live."""
        columns = self.page.locator('[data-testid="stColumn"]')
        texts = [columns.nth(i).inner_text() for i in range(columns.count())]
        return next(text.partition("\n")[2].strip() for text in texts if text.partition("\n")[0] == policy)


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Visitor]:
    one = Visitor(browser, address)
    yield one
    one.context.close()


def test_from_the_first_screen_to_a_report_without_console_errors(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.go().page
    assert visitor.says("of its attention to the picture")

    # another token
    page.locator(".st-key-token [role=radio]").nth(2).click()
    settled(page)
    assert "token=2" in page.url

    # a head, by a click on the map
    page.locator(".st-key-view [role=radio]").nth(1).click()
    page.wait_for_selector("text=Compare with")
    settled(page)
    cells = page.locator(".st-key-head_map .nsewdrag").first
    cells.scroll_into_view_if_needed()
    page.wait_for_timeout(1500)  # the plot takes its place after the script has ended
    box = cells.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.5)
    page.wait_for_selector("text=Layer 2, head 1")
    settled(page)
    assert "layer=2" in page.url
    assert "head=1" in page.url

    # A-VL off and on, and its patches played
    patches = "text=What happens to every patch"
    visitor.go("view=live&task=ocr")
    page.wait_for_selector(patches)
    page.locator(".st-key-avl_on label").first.click()
    page.wait_for_selector(patches, state="detached")
    page.locator(".st-key-avl_on label").first.click()
    page.wait_for_selector(patches)
    settled(page)
    assert visitor.says("After the prompt")
    page.locator(".st-key-playing label").first.click()
    page.wait_for_function("() => document.body.innerText.includes('After decode step 2')")
    page.locator(".st-key-playing label").first.click()
    settled(page)

    # a report
    visitor.go("view=report&task=ocr")
    page.get_by_role("button", name="Build the report").click()
    page.wait_for_selector("text=Page (HTML)", timeout=600_000)
    settled(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Page (HTML)").click()
    saved = tmp_path / "report.html"
    download.value.save_as(saved)
    assert saved.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    assert visitor.complaints == []


def test_two_visitors_at_once_get_the_answers_they_get_alone(browser: Any, address: str) -> None:
    links = {
        "full cache": "view=ask&scene=3&task=caption",
        "A-VL": "view=live&scene=3&task=caption&secondary=0.3&core=0.2&preset=custom",
    }
    visitors = {name: Visitor(browser, address) for name in links}
    for name, visitor in visitors.items():  # both ask before either has an answer
        visitor.page.goto(f"{address}/?{links[name]}", wait_until="domcontentloaded")
    visitors["A-VL"].page.wait_for_selector("text=What happens to every patch")
    for visitor in visitors.values():
        settled(visitor.page)
    pills = visitors["full cache"].page.locator(".st-key-token [role=radio]").all_inner_texts()
    together = " ".join(pills), visitors["A-VL"].answer("full cache"), visitors["A-VL"].answer("A-VL")
    for visitor in visitors.values():
        visitor.context.close()

    vlm, sample = load_model("scenes"), questions(3)["caption"]
    alone = str(vlm.answer(sample.picture, sample.prompt))
    with avl.adaptive(vlm.model, avl.AdaptivePolicy(secondary=0.3, core=0.2)):
        adapted = str(vlm.answer(sample.picture, sample.prompt))
    assert letters(together[0]) == letters(alone)
    assert letters(together[1]) == letters(alone)
    assert letters(together[2]) == letters(adapted)


def letters(text: str) -> str:
    """A text without spaces and signs for them, which pages set differently."""
    return "".join(text.replace("␣", "").split())
