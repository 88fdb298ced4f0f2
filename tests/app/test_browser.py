"""The dashboard in a real browser, from the first screen to a downloaded report, without a single
console error.
"""

from __future__ import annotations

import contextlib
import io
import re
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import avl
from avl_analysis import load_model
from avl_app.examples import questions
from tests.app.server import chromium, server, settled
from tests.offline import Offline

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need the extra [test]"
)
pytest.importorskip("streamlit", reason="the dashboard needs the extra [app]")

LONG = 600_000
"""Milliseconds anything may take; the machine may be busy with other tests."""

NASTY = (
    "<img src=x onerror=alert(1)> [a](javascript:alert(1)) **b** $c$ :red[d]"
    " <script>alert(1)</script>"
)
NASTY_LINK = urllib.parse.urlencode(
    {
        "task": "own question",
        "prompt": NASTY,
        "longest": "4",
        "more": "<img src=x onerror=alert(1)>",
    }
)
FOREIGN = "img[src=x], a[href^='javascript'], h1 b, h3 strong"
"""What NASTY would become if it were taken for markup."""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(chromium() is None, reason="no Chromium is installed"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that cannot connect to anything, and has not tried to."""
    folder = tmp_path_factory.mktemp("server")
    offline = Offline(folder / "offline")
    with server(folder / "log.txt", environment=offline.environment) as where:
        yield where
    assert offline.tried() == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield opened
        opened.close()


class Visitor:
    """A browser window of its own, with everything the page complained about."""

    def __init__(
        self,
        browser: Any,
        address: str,
        *,
        width: int = 1400,
        height: int = 1000,
        theme: str = "light",
    ) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            accept_downloads=True,
            color_scheme=theme,
            has_touch=width < 500,
            is_mobile=width < 500,
        )
        self.context.set_default_timeout(LONG)
        self.page, self.address, self.complaints = self.context.new_page(), address, []
        self.dialogs = 0
        self.page.on("dialog", self._dialog)
        self.page.on(
            "console", lambda m: self.complaints.append(m.text) if m.type == "error" else None
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", self._failed)

    def _dialog(self, dialog: Any) -> None:
        self.dialogs += 1
        dialog.dismiss()

    def _failed(self, request: Any) -> None:
        if (
            request.failure != "net::ERR_ABORTED"
        ):  # what is under way when the test opens another link is dropped
            self.complaints.append(f"failed: {request.url} ({request.failure})")

    def go(self, link: str, text: str) -> Visitor:
        """Open a link and wait until a text is there."""
        self.page.goto(f"{self.address}/?{link}", wait_until="domcontentloaded")
        self.sees(text)
        settled(self.page, LONG)
        return self

    def sees(self, text: str, *, gone: bool = False) -> None:
        """Wait until a text is on the page, or no more."""
        self.page.wait_for_selector(f"text={text}", state="detached" if gone else "visible")

    def links(self, pattern: str) -> None:
        """Wait until the address matches."""
        self.page.wait_for_url(re.compile(pattern))

    def answer(self, policy: str) -> str:
        """The answer below a policy's name in A-VL live."""
        columns = self.page.locator('[data-testid="stColumn"]')
        # without the words that the answer leaves out
        own = "e => { e = e.cloneNode(true); e.querySelectorAll('del').forEach(d => d.remove());"
        own += " document.body.append(e); const text = e.innerText; e.remove(); return text; }"
        texts = [columns.nth(i).evaluate(own) for i in range(columns.count())]
        return next(
            text.partition("\n")[2].strip() for text in texts if text.partition("\n")[0] == policy
        )


@pytest.fixture
def visitor(browser: Any, address: str) -> Iterator[Visitor]:
    one = Visitor(browser, address)
    yield one
    complaints = list(one.complaints)
    one.context.close()
    assert complaints == []


def until(act: Callable[[], None], there: Callable[[], bool], page: Any) -> None:
    """Act again every few seconds until it has had its effect: what is just being redrawn swallows
    clicks.
    """
    for _ in range(60):
        with contextlib.suppress(sync_api.TimeoutError):
            act()
        for _ in range(20):
            if there():
                return
            page.wait_for_timeout(250)
    raise AssertionError("the page did not react")


def click(place: Any, there: Callable[[], bool]) -> None:
    """Click until it has had its effect."""
    until(lambda: place.click(timeout=5000), there, place.page)


def switch(page: Any, key: str, on: bool) -> None:
    """Put a toggle on or off."""
    box, label = page.locator(f".st-key-{key} input"), page.locator(f".st-key-{key} label").first
    until(
        lambda: None if box.is_checked() == on else label.click(timeout=5000),
        lambda: box.is_checked() == on,
        page,
    )


def test_a_token_of_the_first_screen_is_clicked(visitor: Visitor) -> None:
    page = visitor.go("", "The words it looked at").page
    assert "of its attention to the picture" in page.inner_text("body")
    header = page.locator('[data-testid="stHeader"]').bounding_box()
    views = page.locator(".st-key-view").bounding_box()
    assert views["y"] >= header["y"] + header["height"]
    before = page.locator("h4").first.inner_text()
    click(page.locator(".st-key-token [role=radio]").nth(2), lambda: "token=2" in page.url)
    sync_api.expect(page.locator("h4").first).not_to_have_text(before, timeout=LONG)


def test_a_conversation_is_led_and_led_back_in_the_browser(visitor: Visitor) -> None:
    page = visitor.go("task=colour", "The words it looked at").page
    field = page.locator(".st-key-further textarea")
    field.fill("What shapes do you see?")
    field.press("Enter")
    visitor.links("earlier=")
    visitor.sees("Ask this alone")
    settled(page, LONG)
    assert page.locator("h3", has_text="What shapes do you see?").count() == 1
    assert page.locator(".st-key-further textarea").input_value() == ""
    page.go_back()
    visitor.sees("Ask this alone", gone=True)
    settled(page, LONG)
    assert "earlier" not in page.url


def test_keys_alone_choose_another_token_and_another_view(visitor: Visitor) -> None:
    page = visitor.go("task=ocr&token=0", "The words it looked at").page

    def press() -> None:
        page.locator(".st-key-token [role=radio]").nth(0).focus(timeout=5000)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")

    until(press, lambda: "token=1" in page.url, page)


def test_a_head_is_clicked_on_the_map(visitor: Visitor) -> None:
    page = visitor.go("view=heads&task=ocr&layer=4&head=3", "Layer 4, head 3").page
    cells = page.locator(".st-key-head_map .nsewdrag").first

    def click_cell() -> None:
        cells.scroll_into_view_if_needed(timeout=5000)
        box = cells.bounding_box(timeout=5000)
        if box is not None:
            page.mouse.click(box["x"] + box["width"] * 1.5 / 6, box["y"] + box["height"] * 2.5 / 5)

    until(click_cell, lambda: "Layer 2, head 1" in page.inner_text("body"), page)
    visitor.links("head=1")
    assert "layer=2" in page.url


def test_a_vl_is_toggled_and_its_patches_are_played(visitor: Visitor) -> None:
    patches = "What happens to every patch"
    page = visitor.go("view=live&task=ocr", patches).page
    switch(page, "avl_on", False)
    visitor.sees(patches, gone=True)
    settled(page, LONG)
    switch(page, "avl_on", True)
    visitor.sees("After the prompt")
    settled(page, LONG)
    switch(page, "playing", True)
    for step in (1, 2):
        page.wait_for_function(
            f"() => document.body.innerText.includes('After decode step {step}')"
        )
    switch(page, "playing", False)


def test_a_report_is_built_previewed_and_downloaded(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.go(f"view=report&{NASTY_LINK}", "Build the report").page
    page.get_by_label("Title").fill(NASTY)
    page.get_by_label("Title").press("Enter")
    settled(page, LONG)
    built = page.locator("text=/Building the report|The report is ready|No report/")
    click(page.get_by_role("button", name="Build the report"), lambda: built.count() > 0)
    page.wait_for_selector("text=Page (HTML)", timeout=2 * LONG)
    settled(page, LONG)
    for button, start in {
        "Page (HTML)": b"<!doctype html>",
        "PDF": b"%pdf",
        "Everything (ZIP)": b"pk",
    }.items():
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        download.value.save_as(tmp_path / "report")
        assert (tmp_path / "report").read_bytes().lstrip()[:15].lower().startswith(start)
    preview = page.frame_locator("iframe").first
    preview.locator("h1", has_text="onerror").wait_for()
    for name in ("numbers (CSV)", "SVG", "PNG"):  # and the preview stays what it is
        with page.expect_download() as download:
            preview.locator(".files").first.get_by_text(name, exact=True).click()
        assert download.value.path().stat().st_size > 100
        assert preview.locator("h1", has_text="onerror").count() == 1
    assert sum(frame.locator(FOREIGN).count() for frame in page.frames) == 0
    assert visitor.dialogs == 0


def test_a_question_is_shown_as_it_was_written_everywhere(visitor: Visitor) -> None:
    page = visitor.page
    ends = {
        "ask": "The words it looked at",
        "heads": "Compare with",
        "live": "What happens to every patch",
    }
    for view, text in ends.items():
        visitor.go(f"view={view}&{NASTY_LINK}", text)
        assert view != "ask" or NASTY in page.inner_text("body")
        assert page.locator(FOREIGN).count() == 0
    assert visitor.dialogs == 0


def test_a_comparison_is_cancelled_and_the_model_is_free_again(visitor: Visitor) -> None:
    page = visitor.go("view=benchmark&count=200&task=ocr", "Nothing is compared yet").page
    cancel = page.get_by_role("button", name="Cancel")
    click(page.get_by_role("button", name="Compare"), lambda: cancel.count() > 0)
    click(cancel, lambda: cancel.count() == 0)
    visitor.sees("Nothing is compared yet")
    visitor.go("scene=77&task=ocr", "The words it looked at")


def test_two_visitors_at_once_get_the_answers_they_get_alone(browser: Any, address: str) -> None:
    links = {
        "full cache": "view=ask&scene=3&task=caption",
        "A-VL": "view=live&scene=3&task=caption&secondary=0.3&core=0.2&preset=custom",
    }
    visitors = {name: Visitor(browser, address) for name in links}
    for name, visitor in visitors.items():  # both ask before either has an answer
        visitor.page.goto(f"{address}/?{links[name]}", wait_until="domcontentloaded")
    visitors["full cache"].sees("The words it looked at")
    visitors["A-VL"].sees("What happens to every patch")
    for visitor in visitors.values():
        settled(visitor.page, LONG)
    pills = visitors["full cache"].page.locator(".st-key-token [role=radio]").all_inner_texts()
    together = (
        " ".join(pills),
        visitors["A-VL"].answer("full cache"),
        visitors["A-VL"].answer("A-VL"),
    )
    for visitor in visitors.values():
        assert visitor.complaints == []
        visitor.context.close()

    vlm, sample = load_model("scenes"), questions(3)["caption"]
    alone = str(vlm.answer(sample.picture, sample.prompt))
    with avl.adaptive(vlm.model, avl.AdaptivePolicy(secondary=0.3, core=0.2)):
        adapted = str(vlm.answer(sample.picture, sample.prompt))
    assert letters(together[0]) == letters(alone)
    assert letters(together[1]) == letters(alone)
    assert letters(together[2]) == letters(adapted)


# -- what hands do --------------------------------------------------------------------------------


def test_a_repeated_word_is_chosen_where_it_is_clicked(visitor: Visitor) -> None:
    page = visitor.go("task=caption&token=5", "The words it looked at").page
    pills = page.locator(".st-key-token [role=radio]")
    words = [letters(text) for text in pills.all_inner_texts()]
    repeated = [place for place, word in enumerate(words) if words.count(word) > 1]
    assert len(repeated) > 4
    for place in (repeated[0], repeated[1]):
        click(pills.nth(place), lambda place=place: f"token={place}" in page.url)
        sync_api.expect(pills.nth(place)).to_have_attribute("aria-checked", "true", timeout=LONG)
        title = page.locator("h4").first
        sync_api.expect(title).to_contain_text(f"To write “{words[place]}”", timeout=LONG)


def test_keys_pressed_quickly_all_move_a_setting(visitor: Visitor) -> None:
    page = visitor.go("view=live&task=colour", "What happens to every patch").page
    page.get_by_text("Every setting").click()
    slider = page.locator(".st-key-secondary input[type=range]")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    visitor.links("secondary=0.45")
    settled(page, LONG)
    sync_api.expect(slider).to_have_attribute("aria-valuetext", "0.45", timeout=LONG)
    assert "secondary=0.45" in page.url


def test_back_and_forward_lead_through_what_was_looked_at(visitor: Visitor) -> None:
    page = visitor.go("task=colour", "The words it looked at").page
    for view, text in (("Heads", "Compare with"), ("Patterns", "How is attention divided")):
        click(page.get_by_role("radio", name=view), lambda view=view: view.lower() in page.url)
        visitor.sees(text)
        settled(page, LONG)
    page.go_back()
    visitor.sees("Compare with")
    settled(page, LONG)
    assert "view=heads" in page.url
    page.go_back()
    visitor.sees("The words it looked at")
    settled(page, LONG)
    assert "view=" not in page.url
    page.go_forward()
    visitor.sees("Compare with")


def test_a_patch_is_pointed_at_clicked_and_several_are_framed(visitor: Visitor) -> None:
    page = visitor.go("task=ocr&readers=1&token=0", "No patch is chosen yet").page
    overlay = page.locator(".st-key-overlay .nsewdrag").first
    overlay.scroll_into_view_if_needed()
    overlay.hover()
    hover = page.locator(".st-key-overlay .hoverlayer").first
    page.wait_for_function(
        "element => element.textContent.includes('attention')", arg=hover.element_handle()
    )
    assert re.search(r"image token \d+.*attention: \d", hover.text_content() or "", re.DOTALL)
    # plotly's tools stand above the picture
    tools = page.locator(".st-key-overlay .modebar-btn")
    assert [tool.get_attribute("data-title") for tool in tools.all()][-1] == "Fullscreen"
    bottom = max(box["y"] + box["height"] for box in (t.bounding_box() for t in tools.all()))
    assert bottom <= overlay.bounding_box()["y"] + 1

    def place(key: str, across: float, down: float) -> tuple[float, float]:
        chart = page.locator(f".st-key-{key} .nsewdrag").first
        chart.scroll_into_view_if_needed(timeout=5000)
        box = chart.bounding_box(timeout=5000)
        return box["x"] + across * box["width"], box["y"] + down * box["height"]

    # the 12 x 12 patches of a scene: the middle of the fourth in the third row
    until(
        lambda: page.mouse.click(*place("patch_map", 3.5 / 12, 2.5 / 12)),
        lambda: "patches=27" in page.url,
        page,
    )
    visitor.sees("1 of 144 patches")
    settled(page, LONG)
    switch(page, "framing", True)
    settled(page, LONG)

    def frame() -> None:
        page.mouse.move(*place("patch_frame", 0.2 / 12, 0.2 / 12))
        page.mouse.down()
        page.mouse.move(*place("patch_frame", 1.0 / 12, 1.5 / 12), steps=4)
        page.mouse.move(*place("patch_frame", 1.8 / 12, 1.8 / 12), steps=4)
        page.mouse.up()

    until(frame, lambda: "patches=0%2C1%2C12%2C13" in page.url, page)
    visitor.sees("4 of 144 patches")


def test_an_answer_is_cancelled_and_had_after_all(visitor: Visitor) -> None:
    page, cancelled = visitor.page, visitor.page.get_by_text("The answer was cancelled.")
    for scene in range(70, 90):  # an answer may be there before it can be cancelled
        link = f"{visitor.address}/?task=caption&scene={scene}"
        page.goto(link, wait_until="domcontentloaded")
        with contextlib.suppress(sync_api.TimeoutError):
            page.get_by_role("button", name="Cancel").click(timeout=10_000)
            cancelled.wait_for(timeout=20_000)
            break
    settled(page, LONG)
    assert cancelled.is_visible()
    page.get_by_role("button", name="Answer after all").click()
    visitor.sees("The words it looked at")
    assert not cancelled.is_visible()


def test_a_figure_and_its_numbers_are_downloaded(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.go("task=ocr&token=0", "The words it looked at").page
    starts = {"SVG": b"<?xml", "CSV": b"panel,x,y,value"}
    menu = page.locator(".st-key-keep_ask").get_by_role("button", name="Download")
    for kind, start in starts.items():
        file = page.locator(f".st-key-ask_{kind.lower()} button")
        until(lambda: menu.click(timeout=5000), file.is_visible, page)
        with page.expect_download(timeout=LONG) as download:
            file.click()
        assert download.value.suggested_filename == f"token.{kind.lower()}"
        assert download.value.path().read_bytes().startswith(start)
        page.keyboard.press("Escape")
        settled(page, LONG)


def test_on_a_telephone_the_picture_comes_early_and_nothing_is_covered(
    browser: Any, address: str
) -> None:
    visitor = Visitor(browser, address, width=390, height=844)
    page = visitor.go("task=caption", "The words it looked at").page
    header = page.locator('[data-testid="stHeader"]').bounding_box()
    views = page.locator(".st-key-view").bounding_box()
    assert views["y"] >= header["y"] + header["height"]
    assert views["x"] + views["width"] <= 390
    picture = page.locator(".st-key-picture").bounding_box()
    assert picture["y"] + 100 < 844
    # what changes the picture follows it, before what is seldom wanted
    follow = [".st-key-layer", ".st-key-further", ".st-key-readers"]
    places = [page.locator(key).bounding_box()["y"] for key in follow]
    assert picture["y"] < places[0] < places[1] < places[2]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    visitor.go("view=live&task=ocr", "What happens to every patch")
    assert page.locator('[data-testid="stElementToolbar"]:visible').count() == 0
    assert page.locator(".nsewdrag").count() > 2
    assert page.locator(".modebar-btn:visible").count() == 0
    assert visitor.complaints == []
    visitor.context.close()


CONTRASTS = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_word_can_be_read(browser: Any, address: str, theme: str) -> None:
    visitor = Visitor(browser, address, theme=theme)
    for link, text in {
        "task=caption": "The words it looked at",
        "view=heads&task=ocr": "Compare with",
        "view=live&task=ocr&secondary=0.2&core=0.05&preset=custom": "What happens to every patch",
        "view=benchmark": "Nothing is compared yet",
        "view=report": "Build the report",
    }.items():
        visitor.go(link, text)
        faint: list[object] = []
        for _ in range(20):  # what has just been drawn fades in
            if not (faint := visitor.page.evaluate(CONTRASTS)):
                break
            visitor.page.wait_for_timeout(500)
        assert faint == [], link
    visitor.context.close()


def test_a_flat_picture_and_a_tall_one_are_asked_about(visitor: Visitor) -> None:
    page = visitor.go("source=upload&longest=3", "Send a picture").page
    for size in ((4000, 10), (10, 3000)):
        file = io.BytesIO()
        Image.new("RGB", size, "red").save(file, "PNG")
        page.locator('[data-testid="stFileUploaderDropzoneInput"]').set_input_files(
            {"name": f"{size[0]}.png", "mimeType": "image/png", "buffer": file.getvalue()}
        )
        visitor.sees(f"{size[0]}.png")
        visitor.sees("The words it looked at")
        settled(page, LONG)
        assert page.get_by_text("could not be drawn").count() == 0


def letters(text: str) -> str:
    """A text without spaces and signs for them, which pages set differently."""
    return "".join(text.replace("␣", "").replace("\u2060", "").split())
