"""The page in a real browser, without a network: no errors, every plot drawn, both themes, any
width.
"""

from dataclasses import replace

import pytest

from avl.policies import registry
from avl_reports import fig_modality
from avl_reports.build import build
from tests.app.server import chromium
from tests.reports import made

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need the extra [test]"
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(600),
    pytest.mark.skipif(chromium() is None, reason="no Chromium is installed"),
]

WAIT = 300_000  # milliseconds; a busy machine draws slowly


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return build(
        made.recording(hostile=True),
        folder,
        comparison=made.comparison(),
        frontier=crowded(),
        formats=(),
        document=False,
    ).page


def crowded():
    """A frontier of every policy there is, which fills the legend of a narrow plot."""
    few = made.frontier(hostile=True)
    rival = [line for line in few.lines if line["policy"] == "random"]
    more = [{**line, "policy": name} for name in registry.policies() for line in rival]
    return replace(few, lines=[*few.lines, *(line for line in more if line["policy"] != "random")])


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def opened(browser, page_file):
    """The page on a wide light screen, and what it said while it was opened."""
    context = browser.new_context(
        viewport={"width": 1200, "height": 900}, color_scheme="light", offline=True
    )
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append((message.type, message.text)))
    page.on("pageerror", lambda error: said.append(("error", str(error))))
    page.on("dialog", lambda dialog: (said.append(("dialog", dialog.message)), dialog.dismiss()))
    page.on("request", lambda request: said.append(("request", request.url)))
    page.goto(page_file.as_uri(), timeout=WAIT)
    page.wait_for_selector("html[data-ready=yes]", timeout=WAIT)
    yield page, said
    context.close()


def test_the_page_opens_without_errors_and_asks_for_nothing(opened, page_file):
    _, said = opened
    own = [
        text for kind, text in said if kind == "request" and not text.startswith(("data:", "blob:"))
    ]
    assert own == [page_file.as_uri()]
    assert [entry for entry in said if entry[0] != "request"] == []


def test_every_plot_is_drawn(opened):
    page, _ = opened
    empty = page.evaluate(
        "[...document.querySelectorAll('.plot')].filter(p =>"
        " !p.querySelector('svg.main-svg')).length"
    )
    count = page.evaluate("document.querySelectorAll('.plot').length")
    assert count > 15
    assert empty == 0


def test_the_theme_can_be_changed_and_reaches_the_plots(opened):
    page, said = opened
    colour = (
        "getComputedStyle(document.body).backgroundColor + document.querySelector('.plot .xtick"
        " text').style.fill"
    )
    before = page.evaluate(colour)
    page.evaluate("delete document.documentElement.dataset.ready")
    page.click("#theme")
    page.wait_for_selector("html[data-ready=yes]", timeout=WAIT)
    after = page.evaluate(colour)
    assert before != after
    assert "rgb(230, 232, 235)" in after
    assert not [entry for entry in said if entry[0] in ("error", "dialog")]


def test_an_animation_plays(opened):
    page, _ = opened
    label = ".panels.animated .slider-current-value, .panels.animated .slider-label"
    before = page.locator(label).first.text_content()
    page.evaluate(
        "Plotly.animate(document.querySelector('.panels.animated .plot'), ['2'], {mode:"
        " 'immediate'})"
    )
    changed = "([query, old]) => document.querySelector(query).textContent !== old"
    page.wait_for_function(changed, arg=[label, before], timeout=60_000)


def test_a_narrow_screen_needs_no_sideways_scrolling(opened):
    page, _ = opened
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function("document.documentElement.scrollWidth <= 390", timeout=60_000)


OVER = """() => [...document.querySelectorAll('.plot')].filter((plot) => {
    const [legend, title] = ['.legend', '.xtitle'].map((part) => plot.querySelector(part));
    if (!legend || !title) return false;
    const [a, b] = [legend, title].map((element) => element.getBoundingClientRect());
    return a.top < b.bottom && b.top < a.bottom && a.left < b.right && b.left < a.right;
}).map((plot) => plot.dataset.plot)"""
"""Plots whose legend lies over the name of their axis."""


