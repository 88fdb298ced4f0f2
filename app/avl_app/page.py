"""Parts of every view: plots in the visitor's theme, foreign text as text, progress, errors."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from avl_analysis.figures import draw_html, draw_plotly
from avl_analysis.figures.clickable import with_cells, with_colours, with_opacity, with_patches
from avl_analysis.figures.plot import Plot
from avl_analysis.figures.spec import Figure, Heat, Overlay, Panel
from avl_analysis.figures.strip import Strip, visible
from avl_app import state
from avl_app.data import ModelServer, Question
from avl_app.settings import Settings

# Besides Markdown's own signs: $ begins a formula, : an icon or a colour, < a tag.
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>~$:&=^])")
# The colon that opens a name such as :smile: or :material/check:. The second colon is only looked
# at, since it may open the next name.
_SHORTCODE = re.compile(r":(?=[\w+\-/]+:)")
# word joiner: no width, and no line may break there
_JOINER = "\u2060"
# Of a plot whose parts are clicked: dragging and the wheel leave it where it is.
_CONFIG = {"displayModeBar": False, "scrollZoom": False, "doubleClick": False}
_TOOLS = {
    "displayModeBar": "hover",
    "displaylogo": False,
    "scrollZoom": False,
    "doubleClick": "reset",
    "modeBarButtonsToRemove": [
        *("toImage", "lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d", "pan2d"),
    ],
}
"""Of a plot that is only looked at: zoom, reset and full screen, under a pointer."""
_BAR = 34
"""Pixels that plotly's tool bar needs above the data."""


@dataclass(frozen=True)
class Context:
    """What a view is given.

    The server's settings, the shared workbench, and what is being asked.
    """

    settings: Settings
    bench: ModelServer
    question: Question


def plain(text: str) -> str:
    """Foreign text for places that read Markdown.

    Every character that could mean something is escaped.

    Names of icons and emojis between colons are found in the text after escapes are gone, so an
    invisible character parts them.
    """
    # Before escaping, which puts backslashes into names such as :+1:.
    parted = _SHORTCODE.sub(f":{_JOINER}", text.replace("\n", " "))
    return _MARKUP.sub(r"\\\1", parted)


def prose(text: str) -> str:
    """A message of the toolkit for places that read Markdown.

    What stands between backticks is set as code, all else as it is.
    """
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick that closes nothing
        return plain(text)
    # Parts at odd places stood between two backticks.
    return "".join(f"`{part}`" if number % 2 else plain(part) for number, part in enumerate(parts))


def shown_token(token: str) -> str:
    """A token's text such that one sees there is one, for places that read Markdown."""
    return plain(visible(token))


def distinct(labels: Sequence[str]) -> list[str]:
    """The labels with invisible endings such that no two are equal.

    Streamlit's widgets tell options apart by their label, so of two options with one label only the
    last can be chosen. The n-th occurrence of a label ends with n word joiners, which have no
    width.
    """
    seen: Counter[str] = Counter()
    endings = []
    for label in labels:
        endings.append(label + _JOINER * seen[label])
        seen[label] += 1
    return endings


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path, with as many parts before it as tell it from the others.

    Args:
        names: different names of models: folders, hub ids, or plain words.
    """
    parts = [name.rstrip("/").split("/") for name in names]
    lengths = [1] * len(names)
    while True:
        short = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        counts = Counter(short)
        # A name grows until it is unlike the others or has no more parts, so the loop ends. Names
        # equal even then differ by the invisible endings of `distinct`.
        longer = [
            i for i, name in enumerate(short) if counts[name] > 1 and lengths[i] < len(parts[i])
        ]
        if not longer:
            return distinct(short)
        for i in longer:
            lengths[i] += 1


def is_dark() -> bool:
    """Whether the visitor's theme is dark."""
    return getattr(st.context.theme, "type", None) == "dark"


