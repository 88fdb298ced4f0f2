"""The dashboard's one script: the frame around the views, the question at the side, errors in one sentence.

Streamlit runs it from top to bottom for every interaction. It is called main.py because a script named like the package
would hide it.
"""

from __future__ import annotations

import logging

import streamlit as st

from app import sidebar, state
from app.data import Workbench
from app.page import Context, plain, problem
from app.settings import Settings, settings
from avl_analysis.errors import InputError

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
def workbench(given: Settings) -> Workbench:
    """The one workbench of this server."""
    return Workbench(allow_hub=given.hub, results=given.results)


def show(view: str, context: Context) -> None:
    """Draw a view; each is imported when first looked at, so that the first screen comes early."""
    from importlib import import_module

    import_module(f"app.views.{view}").show(context)


def main() -> None:
    """Draw the page."""
    st.set_page_config("avl: attention of vision-language models", ":material/visibility:", layout="wide")
    state.begin()
    view = st.segmented_control(
        "View", state.VIEWS, key="view", format_func=TITLES.__getitem__, required=True, label_visibility="collapsed"
    )
    try:
        given = settings()
        bench = workbench(given)
        question = sidebar.show(given, bench)
        if question is not None:
            show(view or "ask", Context(given, bench, question))
    except InputError as error:
        problem(error)
    except Exception as error:  # noqa: BLE001  (a visitor gets a sentence, the log the traceback)
        from avl import SeamError, UnsupportedModelError

        if isinstance(error, (SeamError, UnsupportedModelError)):
            problem(error)
        else:
            _LOG.exception("a page could not be drawn")
            st.error(
                f"This page could not be drawn ({plain(type(error).__name__)}). The details are in the server's log; "
                "reload the page or choose another view.",
                icon=":material/error:",
            )
    state.finish()


main()