@pytest.mark.parametrize("width", [1200, 390])
def test_no_legend_lies_over_the_name_of_an_axis_or_has_to_be_scrolled(opened, width):
    page, _ = opened
    page.set_viewport_size({"width": width, "height": 900})
    # plotly draws anew some time after the width has changed
    page.wait_for_function(f"() => ({OVER})().length === 0", timeout=60_000)
    assert page.locator("[data-plot=plot-glance-frontier] .legend .traces").count() > 15
    bars = page.locator(".plot .legend .scrollbar")
    assert all(float(bar.get_attribute("height") or 0) == 0 for bar in bars.all())


SEEN = """() => [...document.querySelectorAll('.modebar')].filter((bar) => {
    // plotly fades the groups of a bar; they are not seen at opacity 0
    const groups = [...bar.querySelectorAll('.modebar-group')];
    return bar.getClientRects().length && groups.some((g) => getComputedStyle(g).opacity > 0.05);
}).map((bar) => {
    const bounds = (element) => element.getBoundingClientRect();
    const plot = bar.closest('.plot');
    const areas = [...plot.querySelectorAll('.plot-container .nsewdrag')].map(bounds);
    const tools = [...bar.querySelectorAll('.modebar-btn')].map(bounds);
    const covers = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
        && a.top < b.bottom - 1 && b.top < a.bottom - 1;
    return [plot.id || plot.dataset.plot, areas.some((a) => tools.some((b) => covers(a, b)))];
})"""
"""Tool bars that are seen: plot, and whether a button lies over the data."""


def test_the_tool_bar_is_there_under_a_pointer_only_and_never_over_data(opened):
    page, _ = opened
    page.set_viewport_size({"width": 1200, "height": 900})
    page.mouse.move(2, 2)
    page.wait_for_function(f"() => ({SEEN})().length === 0", timeout=60_000)
    plots = page.locator(".plot:has(.modebar)")
    assert plots.count() > 3
    for number in range(plots.count()):
        plot = plots.nth(number)
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_function(f"() => ({SEEN})().length === 1", timeout=60_000)
        # one that fades out may be seen for a moment more
        covering = [name for name, covers in page.evaluate(SEEN) if covers]
        assert covering == []
    page.mouse.move(2, 2)


def test_a_touch_screen_has_no_tool_bar(browser, page_file):
    context = browser.new_context(
        viewport={"width": 820, "height": 1180}, has_touch=True, is_mobile=True, offline=True
    )
    page = context.new_page()
    page.goto(page_file.as_uri(), timeout=WAIT)
    page.wait_for_selector("html[data-ready=yes]", timeout=WAIT)
    assert page.locator(".plot .nsewdrag").count() > 3
    page.locator(".plot .nsewdrag").first.tap()
    page.wait_for_timeout(500)
    assert page.locator(".modebar-btn").count() == 0
    context.close()


def test_figures_are_downloaded_from_the_page_alone(browser, tmp_path):
    built = build(
        made.recording(), tmp_path, figures=(fig_modality,), formats=("svg",), document=False
    )
    alone = tmp_path / "elsewhere" / "report.html"
    alone.parent.mkdir()
    alone.write_bytes(built.page.read_bytes())
    context = browser.new_context(accept_downloads=True, offline=True)
    page = context.new_page()
    page.goto(alone.as_uri(), timeout=WAIT)
    page.wait_for_selector("html[data-ready=yes]", timeout=WAIT)
    starts = {"SVG": b"<?xml", "PNG": b"\x89PNG"}
    for kind, start in starts.items():
        with page.expect_download(timeout=WAIT) as download:
            page.get_by_role("button", name=f"as {kind}").click()
        assert download.value.suggested_filename == f"modality.{kind.lower()}"
        assert download.value.path().read_bytes().startswith(start)
    context.close()