def plot(
    panel: Panel,
    key: str,
    *,
    titled: bool = True,
    opacity: float | None = None,
    height: int | None = None,
    legend: bool = True,
) -> None:
    """A panel as a plot in the visitor's theme.

    Args:
        panel: what is drawn.
        key: of the widget in the session; different for every plot of a page.
        titled: whether the panel's own title is drawn; not where the page says it above.
        opacity: of the patches of an overlay, 0 to 1; None as drawn.
        height: in pixels; None lets the kind of panel choose.
        legend: whether the classes of an overlay are named; not where another plot does it.
    """
    drawn = draw_plotly.draw(panel, dark=is_dark(), titled=titled)
    if opacity is not None:
        with_opacity(drawn, opacity)
    # The visitor's colours are a scale from none to most; classes have a colour each.
    if isinstance(panel, Overlay) and not panel.classes:
        with_colours(drawn, str(state.get("colours")), smooth=bool(state.get("smooth")))
    if isinstance(panel, Overlay) and panel.classes:
        drawn.update_layout(legend={"y": -0.01}, showlegend=legend)
    # Powers of ten, where plotly would write k, M or µ.
    drawn.update_yaxes(exponentformat="power")
    # Room for the tool bar is added to the height, so the data keep the pixels asked for.
    above = _BAR - int(drawn.layout.margin.t or 0)
    if above > 0:
        drawn.update_layout(margin={"t": _BAR})
    if height is not None:
        drawn.update_layout(height=height + max(above, 0))
    st.plotly_chart(drawn, key=key, theme=None, config=_TOOLS)


_KINDS = {
    "svg": "image/svg+xml",
    "png": "image/png",
    "pdf": "application/pdf",
    "csv": "text/csv",
}
"""What a figure can be downloaded as."""


def keep(figure: Figure | None, code: str, key: str) -> None:
    """What a visitor can take away: the figure as files, and the Python that gives it.

    Args:
        figure: what the view shows; None where there is nothing to download.
        code: Python that gives the same.
        key: tells this figure's buttons from others on the page.
    """
    with st.container(horizontal=True, key=f"keep_{key}"):
        if figure is not None:
            with st.popover("Download", icon=":material/download:", type="tertiary"):
                for suffix, kind in _KINDS.items():
                    st.download_button(
                        suffix.upper(),
                        # a function, called at the click: drawing all kinds ahead would slow every
                        # run
                        partial(_written, figure, suffix),
                        f"{figure.name}.{suffix}",
                        kind,
                        key=f"{key}_{suffix}",
                        # a download does not draw the page anew
                        on_click="ignore",
                        width="stretch",
                    )
        with st.popover("Show code", icon=":material/code:", type="tertiary"):
            st.code(code, language="python")


def _written(figure: Figure, suffix: str) -> bytes:
    """A figure as a file in memory; drawn only when it is downloaded."""
    with tempfile.TemporaryDirectory() as folder:
        return Plot(figure).save(Path(folder) / f"{figure.name}.{suffix}").read_bytes()


def picture_height(pixels: NDArray[np.uint8], wide: int = 340, most: int = 420) -> int:
    """Pixels a picture of this shape needs when it is drawn `wide` pixels wide, within reason.

    Args:
        pixels: (height, width, 3).
        wide: expected width of the column.
        most: tallest picture.
    """
    height, width = pixels.shape[:2]
    return int(np.clip(round(wide * height / width), 90, most))


def cells(
    heat: Heat, key: str, marked: tuple[int, int] | None, on_click: Callable[[], None]
) -> None:
    """A heat map whose cells can be clicked; `on_click` reads the cell with `clicked(key)`.

    Args:
        heat: what is drawn.
        key: of the widget in the session.
        marked: row and column of the cell that is framed; None for none.
        on_click: called, without arguments, when another cell is clicked or none any more.
    """
    drawn = with_cells(
        draw_plotly.draw(heat, dark=is_dark(), titled=False), heat, marked=marked, dark=is_dark()
    )
    st.plotly_chart(
        drawn, key=key, theme=None, on_select=on_click, selection_mode="points", config=_CONFIG
    )


def patches(
    overlay: Overlay,
    key: str,
    marked: Sequence[int],
    on_choice: Callable[[], None],
    *,
    framing: bool,
    height: int,
) -> None:
    """A picture whose patches can be chosen; `on_choice` reads them with `chosen_patches(key)`.

    Args:
        overlay: the picture with its patches.
        key: of the widget in the session.
        marked: image tokens that are framed.
        on_choice: called when the choice changes.
        framing: whether a frame is drawn around patches; else one is clicked. Streamlit does not
            take clicks where frames can be drawn.
        height: of the plot in pixels.
    """
    # Image tokens are counted from 0 within the picture drawn, here and in `chosen_patches`.
    drawn = with_patches(draw_plotly.draw(overlay, dark=is_dark(), titled=False), overlay, marked)
    drawn.update_layout(height=height, dragmode="select" if framing else False)
    st.plotly_chart(
        drawn,
        key=key,
        theme=None,
        on_select=on_choice,
        selection_mode="box" if framing else "points",
        config=_CONFIG,
    )


