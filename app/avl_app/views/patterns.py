"""Patterns: the report's figures for an answer or a recording, and what each says of A-VL."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from avl_analysis.corpus.questions import scene_samples
from avl_analysis.errors import InputError
from avl_analysis.figures import Animation, Overlay
from avl_analysis.figures.rows import across, panel_rows, wide
from avl_analysis.heads.ablation import load_ablation
from avl_analysis.recordings.recording import Recording, load_recording
from avl_app import code, state
from avl_app.page import Context, Progress, keep, plain, plot, prose
from avl_app.reporting import Measured, figures, fitting, section
from avl_app.sent import sent_files
from avl_app.uploads import from_bytes
from avl_app.views.ask import observe
from avl_reports.findings import Finding, Verdict
from avl_reports.frontiers import load_frontier
from avl_reports.further import KINDS
from avl_reports.run import NotMeasured, Section

_HERE, _SCENES, _FILE = state.RECORDINGS
_SOURCES = {_HERE: "this answer", _SCENES: "drawn scenes, recorded now", _FILE: "a recording file"}
_LONGEST = 96  # tokens of an answer about a drawn scene
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
            "One answer has no interval over samples, so verdicts stay undecided; many samples"
            " decide them: record drawn scenes here, or use a file that `avl record --scenes 100`"
            " made."
        )
    questions = figures()
    state.within("pattern", list(questions), next(iter(questions)))
    names = {name: name.replace("_", " ") for name in questions}
    name = st.pills(
        "Figure",
        list(names),
        key="pattern",
        format_func=names.__getitem__,
        required=True,
        wrap=True,
    )
    # Before `further`, which then finds the file that was just sent.
    if str(name) in _FURTHER:
        _send_further(str(name))
    measured, wrong = fitting(recording, further())
    if wrong:
        st.info(f"Left out: {prose(wrong)}.", icon=":material/info:")
    try:
        made = _made(recording, str(name), measured)
        draw_section(made)
        beside = measured_code(recording, str(name))
        keep(made.figure, code.pattern(source_code(context), str(name), beside), "pattern")
    except NotMeasured as error:
        st.markdown(f"#### {plain(questions[str(name)])}")
        # Where a file was left out as another model's, asking for one again would mislead.
        reason = _HINTS.get(str(name)) if not wrong else None
        said = reason or f"This figure cannot be drawn here: {prose(str(error))}."
        st.info(said, icon=":material/info:")


_FURTHER = {
    "ablation": ("What switching heads off changed, made by avl ablate (.json)", "json"),
    "frontier": ("Quality against bytes, made by avl frontier (.jsonl)", "jsonl"),
    **{
        kind.figure: (f"{kind.title}, made by {kind.command} (.nc)", "nc")
        for kind in KINDS.values()
    },
}
"""Figures that need a file of their own: what is asked for, and the ending of its name."""
_HINTS = {
    "policies": "Policies are compared in Benchmark: press Compare there, or load a comparison, and"
    " this figure shows it.",
    "ablation": "Send the file that avl ablate wrote for this model.",
    "frontier": "Send the file that avl frontier wrote for this model.",
    **{
        kind.figure: f"Send the file that {kind.command} wrote for this model."
        for kind in KINDS.values()
    },
}
"""What to do here where a report names the command line."""


def _send_further(name: str) -> None:
    """Take the file that a figure needs."""
    label, ending = _FURTHER[name]

    def read(files: Mapping[str, bytes]) -> object:
        sent, data = next(iter(files.items()))
        if name == "ablation":
            return from_bytes(load_ablation, data, sent)
        # what is left after these kinds is the frontier
        for kind in KINDS.values():
            if kind.figure == name:
                return from_bytes(kind.read, data, sent)
        return from_bytes(load_frontier, data, sent)

    sent_files(label, [ending], read, key=f"{name}_file", most_megabytes=50)


def further() -> Measured:
    """What this visitor has measured or sent beside recordings."""
    # Keys of `sent_files`, which adds `_held` to the uploader's key.
    ablation = st.session_state.get("ablation_file_held")
    frontier = st.session_state.get("frontier_file_held")
    return Measured(
        st.session_state.get("comparison"),
        () if ablation is None else (ablation.value,),
        None if frontier is None else frontier.value,
        {
            name: st.session_state[f"{kind.figure}_file_held"].value
            for name, kind in KINDS.items()
            if st.session_state.get(f"{kind.figure}_file_held") is not None
        },
    )


def measured_code(recording: Recording, figure: str = "") -> tuple[str, str]:
    """Code for what stands beside a recording, as `code.beside` gives it.

    Args:
        recording: what of another model is left out beside it.
        figure: the one whose measurement is wanted; empty for those of all figures.
    """
    if fitting(recording, further())[1]:
        return code.beside({})
    # Figure -> measurement. A comparison has code of its own.
    needed = {"ablation": "ablation", "frontier": "frontier"}
    needed |= {kind.figure: name for name, kind in KINDS.items()}
    held = {one: st.session_state.get(f"{one}_file_held") for one in needed}
    files = {
        needed[one]: sent.name
        for one, sent in held.items()
        if sent is not None and figure in ("", one)
    }
    compared = ""
    if st.session_state.get("comparison") is not None and figure in ("", "policies"):
        compared = str(st.session_state.get("comparison_code") or "")
    return code.beside(files, compared)


def source_code(context: Context) -> str:
    """Code that gives the recording shown."""
    source = state.get("recording_of")
    if source == _SCENES:
        return code.scenes_recorded(context.question.model, int(state.get("per_task")), _LONGEST)
    if source == _FILE:
        return code.file_read(st.session_state["recording_file_held"].name)
    return code.recorded(context.question)


def _made(recording: Recording, name: str, measured: Measured) -> Section:
    """A figure of this recording, made once per visitor."""
    held = st.session_state.get("sections")
    # Compared by identity below, not by the numbers they hold.
    parts = (
        measured.comparison,
        *measured.ablations,
        measured.frontier,
        *measured.further.values(),
    )
    if held is None or held[0] is not recording or held[1] != tuple(map(id, parts)):
        held = st.session_state["sections"] = (recording, tuple(map(id, parts)), {})
    if name not in held[2]:
        held[2][name] = section(recording, name, measured)
    made: Section = held[2][name]
    return made


def choose_recording(context: Context) -> Recording | None:
    """The recording of the present answer, of scenes recorded now, or from a file.

    None while there is none.
    """
    source = st.segmented_control(
        "Statistics of",
        list(_SOURCES),
        key="recording_of",
        format_func=_SOURCES.__getitem__,
        required=True,
    )
    if source == _HERE:
        return observe(context).recording
    return _scenes(context) if source == _SCENES else _from_file(context)


def _scenes(context: Context) -> Recording | None:
    """Drawn scenes recorded when asked to; kept until others are."""
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    count = int(left.slider("Scenes of each kind of question", 1, 20, key="per_task"))
    if right.button(
        "Record", icon=":material/radio_button_checked:", help="Any other click stops it."
    ):
        with Progress("Drawing scenes", "scenes recorded") as bar:
            made = context.bench.corpus(
                context.question.model,
                scene_samples(count, split="recording"),
                tokens=_LONGEST,
                progress=bar.done,
                waiting=bar.waiting,
            )
        # With the model's name, since another model's scenes are not those of this page.
        st.session_state["scenes_recording"] = (context.question.model, made)
    model, known = st.session_state.get("scenes_recording", ("", None))
    if known is None or model != context.question.model:
        st.info(
            "Nothing is recorded yet: choose how many scenes and press Record.",
            icon=":material/info:",
        )
        return None
    st.caption(f"{len(known)} scenes are recorded.")
    recording: Recording = known
    return recording


def _from_file(context: Context) -> Recording | None:
    """A recording that was sent; None, with the reason said, while there is none."""
    limit = context.settings.recording_bytes

    def read(files: Mapping[str, bytes]) -> Recording:
        name, data = next(iter(files.items()))
        # The widget's limit is in whole megabytes; this one is exact.
        if len(data) > limit:
            raise InputError(
                f"the file has {len(data) >> 20} MB; at most {limit >> 20} MB are accepted: record"
                " fewer samples"
            )
        return from_bytes(load_recording, data, name)

    sent = sent_files(
        "Recording made by avl record (.nc)",
        ["nc"],
        read,
        key="recording_file",
        most_megabytes=max(1, limit >> 20),
    )
    if sent is None:
        if not st.session_state.get("recording_file"):
            st.info("Send a recording, or go back to this answer.", icon=":material/upload_file:")
        return None
    return sent.value


def draw_section(shown: Section) -> None:
    """A figure with its question, its plots and its findings."""
    figure = shown.figure
    st.markdown(f"#### {plain(shown.question)}")
    for finding in shown.findings:
        _finding(finding)
    number = 0
    for row in panel_rows(figure):
        # At most four side by side; further panels of the row go below.
        columns = st.columns(1 if wide(row) else min(across(figure, row), 4))
        for place, panel in enumerate(row):
            with columns[place % len(columns)]:
                # an animation has no other place on the page for its title
                if panel.title and not isinstance(panel, Animation):
                    st.markdown(f"**{plain(panel.title)}**")
                plot(
                    panel,
                    f"{figure.name}{number}",
                    titled=isinstance(panel, Animation),
                    height=240 if isinstance(panel, Overlay) else None,
                    # The classes of all panels are the same, and the animation below names them.
                    legend=shown.moving is None and number == len(figure.panels) - 1,
                )
            number += 1
    if shown.moving is not None:
        plot(shown.moving, f"{figure.name}_moving")
    if shown.table:
        header, *rows = shown.table
        st.dataframe(
            {name: [row[at] for row in rows] for at, name in enumerate(header)}, hide_index=True
        )
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
