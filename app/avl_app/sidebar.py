"""The question at the side of every view: which model, which picture, what is asked."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from avl_analysis.errors import InputError
from avl_app import examples, state
from avl_app.data import ModelServer, Picture, Question
from avl_app.page import plain, problem
from avl_app.settings import Settings
from avl_app.uploads import uploaded

OWN = "own question"
_TYPES = ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm"]
_SOURCE_NAMES = {"example": "Example", "upload": "Upload", "webcam": "Webcam"}


def show(given: Settings, bench: ModelServer) -> Question | None:
    """Draw the sidebar; None while something is missing, which it then says."""
    with st.sidebar:
        st.markdown("### avl · where a model looks")
        model = _model(given)
        picture = _picture(given)
        if picture is None:
            return None
        prompt = _prompt(picture)
        st.button(
            "Ask",
            type="primary",
            width="stretch",
            help="Answers are remembered; asking again is immediate.",
        )
        _more(given)
        if not prompt.strip():
            problem("The question is empty: write one, for example “Describe the image.”")
            return None
    return Question(model, picture, prompt.strip(), int(state.get("longest")))


def _model(given: Settings) -> str:
    """Name of the chosen model."""
    typed = str(state.get("model"))
    options = list(
        dict.fromkeys([*given.models, *([typed] if typed and (given.folders or given.hub) else [])])
    )
    state.within("model", options, options[0])
    st.selectbox(
        "Model", options, key="model", format_func=lambda name: name.rpartition("/")[2] or name
    )
    chosen = str(state.get("model"))
    if chosen not in given.models:
        allowed(chosen, given)
    return chosen


def allowed(name: str, given: Settings) -> None:
    """Whether a visitor may have this model loaded: a folder where folders may be named, a hub id
    with the switch.

    Raises:
        InputError: neither.
    """
    if Path(name).expanduser().is_dir():
        if given.folders:
            return
        raise InputError(
            f"this server offers {', '.join(given.models)} only; it was started with --no-folders"
        )
    if not given.hub:
        raise InputError(
            f"there is no model folder {name} on the server, and hub ids are loaded only by a"
            " server started with avl app --hub"
        )


def _more(given: Settings) -> None:
    """What is seldom changed: another model, the longest answer."""
    state.put("longest", min(int(state.get("longest")), given.longest))
    with st.expander("More"):
        st.slider("Longest answer, in tokens", 1, given.longest, key="longest")
        kinds = [
            kind
            for kind, may in (("folder of a model", given.folders), ("hub id", given.hub))
            if may
        ]
        if kinds:
            st.text_input(
                " or ".join(kinds).capitalize(),
                key="typed_model",
                on_change=_take_typed,
                placeholder="./my-llava",
                help="Weights as safetensors; code from model folders is never run. "
                + ("" if given.hub else "Hub ids need a server started with --hub."),
            )


def _take_typed() -> None:
    if typed := st.session_state["typed_model"].strip():
        state.put("model", typed)


def _picture(given: Settings) -> Picture | None:
    """The chosen picture; None, with the next step said, if there is none."""
    sources = [source for source in state.SOURCES if source != "webcam" or given.webcam]
    state.within("source", sources, "example")
    st.segmented_control(
        "Picture", sources, key="source", format_func=_SOURCE_NAMES.__getitem__, required=True
    )
    source = state.get("source")
    if source == "example":
        st.number_input(
            "Scene", 0, examples.SCENES - 1, key="scene", help="Drawn scenes the model never saw."
        )
        picture = examples.scene_picture(int(state.get("scene")))
    else:
        sent = (
            st.file_uploader(
                "Picture file", _TYPES, key="file", max_upload_size=max(1, given.upload_bytes >> 20)
            )
            if source == "upload"
            else st.camera_input("Webcam picture", key="camera")
        )
        if sent is None:
            st.info(
                "Send a picture to ask about, or go back to the examples.", icon=":material/image:"
            )
            return None
        try:
            picture = uploaded(
                sent.getvalue(),
                sent.name,
                most_bytes=given.upload_bytes,
                most_pixels=given.picture_pixels,
            )
        except InputError as error:
            problem(error)
            return None
    st.image(
        picture.pixels,
        caption=plain(picture.name),
        width=210,
        alt=f"the picture asked about, {picture.name}",
    )
    return picture


def _prompt(picture: Picture) -> str:
    """The chosen or written question."""
    known = examples.questions(picture.scene[1]) if picture.scene else {}
    options = [*known, OWN]
    state.within("task", options, options[0])
    if known:
        st.selectbox(
            "Question",
            options,
            key="task",
            format_func=lambda task: examples.TASK_NAMES.get(task, task.replace("_", " ")),
        )
    if state.get("task") != OWN:
        prompt = known[state.get("task")].prompt
        st.caption(f"“{plain(prompt)}”")
        return prompt
    return str(st.text_input("Your question", key="prompt", max_chars=state.MOST_TEXT))