def chosen_patches(key: str) -> list[int]:
    """The image tokens that were chosen last in `patches`; none if the choice was taken away."""
    points = st.session_state[key]["selection"]["points"]
    # Points of the other traces, such as the drawn patches, carry no data of ours.
    return sorted({int(point["customdata"][0]) for point in points if "customdata" in point})


def clicked(key: str) -> tuple[int, int] | None:
    """Row and column of the cell of `cells` that was clicked last.

    None if the click took a selection away.
    """
    points = st.session_state[key]["selection"]["points"]
    data = next((point["customdata"] for point in points if "customdata" in point), None)
    return None if data is None else (int(data[0]), int(data[1]))


def strip(shown: Strip) -> None:
    """A token strip."""
    st.html(draw_html.draw(shown, dark=is_dark()))


def doing(context: Context, what: str = "answering") -> str:
    """What a run of the model does first: loading it, where it is not in memory."""
    # `loaded` only looks; `model` would begin to load.
    loading = context.bench.loaded(context.question.model) is None
    return f"Loading the model and {what}" if loading else what.capitalize()


def problem(error: Exception | str) -> None:
    """One clear sentence in the page."""
    st.error(plain(str(error)), icon=":material/error:")


class Progress:
    """A bar that says how much of long work is done, about how long the rest takes, and who waits.

    Used in a with block, after which the bar is gone.

    Args:
        start: what is said before the first part is done.
        what: what is counted, such as "answers".
    """

    def __init__(self, start: str, what: str) -> None:
        self.bar, self.what = st.progress(0.0, text=f"{start} …"), what
        self.started = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failed: object) -> None:
        self.bar.empty()

    def done(self, done: int, total: int) -> None:
        """Say that `done` parts of `total` are done."""
        # mean seconds of a part so far, times the parts left
        left = (time.monotonic() - self.started) / max(done, 1) * (total - done)
        rest = f" · about {duration(left)} left" if 0 < done < total else ""
        self.bar.progress(
            min(done / max(total, 1), 1.0), text=f"{done} of {total} {self.what}{rest}"
        )

    def waiting(self, ahead: int) -> None:
        """Say how many runs of other visitors come before this one."""
        self.bar.progress(0.0, text=_queued(ahead))
        # Time spent waiting for others does not count as time a part takes.
        self.started = time.monotonic()


def duration(seconds: float) -> str:
    """A length of time in words."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _queued(ahead: int) -> str:
    """That others use the model, and how many of their runs come first."""
    turn = "yours is next" if ahead == 1 else f"{ahead} answers come before yours"
    return f":material/group: Another session is using this model; {turn} …"


class CancelledError(Exception):
    """The visitor does not want the answer; the page says how to have it after all."""


_STREAMED = "streamed"
"""Session key of how many answers of this visit have been shown while they came."""


@contextmanager
def streaming(
    title: str, place: Any = None
) -> Iterator[tuple[Callable[[str, int], None], Callable[[int], None]]]:
    """Show an answer as it comes, with a way out.

    Yields what to call for each token, and while waiting for the model.

    Args:
        title: what is being done.
        place: where it is shown; None for here.

    Raises:
        CancelledError: the visitor has cancelled this question before.
    """
    if st.session_state.get(state.CANCELLED):
        raise CancelledError
    # Several answers can be streamed in one run, and Streamlit refuses a second button under one
    # key.
    number = st.session_state[_STREAMED] = st.session_state.get(_STREAMED, 0) + 1
    target, stop = place or st.empty(), st.empty()
    target.markdown(f":material/hourglass_top: {plain(title)} …")
    # The click draws the page anew, which ends this run of the model at its next token.
    stop.button(
        "Cancel",
        key=f"cancel_{number}",
        type="tertiary",
        icon=":material/stop:",
        on_click=lambda: st.session_state.update({state.CANCELLED: True}),
    )

    def on_token(text: str, count: int) -> None:
        target.markdown(f"{plain(text)} ▌  \n:small[token {count}]")

    def waiting(ahead: int) -> None:
        target.markdown(_queued(ahead))

    yield on_token, waiting
    target.empty()
    stop.empty()
