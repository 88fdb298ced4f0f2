"""Patterns: the report's figures for this answer or for a recording, with what each says about A-VL."""

from __future__ import annotations

import streamlit as st

from app.data import figures, from_bytes, section
from app.page import Context, plain, plot, problem
from app.views.heads import recorded
from avl_analysis.comparison import Comparison
from avl_analysis.errors import InputError
from avl_analysis.figures import Animation, Overlay
from avl_analysis.recording import Recording, load_recording
from reports.findings import Finding, Verdict
from reports.run import NotMeasured, Section

_HERE, _FILE = "this answer", "a recording file"
_BADGES = {
    Verdict.SUPPORTED: ("supported", "green", ":material/check:"),
    Verdict.NOT_SUPPORTED: ("not supported", "orange", ":material/close:"),
    Verdict.UNDECIDED: ("undecided", "gray", ":material/question_mark:"),
}


def show(context: Context) -> None:
    """Draw the view."""
    recording = choose_recording(context)
    if recording is None:
        return
    if len(recording) == 1:
        st.caption(
            "One answer has no interval over samples, so verdicts stay undecided; a recording of many samples "
            "(avl record --scenes 100) decides them."
        )
    questions = figures()
    if st.session_state.get("pattern") not in questions:
        st.session_state["pattern"] = next(iter(questions))
    names = {name: name.replace("_", " ") for name in questions}
    name = st.pills("Figure", list(names), key="pattern", format_func=names.__getitem__, required=True)
    try:
        _section(_made(recording, str(name), st.session_state.get("comparison")))
    except NotMeasured as error:
        st.markdown(f"#### {plain(questions[str(name)])}")
        st.info(f"This figure cannot be drawn here: {plain(str(error))}.", icon=":material/info:")


def _made(recording: Recording, name: str, comparison: Comparison | None) -> Section:
    """A figure of this recording, made once per visitor."""
    held = st.session_state.get("sections")
    if held is None or held[0] is not recording or held[1] is not comparison:
        held = st.session_state["sections"] = (recording, comparison, {})
    if name not in held[2]:
        held[2][name] = section(recording, name, comparison)
    made: Section = held[2][name]
    return made


def choose_recording(context: Context) -> Recording | None:
    """The recording of the present answer, or one from a file; None while there is none."""
    source = st.segmented_control("Statistics of", [_HERE, _FILE], default=_HERE, key="recording_of", required=True)
    if source == _HERE:
        return recorded(context)
    sent = st.file_uploader(
        "Recording made by avl record (.nc)",
        ["nc"],
        key="recording_file",
        max_upload_size=max(1, context.settings.recording_bytes >> 20),
    )
    if sent is None:
        st.info("Send a recording, or go back to this answer.", icon=":material/upload_file:")
        return None
    if sent.size > context.settings.recording_bytes:
        limit = context.settings.recording_bytes >> 20
        problem(f"the file has {sent.size >> 20} MB; at most {limit} MB are accepted: record fewer samples")
        return None
    try:
        return _read(sent.file_id, sent.getvalue())
    except InputError as error:
        problem(error)
        return None


def _read(key: str, data: bytes) -> Recording:
    """A sent recording, read once per visitor."""
    held = st.session_state.get("sent_recording")
    if held is None or held[0] != key:
        held = st.session_state["sent_recording"] = (key, from_bytes(load_recording, data, "recording.nc"))
    recording: Recording = held[1]
    return recording


def _section(shown: Section) -> None:
    """A figure with its question, its plots and its findings."""
    figure = shown.figure
    st.markdown(f"#### {plain(shown.question)}")
    for finding in shown.findings:
        _finding(finding)
    columns = st.columns(min(figure.columns, len(figure.panels), 4))
    for number, panel in enumerate(figure.panels):
        with columns[number % len(columns)]:
            if panel.title and not isinstance(panel, Animation):
                st.markdown(f"**{plain(panel.title)}**")
            height = 240 if isinstance(panel, Overlay) else None
            plot(panel, f"{figure.name}{number}", titled=isinstance(panel, Animation), height=height)
    if shown.text:
        st.markdown(plain(shown.text))
    st.caption(plain(figure.caption.text))


def _finding(finding: Finding) -> None:
    """What the figure says about a choice made in A-VL."""
    label, colour, icon = _BADGES[finding.verdict]
    st.markdown(
        f":{colour}-badge[{icon} {label}] **{plain(finding.choice)}.** {plain(finding.measured)} "
        f"Rule: {plain(finding.rule)}."
    )
