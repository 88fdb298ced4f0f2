"""Report: built from this answer, from a recording, or from scenes recorded now.

Previewed and downloaded.
"""

from __future__ import annotations

import time

import streamlit as st

from avl_analysis.errors import InputError
from avl_analysis.recordings.recording import Recording
from avl_app import code
from avl_app.page import Context, duration, keep, plain, problem, prose
from avl_app.reporting import Built, build_report, figures, fitting
from avl_app.views.patterns import choose_recording, further, measured_code, source_code

_PREVIEW_HEIGHT = 900
_ICON = ":material/description:"


def show(context: Context) -> None:
    """Draw the view."""
    st.markdown(
        "A report is one page that works offline, every figure as SVG, PDF and PNG, the numbers"
        " behind them as CSV and JSON, and the recording itself."
    )
    recording = choose_recording(context)
    title = st.text_input(
        "Title", placeholder="by default it names the model", key="title", max_chars=120
    )
    pressed = st.button("Build the report", type="primary", icon=_ICON, disabled=recording is None)
    if pressed and recording is not None:
        st.session_state["report"] = _build(recording, str(title))
    built: Built | None = st.session_state.get("report")
    if built is None:
        questions = figures().values()
        st.markdown(
            f"**It answers {len(questions)} questions**, as far as the recording holds what they"
            " need:"
        )
        st.markdown("\n".join(f"1. {plain(question)}" for question in questions))
    else:
        _offer(built)
    if recording is not None:
        keep(None, code.report(source_code(context), measured_code(recording)), "report")


def _build(recording: Recording, title: str) -> Built | None:
    """Build with progress and a way out; any click stops it."""
    measured, wrong = fitting(recording, further())
    if wrong:
        st.info(f"Left out: {prose(wrong)}.", icon=":material/info:")
    with st.status("Building the report", expanded=True) as status:
        bar = st.progress(0.0, text="starting")
        started = time.monotonic()
        # It needs no callback: a click starts a new run, and this one ends where it draws next.
        st.button("Cancel", key="cancel_report", icon=":material/stop:")

        def progress(done: int, total: int, part: str) -> None:
            """Show how far the report is.

            Args:
                done: parts that are drawn.
                total: parts in all.
                part: name of the one that is drawn now.
            """
            # Mean seconds of a part so far, times the parts left.
            left = (time.monotonic() - started) / max(done, 1) * (total - done)
            rest = f" · about {duration(left)} left" if done else ""
            bar.progress(min(done / max(total, 1), 1.0), text=f"drawing {part}{rest}")

        try:
            built = build_report(
                recording,
                title,
                progress,
                measured,
            )
        except InputError as error:
            status.update(label="No report", state="error")
            problem(error)
            return None
        status.update(label="The report is ready", state="complete", expanded=False)
        return built


def _offer(built: Built) -> None:
    """Downloads and a preview."""
    st.markdown(f"**{plain(built.about)}**")
    offers = [
        ("Page (HTML)", built.page, "report.html", "text/html"),
        ("Everything (ZIP)", built.archive, "report.zip", "application/zip"),
    ]
    if built.pdf is not None:
        offers.insert(1, ("PDF", built.pdf, "report.pdf", "application/pdf"))
    # two or three offers for three columns
    for column, (label, data, name, kind) in zip(st.columns(3), offers, strict=False):
        size = f"{label}, {max(len(data) / 2**20, 0.1):.1f} MB"
        column.download_button(
            size, data, name, kind, on_click="ignore", icon=":material/download:", width="stretch"
        )
    if built.missing:
        with st.expander(f"Could not be drawn from this recording: {len(built.missing)}"):
            for name, reason in built.missing.items():
                st.markdown(f"**{plain(name.removeprefix('fig_'))}**: {prose(reason)}")
    if st.toggle("Preview", value=True, key="preview"):
        st.iframe(built.page.decode("utf-8"), height=_PREVIEW_HEIGHT, alt="preview of the report")
