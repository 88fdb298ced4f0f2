"""The dashboard's one script.

The frame around the views, the question at the side, errors in one sentence.

Streamlit runs it from top to bottom for every interaction. It is called main.py because a script
named like the package would hide it.
"""

from __future__ import annotations

import logging
import sys

import numpy as np
import streamlit as st
from PIL import Image

from avl_analysis.errors import InputError
from avl_analysis.figures import looks
from avl_app import sidebar, state, style
from avl_app.data import ModelServer
from avl_app.page import (
    CancelledError,
    Context,
    is_dark,
    picture_height,
    plain,
    plot,
    problem,
)
from avl_app.settings import Settings, settings

_LOG = logging.getLogger("avl.app")
TITLES = {
    "ask": ":material/visibility: Ask",
    "heads": ":material/grid_on: Heads",
    "patterns": ":material/monitoring: Patterns",
    "live": ":material/toggle_on: A-VL live",
    "benchmark": ":material/speed: Benchmark",
    "report": ":material/description: Report",
}


@st.cache_resource(show_spinner=False)
def workbench(given: Settings) -> ModelServer:
    """The one workbench of this server."""
    return ModelServer(allow_hub=given.hub, results=given.results, loaded=given.loaded)


def _icon() -> Image.Image:
    """A few lit patches, drawn here, because a named icon would be fetched from the network."""
    # Colour of each of 4 x 4 patches, which become 8 x 8 pixels each.
    lit = np.array([[0, 0, 1, 0], [0, 2, 2, 0], [1, 2, 2, 0], [0, 0, 0, 1]])
    colours = np.array([[0x3B, 0x47, 0x54], [0x00, 0x72, 0xB2], [0xFF, 0xB0, 0x00]], np.uint8)
    return Image.fromarray(colours[lit].repeat(8, 0).repeat(8, 1))


def show(view: str, context: Context) -> None:
    """Draw a view; each is imported when first looked at, so that the first screen comes early."""
    from importlib import import_module

    module, place = f"avl_app.views.{view}", st.empty()
    if module not in sys.modules:
        # Only once in the life of a server: the libraries of models take seconds to import.
        with place.container():
            st.markdown(f"### {plain(context.question.prompt)}")
            st.markdown(":material/hourglass_top: Starting …")
            # A plot, so that the browser fetches and reads its plotting library, 4.6 MB, while the
            # imports run here; it would begin with that after the answer otherwise.
            pixels = context.question.picture.pixels
            picture = looks.plain_picture(pixels)
            plot(picture, "first_picture", titled=False, height=picture_height(pixels))
    drawn = import_module(module)
    place.empty()
    drawn.show(context)


def _for_visitors(error: Exception) -> bool:
    """Whether a message was written for people.

    This model cannot be recorded or adapted, and why.
    """
    avl = sys.modules.get("avl")  # where one of these was raised, avl is imported
    return isinstance(
        error, tuple(getattr(avl, name, ()) for name in ("HookError", "UnsupportedModelError"))
    )


def main() -> None:
    """Draw the page."""
    st.set_page_config("avl: attention of vision-language models", _icon(), layout="wide")
    st.html(style.sheet(dark=is_dark()))
    # Before any widget: the value of one that is drawn cannot be written any more.
    state.begin()
    try:
        _draw()
    # Streamlit ends and restarts a run with exceptions that are not `Exception`, so the handlers in
    # `_draw` let them pass.
    except BaseException:
        state.note_drawn(complete=False)  # a run that the next choice has ended
        raise
    state.finish()


def _draw() -> None:
    """Draw the view's frame, the sidebar and the view; what goes wrong is said in one sentence."""
    view = st.segmented_control(
        "View",
        state.VIEWS,
        key="view",
        format_func=TITLES.__getitem__,
        required=True,
        label_visibility="collapsed",
    )
    try:
        given = settings()
        bench = workbench(given)
        question = sidebar.show(given, bench)
        if question is not None:
            # Before the view: another question resets token, layer and head, which cannot be done
            # once their widgets are drawn.
            state.asked(question)
            show(view or "ask", Context(given, bench, question))
    except CancelledError:
        st.info("The answer was cancelled.", icon=":material/stop:")
        st.button("Answer after all", key="uncancel", on_click=state.uncancel)
    except InputError as error:
        problem(error)
    except Exception as error:  # noqa: BLE001  (a visitor gets a sentence, the log the traceback)
        if _for_visitors(error):
            problem(error)
        else:
            _LOG.exception("a page could not be drawn")
            st.error(
                f"This page could not be drawn ({plain(type(error).__name__)}). The details are in"
                " the server's log; reload the page or choose another view.",
                icon=":material/error:",
            )


main()
