"""The question at the side of every view: which model, which picture, what is asked."""

from __future__ import annotations

import streamlit as st

from app import examples, state
from app.data import Picture, Question, Workbench, uploaded
from app.page import plain, problem
from app.settings import Settings
from avl_analysis.errors import InputError

OWN = "own question"
_TYPES = ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm"]
_SOURCE_NAMES = {"example": "Example", "upload": "Upload", "webcam": "Webcam"}


def show(given: Settings, bench: Workbench) -> Question | None:
    """Draw the sidebar; None while something is missing, which it then says."""
    with st.sidebar:
        st.markdown("### avl · where a model looks")
        model = _model(given)
        picture = _picture(given)
        if picture is None:
            return None
        prompt = _prompt(picture)
        state.put("longest", min(int(state.get("longest")), given.longest))
        st.slider("Longest answer, in tokens", 1, given.longest, key="longest")
        st.button("Ask", type="primary", width="stretch", help="Answers are remembered; asking again is immediate.")
        if not prompt.strip():
            problem("The question is empty: write one, for example “Describe the image.”")
            return None
    return Question(model, picture, prompt.strip(), int(state.get("longest")))


def _model(given: Settings) -> str:
    """Name of the chosen model."""
    typed = str(state.get("model"))
    options = list(dict.fromkeys([*given.models, *([typed] if typed and given.folders else [])]))
    state.within("model", options, options[0])
    st.selectbox("Model", options, key="model", format_func=lambda name: name.rpartition("/")[2] or name)
    if given.folders:
        with st.expander("Another model"):
            st.text_input(
                "Folder of a model, or hub id" if given.hub else "Folder of a model",
                key="typed_model",
                on_change=_take_typed,
                placeholder="./my-llava",
                help="A folder written by save_pretrained, weights as safetensors. "
                + ("Hub ids are fetched." if given.hub else "Hub ids need a server started with --hub."),
            )
    return str(state.get("model"))


def _take_typed() -> None:
    if typed := st.session_state["typed_model"].strip():
        state.put("model", typed)


def _picture(given: Settings) -> Picture | None:
    """The chosen picture; None, with the next step said, if there is none."""
    sources = [source for source in state.SOURCES if source != "webcam" or given.webcam]
    state.within("source", sources, "example")
    st.segmented_control("Picture", sources, key="source", format_func=_SOURCE_NAMES.__getitem__, required=True)
    source = state.get("source")
    if source == "example":
        st.number_input("Scene", 0, examples.SCENES - 1, key="scene", help="Drawn scenes the model never saw.")
        picture = examples.scene_picture(int(state.get("scene")))
    else:
        sent = (
            st.file_uploader("Picture file", _TYPES, key="file", max_upload_size=max(1, given.upload_bytes >> 20))
            if source == "upload"
            else st.camera_input("Webcam picture", key="camera")
        )
        if sent is None:
            st.info("Send a picture to ask about, or go back to the examples.", icon=":material/image:")
            return None
        try:
            picture = uploaded(
                sent.getvalue(), sent.name, most_bytes=given.upload_bytes, most_pixels=given.picture_pixels
            )
        except InputError as error:
            problem(error)
            return None
    st.image(
        picture.pixels, caption=plain(picture.name), width="stretch", alt=f"the picture asked about, {picture.name}"
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
