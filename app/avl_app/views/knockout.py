"""Part of Heads: what answers lose when attention between groups of tokens is cut."""

from __future__ import annotations

import streamlit as st
import xarray as xr

from avl_analysis.corpus.questions import Sample, scene_samples
from avl_analysis.recordings.recording import Recording
from avl_app import code, state
from avl_app.page import Context, keep
from avl_app.reporting import Measured, section
from avl_app.views.patterns import draw_section

_HERE, _SCENES = state.CUT_SOURCES
_SOURCES = {_HERE: "this answer", _SCENES: "drawn scenes"}
_HELD = "knockouts"
"""Session key of what this visitor has cut: (question or model and count) -> result."""


def show(context: Context, recording: Recording) -> None:
    """Draw it below the heads, when asked for.

    Args:
        context: of the page.
        recording: of the present answer, which says what model it is.
    """
    if not st.toggle("Cut attention between groups of tokens, layer by layer", key="cut"):
        return
    st.markdown(
        "Attention weights say where a layer reads. Here rows of one group of tokens are kept from"
        " reading another, one layer at a time, while the model is led along its own answer: what"
        " is lost is what that path carried."
    )
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    source = left.segmented_control(
        "Cut in",
        list(_SOURCES),
        key="cut_of",
        format_func=_SOURCES.__getitem__,
        required=True,
    )
    per_task = None
    if source == _SCENES:
        per_task = int(left.slider("Scenes of each kind of question", 1, 20, key="per_task"))
    pressed = right.button("Cut", icon=":material/content_cut:", help="Any other click stops it.")
    result = _result(context, per_task, pressed=pressed)
    if result is None:
        st.info("Nothing is cut yet: press Cut.", icon=":material/info:")
        return
    # The report's own figure. It wants a recording, and that of the present answer is of the same
    # model.
    made = section(recording, "knockout", Measured(further={"knockout": result}))
    draw_section(made)
    keep(made.figure, code.knockout(context.question, per_task), "knockout")


def _result(context: Context, per_task: int | None, *, pressed: bool) -> xr.Dataset | None:
    """What was cut before, or is cut now because the button was pressed."""
    question = context.question
    held = st.session_state.setdefault(_HELD, {})
    # Drawn scenes do not depend on the question asked, apart from its model and longest answer.
    key = question if per_task is None else (question.model, per_task, question.tokens)
    if key not in held and pressed:
        samples: list[Sample] = (
            [question.sample] if per_task is None else scene_samples(per_task, split="ablation")
        )
        bar = st.progress(0.0, text="Answering …")
        held[key] = context.bench.knockout(
            question.model,
            samples,
            tokens=question.tokens,
            progress=lambda done, total: bar.progress(
                done / total, text=f"{done} of {total} cuts made"
            ),
        )
        bar.empty()
    found: xr.Dataset | None = held.get(key)
    return found
