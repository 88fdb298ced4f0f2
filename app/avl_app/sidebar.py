"""The question at the side of every view: which model, which picture, what is asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import streamlit as st
from numpy.typing import NDArray
from PIL import Image

from avl_analysis.errors import InputError
from avl_analysis.figures.clickable import COLOURS
from avl_app import chat, examples, history, state
from avl_app.chat import OWN
from avl_app.data import ModelServer, Question
from avl_app.page import plain, problem, short_names
from avl_app.pictures import Picture
from avl_app.sent import sent_files
from avl_app.settings import Settings
from avl_app.uploads import uploaded

EXAMPLE = "Describe the picture."
"""A question that every model here understands, the embedded one included."""
_WIDEST, _TALLEST = 210, 220  # pixels of the picture in the sidebar
_ONLY = "this server offers {}{} only; it was started with --no-folders"
_SHOWN = 9
"""Scenes that are shown as pictures at once."""
_MEANT = "models_meant"
"""Session key of the model folders that the visitor asked for by hand."""
_SCALES = {
    "token": "largest patch of the token",
    "answer": "largest patch of any token of the answer",
    "row": "all attention of the token",
}
"""What the strongest colour over a picture stands for."""
_TYPES = ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm"]
_SOURCE_NAMES = {"example": "Example", "video": "Video", "upload": "Upload", "webcam": "Webcam"}


def show(given: Settings, bench: ModelServer) -> Question | None:
    """Draw the sidebar.

    None while a picture is missing or a model is to be confirmed, which the page then says.

    Raises:
        InputError: a model this server does not offer, an empty question, or one that is too long;
            the whole sidebar is drawn before.
        CancelledError: the visitor has cancelled the answer to an earlier question.
    """
    with st.sidebar:
        st.markdown("### avl · where a model looks")
        model = _model(given)
        picture = _picture(given, bench)
        prompt = "" if picture is None else _prompt(model, picture).strip()
        if picture is not None:
            st.button(
                "Ask",
                type="primary",
                width="stretch",
                on_click=state.uncancel,
                help="Answers are remembered; asking again is immediate.",
            )
        _more(given)
        # The place for what needs the question, which is complete only further down.
        listed = st.container()
    # Said in the page rather than here: on a telephone the sidebar is closed.
    if model not in given.models:
        # Not offered by the server, so it was typed here or stands in a link.
        allowed(model, given)
        if not _meant(model):
            return None
    if picture is None:
        st.info("Send a picture to ask about, or go back to the examples.", icon=":material/image:")
        return None
    if not prompt:
        raise InputError(f"The question is empty: write one, for example “{EXAMPLE}”")
    if len(prompt) > state.MOST_QUESTION:
        raise InputError(
            f"The question has {len(prompt)} characters; at most {state.MOST_QUESTION} are"
            " accepted: shorten it"
        )
    question = Question(
        model,
        picture,
        prompt,
        int(state.get("longest")),
        float(state.get("temperature")),
        # of no meaning for a greedy answer, which is then the same whatever it stands at
        int(state.get("seed")) if state.get("temperature") else 0,
        str(state.get("system")).strip(),
    )
    question = chat.continued(bench, question)
    history.note(question)
    with listed:
        history.show(question)
        _card(bench, question)
    return question


def _card(bench: ModelServer, question: Question) -> None:
    """What the model is, once it is in memory."""
    # Looking at facts must not load a model.
    vlm = bench.loaded(question.model)
    if vlm is None:
        return
    with st.expander("About this model"):
        config = vlm.model.config.get_text_config()
        # The first weight stands for all in number type and device.
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
        # What the configuration does not say is None here and left out.
        lines = [f"{name}: **{plain(str(value))}**" for name, value in facts.items() if value]
        st.markdown("  \n".join(lines))


def _model(given: Settings) -> str:
    """Name of the chosen model."""
    typed = str(state.get("model"))
    # A name that this server may not open is not even listed, and `within` goes back to the first
    # model.
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
    # A name can be a folder and a hub id; what lies on this machine comes first.
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
    # What is confirmed stays so for the visit. Hub ids get here only on a server started with
    # --hub.
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
    """What is seldom changed: how answers are generated and drawn, another model."""
    # An address can ask for more tokens than this server allows, which the slider would refuse.
    if int(state.get("longest")) > given.longest:
        state.put("longest", given.longest)
    with st.expander("More"):
        st.slider("Longest answer, in tokens", 1, given.longest, key="longest")
        st.slider(
            "Temperature",
            0.0,
            2.0,
            step=0.1,
            key="temperature",
            help="0 writes the likeliest token every time; above, tokens are drawn.",
        )
        st.number_input(
            "Seed of the draws", 0, 999_999, key="seed", disabled=not state.get("temperature")
        )
        st.text_area(
            "System prompt",
            key="system",
            height=68,
            max_chars=state.MOST_QUESTION,
            placeholder="the model's own",
        )
        st.selectbox("Colours over pictures", list(COLOURS), key="colours")
        st.selectbox(
            "Full colour in Ask",
            list(_SCALES),
            key="scale",
            format_func=_SCALES.__getitem__,
            help="One scale for all tokens lets their maps be compared.",
        )
        st.toggle("Smooth between patches", key="smooth")
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
    # A callback runs before the script, so the choice of another widget can still be written.
    if typed := st.session_state["typed_model"].strip():
        st.session_state.setdefault(_MEANT, set()).add(typed)
        state.put("model", typed)


def _picture(given: Settings, bench: ModelServer) -> Picture | None:
    """The chosen picture; None, with the next step said, if there is none.

    One that was sent is remembered under its hash, so that a link to it works for as long as the
    server runs and others have not taken its place.
    """
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
        _gallery()
        picture = examples.scene_picture(int(state.get("scene")))
    elif source == "video":
        st.number_input(
            "Video",
            0,
            examples.SCENES - 1,
            key="clip",
            help="A moving shape; the embedded model has seen single pictures only.",
        )
        picture = examples.moving_picture(int(state.get("clip")))
    elif source == "upload":
        sent = sent_files(
            "Picture file",
            _TYPES,
            lambda files: _read(given, *next(iter(files.items()))),
            key="file",
            # in whole megabytes, as the widget wants it, and at least one
            most_megabytes=max(1, given.upload_bytes >> 20),
        )
        # Without a file of one's own the picture may be known by the hash in the link.
        linked = None if sent is not None else bench.picture(str(state.get("picture")))
        if sent is None and linked is None:
            if state.get("picture"):
                st.caption(
                    "The link names a picture that this server no longer has: send it again."
                )
            return None
        if sent is None:
            assert linked is not None
            picture = linked
            st.caption("The picture comes from the link.")
        else:
            picture = sent.value
        # In every run, so that a picture in use is not the next one to be given away.
        bench.remember(picture)
        state.put("picture", picture.digest)
    else:
        shot = st.camera_input("Webcam picture", key="camera")
        if shot is None:
            return None
        try:
            picture = _read(given, shot.name, shot.getvalue())
        except InputError as error:
            problem(error)
            return None
    caption = picture.name
    if picture.moving is not None:
        truth = examples.moving_scene(picture.moving[1])
        caption += f", {len(picture.frames)} frames: the {truth.colour} {truth.shape} moves"
        caption += f" {truth.direction}"
    st.image(
        thumbnail(picture.pixels),
        caption=plain(caption),
        alt=f"the picture asked about, {picture.name}",
    )
    return picture


def _gallery() -> None:
    """The scenes around the present one as pictures to choose from, when asked for."""
    if not st.toggle("Show them as pictures", key="gallery"):
        return
    # The gallery turns in whole pages; this is the page of the present scene.
    first = int(state.get("scene")) // _SHOWN * _SHOWN
    numbers = range(first, min(first + _SHOWN, examples.SCENES))
    for row in range(0, len(numbers), 3):
        for column, number in zip(st.columns(3), numbers[row : row + 3], strict=False):
            with column:
                shown = examples.scene_picture(number).pixels
                st.image(shown, alt=f"scene {number}")
                st.button(
                    str(number),
                    key=f"gallery_{number}",
                    width="stretch",
                    on_click=state.put,
                    args=("scene", number),
                )
    left, right = st.columns(2)
    for place, label, to in (
        (left, "Before", first - _SHOWN),
        (right, "Further", first + _SHOWN),
    ):
        place.button(
            label,
            key=f"gallery_{label}",
            width="stretch",
            disabled=not 0 <= to < examples.SCENES,
            on_click=state.put,
            args=("scene", to),
        )


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
    # empty for anything but a drawn scene, about which only the visitor's own question remains
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
    if len(prompt) > state.MOST_TEXT:
        st.caption("A text of this length stands in no link; a link to this page has another.")
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
