"""The question at the side of every view: which model, which picture, what is asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import streamlit as st
from numpy.typing import NDArray
from PIL import Image

from avl_analysis.errors import InputError
from avl_app import examples, history, state
from avl_app.data import ModelServer, Question
from avl_app.page import plain, problem, short_names
from avl_app.pictures import Picture
from avl_app.sent import sent_files
from avl_app.settings import Settings
from avl_app.uploads import uploaded

OWN = "own question"
EXAMPLE = "Describe the picture."
"""A question that every model here understands, the embedded one included."""
_WIDEST, _TALLEST = 210, 220  # pixels of the picture in the sidebar
_ONLY = "this server offers {}{} only; it was started with --no-folders"
_MEANT = "models_meant"
"""Session key of the model folders that the visitor asked for by hand."""
_TYPES = ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm"]
_SOURCE_NAMES = {"example": "Example", "upload": "Upload", "webcam": "Webcam"}


def show(given: Settings, bench: ModelServer) -> Question | None:
    """Draw the sidebar.

    None while a picture is missing or a model is to be confirmed, which the page then says.

    Raises:
        InputError: a model this server does not offer, an empty question, or one that is too long;
            the whole sidebar is drawn before.
    """
    with st.sidebar:
        st.markdown("### avl · where a model looks")
        model = _model(given)
        picture = _picture(given)
        prompt = "" if picture is None else _prompt(model, picture).strip()
        if picture is not None:
            st.button(
                "Ask",
                type="primary",
                width="stretch",
                help="Answers are remembered; asking again is immediate.",
            )
        _more(given)
        listed = st.container()
    # Said in the page rather than here: on a telephone the sidebar is closed.
    if model not in given.models:
        allowed(model, given)
        if not _meant(model):
            return None
    if picture is None:
        st.info("Send a picture to ask about, or go back to the examples.", icon=":material/image:")
        return None
    if not prompt:
        raise InputError(f"The question is empty: write one, for example “{EXAMPLE}”")
    if len(prompt) > state.MOST_TEXT:
        raise InputError(
            f"The question has {len(prompt)} characters; at most {state.MOST_TEXT} are accepted:"
            " shorten it"
        )
    question = Question(model, picture, prompt, int(state.get("longest")))
    history.note(question)
    with listed:
        history.show(question)
        _card(bench, question)
    return question


def _card(bench: ModelServer, question: Question) -> None:
    """What the model is, once it is in memory."""
    vlm = bench.loaded(question.model)
    if vlm is None:
        return
    with st.expander("About this model"):
        config = vlm.model.config.get_text_config()
        weights = next(vlm.model.parameters())
        facts = {
            "class": type(vlm.model).__name__,
            "decoder layers": config.num_hidden_layers,
            "query heads": config.num_attention_heads,
            "key/value heads": getattr(config, "num_key_value_heads", None),
            "parameters": f"{sum(p.numel() for p in vlm.model.parameters()):,}",
            "numbers": str(weights.dtype).removeprefix("torch."),
            "device": str(weights.device),
        }
        seen = bench.known("observation", question)
        if seen is not None:
            facts["image tokens here"] = int((seen.image >= 0).sum())
        lines = [f"{name}: **{plain(str(value))}**" for name, value in facts.items() if value]
        st.markdown("  \n".join(lines))


def _model(given: Settings) -> str:
    """Name of the chosen model."""
    typed = str(state.get("model"))
    options = list(
        dict.fromkeys([*given.models, *([typed] if typed and (given.folders or given.hub) else [])])
    )
    state.within("model", options, options[0])
    labels = dict(zip(options, short_names(options), strict=True))
    st.selectbox("Model", options, key="model", format_func=labels.__getitem__)
    chosen = str(state.get("model"))
    if chosen == examples.EMBEDDED:
        st.caption(examples.about_model())
    return chosen


def allowed(name: str, given: Settings) -> None:
    """Whether a visitor may have this model loaded.

    A folder where folders may be named, a hub id with the switch.

    Raises:
        InputError: neither. A server that opens no folders says the same of folders that exist and
            of folders that do not.
    """
    if Path(name).expanduser().is_dir():
        if given.folders:
            return
        raise InputError(_ONLY.format(", ".join(given.models), " and hub ids" * given.hub))
    if given.hub:
        return
    if not given.folders:
        raise InputError(_ONLY.format(", ".join(given.models), ""))
    raise InputError(
        f"there is no model folder {name} on the server, and hub ids are loaded only by a"
        " server started with avl app --hub"
    )


def _meant(name: str) -> bool:
    """Whether the visitor wants this model: typed here, or confirmed once where a link names it.

    A link can come from anybody, and loading a folder takes time and memory.
    """
    if name in st.session_state.setdefault(_MEANT, set()) or not Path(name).expanduser().is_dir():
        return True
    st.info(
        plain(f"The link asks for a model of this machine: {name}"), icon=":material/folder_open:"
    )
    if st.button("Load this model", type="primary"):
        st.session_state[_MEANT].add(name)
        return True
    return False


def _more(given: Settings) -> None:
    """What is seldom changed: another model, the longest answer."""
    if int(state.get("longest")) > given.longest:
        state.put("longest", given.longest)
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
        st.session_state.setdefault(_MEANT, set()).add(typed)
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
    elif source == "upload":
        sent = sent_files(
            "Picture file",
            _TYPES,
            lambda files: _read(given, *next(iter(files.items()))),
            key="file",
            most_megabytes=max(1, given.upload_bytes >> 20),
        )
        if sent is None:
            return None
        picture = sent.value
    else:
        shot = st.camera_input("Webcam picture", key="camera")
        if shot is None:
            return None
        try:
            picture = _read(given, shot.name, shot.getvalue())
        except InputError as error:
            problem(error)
            return None
    st.image(
        thumbnail(picture.pixels),
        caption=plain(picture.name),
        alt=f"the picture asked about, {picture.name}",
    )
    return picture


def _read(given: Settings, name: str, data: bytes) -> Picture:
    """A picture within the server's limits."""
    return uploaded(data, name, most_bytes=given.upload_bytes, most_pixels=given.picture_pixels)


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture at most `_WIDEST` wide and `_TALLEST` high, however flat or narrow it is.

    Args:
        pixels: (height, width, 3).
    """
    height, width = pixels.shape[:2]
    scale = min(_WIDEST / width, _TALLEST / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _prompt(model: str, picture: Picture) -> str:
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
    embedded = model == examples.EMBEDDED
    if embedded:
        st.selectbox(
            "It can be asked, for example",
            list(examples.suggestions().values()),
            index=None,
            key="suggestion",
            on_change=_take_suggestion,
            placeholder="questions of each kind",
        )
    prompt = str(st.text_area("Your question", key="prompt", height=90))
    if embedded and (foreign := examples.unknown_words(prompt)):
        words = ", ".join(f"“{word}”" for word in foreign[:5])
        st.caption(
            plain(
                f"This model never read {words}; it spells such words letter by letter, and its"
                " answer is likely to be wrong."
            )
        )
    return prompt


def _take_suggestion() -> None:
    if chosen := st.session_state["suggestion"]:
        state.put("prompt", chosen)
