"""What a visitor is looking at, mirrored in the address of the page, so that a view can be linked.

Every choice worth sharing is a `Field`: a key of Streamlit's session state that starts from the
address, survives while its widget is not on the page, and is written back when it differs from the
default. What is in the address was typed by anybody, so values that do not parse are ignored.

Not in the address: uploaded pictures, files and results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import streamlit as st
from streamlit.errors import StreamlitAPIException

from avl_analysis.figures.clickable import COLOURS
from avl_analysis.relevance import METHODS

Value = TypeVar("Value")
ALL = "all"
"""Choice of a layer or head that means the mean over them."""
AUTO = ""
"""No layer chosen yet: the one that says most is taken."""
MOST_TEXT = 2000
"""Characters of a text that are taken from an address, and that stand in one."""
MOST_QUESTION = 20_000
"""Characters of a question or a system prompt, such as a long text to read."""
LONG = ("prompt", "system")
"""Choices that may be longer than an address carries; such a text stands in none."""
MOST_EARLIER = 4000
"""Characters that the earlier questions of a conversation may take in an address."""


@dataclass(frozen=True)
class Field:
    """One shared choice.

    Its default and how it is read from text (None if the text makes no sense).
    """

    default: Any
    read: Callable[[str], Any]


def _number(low: float, high: float, kind: type = int) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            # "nan" passes `float`, but fails both comparisons below, as it should.
            value = kind(text)
        except ValueError:
            return None
        return value if low <= value <= high else None

    return read


def _one_of(*words: str) -> Callable[[str], str | None]:
    return lambda text: text if text in words else None


def _text(text: str) -> str:
    return text[:MOST_TEXT]


def _index(text: str) -> str | None:
    # `isdecimal` refuses signs and blanks. Whether the model has such a layer is checked by
    # `within` as soon as the answer is there.
    return text if text == ALL or (text.isdecimal() and len(text) < 5) else None


def _several(text: str) -> list[str]:
    # An address can name any number of values; 64 are taken.
    return [part for part in text.split(",") if part][:64]


def _flag(text: str) -> bool:
    return text == "1"


def conversation(text: str) -> str | None:
    """The earlier questions of a conversation as an address has them, a JSON list of texts.

    None if the text is no such list, or longer than `MOST_EARLIER`.
    """
    if not text or len(text) > MOST_EARLIER:
        return None
    try:
        questions = json.loads(text)
    # RecursionError: brackets nested by the thousand.
    except (ValueError, RecursionError):
        return None
    if not isinstance(questions, list):
        return None
    written = all(isinstance(question, str) and question.strip() for question in questions)
    return text if written else None


def earlier() -> list[str]:
    """The questions before the present one, the oldest first."""
    text = str(st.session_state["earlier"])
    return list(json.loads(text)) if text else []


VIEWS = ("ask", "heads", "patterns", "live", "benchmark", "report")
SOURCES = ("example", "video", "upload", "webcam")

BENCH_SOURCES = ("scenes", "jsonl", "saved")
PAPER = "paper"
"""A-VL at the paper's settings, among the policies of a benchmark."""
RECORDINGS = ("answer", "scenes", "file")
CUT_SOURCES = ("answer", "scenes")

FIELDS: dict[str, Field] = {
    "view": Field("ask", _one_of(*VIEWS)),
    "model": Field("", _text),
    "source": Field("example", _one_of(*SOURCES)),
    "scene": Field(0, _number(0, 999)),
    "clip": Field(0, _number(0, 999)),
    "task": Field("caption", _text),
    "prompt": Field("Describe the picture.", _text),
    "earlier": Field("", conversation),
    "longest": Field(64, _number(1, 4096)),
    "temperature": Field(0.0, _number(0.0, 2.0, float)),
    "seed": Field(0, _number(0, 999_999)),
    "system": Field("", _text),
    "token": Field(-1, _number(-1, 4096)),
    "layer": Field(AUTO, _index),
    "head": Field(ALL, _index),
    "opacity": Field(0.9, _number(0.0, 1.0, float)),
    "map": Field("raw", _one_of(*METHODS)),
    "colours": Field("amber", _one_of(*COLOURS)),
    "smooth": Field(False, _flag),
    "scale": Field("token", _one_of("token", "answer", "row")),
    "whole": Field(False, _flag),
    "gallery": Field(False, _flag),
    "picture": Field("", _text),
    "measure": Field("", _text),
    "other": Field("", _text),
    "secondary": Field(0.5, _number(0.0, 1.0, float)),
    "core": Field(0.3, _number(0.01, 1.0, float)),
    "refresh": Field(3, _number(0, 16)),
    "text": Field(0.7, _number(0.01, 1.0, float)),
    "prefill": Field(1.0, _number(0.01, 1.0, float)),
    "prefill_layer": Field(2, _number(1, 256)),
    "share": Field(0.5, _number(0.01, 1.0, float)),
    "use_share": Field(False, _flag),
    "cold": Field("dropped", _text),
    "sparse_refresh": Field(False, _flag),
    "drift": Field(0.9, _number(0.01, 1.0, float)),
    "use_drift": Field(False, _flag),
    "use_core": Field(True, _flag),
    "use_text": Field(True, _flag),
    "preset": Field("paper", _text),
    "avl_on": Field(True, _flag),
    "rivals": Field([], _several),
    "more": Field("", _text),
    "budget": Field(0.5, _number(0.02, 1.0, float)),
    "live_layer": Field("", _text),
    "drawn_policy": Field("", _text),
    "step": Field(0, _number(0, 4096)),
    "single_token": Field(False, _flag),
    "all_heads": Field(False, _flag),
    "cut": Field(False, _flag),
    "cut_of": Field("answer", _one_of(*CUT_SOURCES)),
    "over_answer": Field(False, _flag),
    "rollout": Field(False, _flag),
    "lens": Field(False, _flag),
    "readers": Field(False, _flag),
    "patches": Field([], _several),
    "framing": Field(False, _flag),
    "words": Field(False, _flag),
    "patch_words": Field(False, _flag),
    "depth": Field(0, _number(0, 9999)),
    "kinds": Field([], _several),
    "pattern": Field("", _text),
    "recording_of": Field("answer", _one_of(*RECORDINGS)),
    "per_task": Field(2, _number(1, 20)),
    "bench_source": Field("scenes", _one_of(*BENCH_SOURCES)),
    "tasks": Field(["colour", "ocr", "caption"], _several),
    "count": Field(8, _number(1, 200)),
    "bench_policies": Field([PAPER, "random", "h2o"], _several),
    "bench_budget": Field(0.5, _number(0.02, 1.0, float)),
    "bench_sweep": Field(False, _flag),
    "bench_budgets": Field(["0.2", "0.5", "0.8"], _several),
    "without_head": Field(False, _flag),
}
"""Every choice in the address: its name there is the key of the session state."""


_KEPT = "kept_choices"
"""Session key of the last value of every choice, also of those whose widget is not on the page."""
_DRAWN = "drawn_choices"
"""Session key of the choices whose widget is on the page."""
_WRITTEN = "written_address"
"""Session key of the address as this page wrote it last."""
CANCELLED = "cancelled"
"""Session key that says that the visitor cancelled the answer to the present question."""
CONVERSATION = "conversation_about"
"""Session key of the model, picture and system prompt that the earlier questions are about."""
_ASKED = "asked"
"""Session key of the question that the chosen token, layer and head belong to."""
_ADOPTED = "adopted_address"
"""Session key that says whether the present run took its choices from a changed address."""


def begin() -> None:
    """Take the choices from the address on the first run and after Back.

    Choices whose widgets were away are restored.

    A choice whose widget is on the page is not written here: Streamlit sends every value that a
    script writes back to the browser, where it would replace what the visitor has chosen since.
    """
    kept: dict[str, Any] = st.session_state.setdefault(_KEPT, {})
    # `put` fills it in the first run.
    first = not kept
    went_back = not first and _went_back(kept)
    st.session_state[_ADOPTED] = went_back
    if went_back:
        # the choices that belong to another question are in the address as well
        st.session_state.pop(_ASKED, None)
        st.session_state.pop(CONVERSATION, None)
    drawn = st.session_state.get(_DRAWN, frozenset())
    for name, field in FIELDS.items():
        if first or went_back:
            text = st.query_params.get(name)
            if text is None and _too_long(name, kept.get(name)):
                put(name, kept[name])  # what no address holds is not taken away by Back
                continue
            value = None if text is None else field.read(text)
            # Copied because some defaults are lists, which all sessions would share.
            put(name, copy(field.default if value is None else value))
        # Its widget was on the page, so the session holds what the visitor chose: noted, not
        # written.
        elif name in drawn and name in st.session_state:
            kept[name] = st.session_state[name]
        else:
            # Without its widget Streamlit drops a key or goes back to an older value.
            st.session_state[name] = kept[name]


def _went_back(kept: dict[str, Any]) -> bool:
    """Whether the address changed by itself: the visitor pressed Back or Forward.

    A choice just made arrives together with the address of before it, so an address that differs
    counts only where no choice has moved.
    """
    # None until a run has come to its end; then there is nothing to compare with.
    written = st.session_state.get(_WRITTEN)
    if written is None or dict(st.query_params.items()) == written:
        return False
    drawn = st.session_state.get(_DRAWN, frozenset())
    return all(
        name not in st.session_state or st.session_state[name] == kept[name] for name in drawn
    )


def note_drawn(*, complete: bool) -> None:
    """Note which choices have their widget on the page, at the end of a run.

    Streamlit keeps what a script once wrote under a widget's key and shows it again when the widget
    is gone, so whether a value is the visitor's own depends on whether its widget was there. That
    much is public: the value of a widget that was drawn in this run cannot be written any more.

    Args:
        complete: whether the run came to its end; one that was interrupted has left the other
            widgets on the page.
    """
    # A run that was cut short can only add widgets to those of the run before.
    drawn = set() if complete else set(st.session_state.get(_DRAWN, ()))
    kept = st.session_state[_KEPT]
    for name in FIELDS:
        try:
            # The assignment is the test. Where it succeeds, the value is the one already there.
            st.session_state[name] = kept[name]
        except StreamlitAPIException:
            drawn.add(name)
            kept[name] = st.session_state[name]
    st.session_state[_DRAWN] = frozenset(drawn)


def finish() -> None:
    """Write the choices that differ from their defaults into the address.

    Not in a run that took its choices from the address: writing there would add an entry to the
    browser's history, and Back would lead to the same page for ever.
    """
    note_drawn(complete=True)
    kept = st.session_state[_KEPT]
    if not st.session_state[_ADOPTED]:
        # None is what a widget without a choice returns.
        wanted = {
            name: _written(kept[name])
            for name, field in FIELDS.items()
            if kept.get(name, field.default) not in (field.default, None)
            and not _too_long(name, kept[name])
        }
        # Only a change is written, since each write is an entry in the browser's history.
        if dict(st.query_params.items()) != wanted:
            st.query_params.from_dict(wanted)
    st.session_state[_WRITTEN] = dict(st.query_params.items())


def get(name: str) -> Any:
    """The present value of a choice."""
    return st.session_state[name]


def put(name: str, value: Any) -> None:
    """Change a choice; before its widget is drawn, or in a callback."""
    st.session_state[name] = value
    st.session_state.setdefault(_KEPT, {})[name] = value


def asked(question: object) -> None:
    """Note what is being asked.

    Another question than before starts without a chosen token, layer or step.
    """
    # Where nothing was asked before, the token, layer and head of a link stay.
    before = st.session_state.get(_ASKED, question)
    st.session_state[_ASKED] = question
    if before != question:
        uncancel()
        for name in ("token", "layer", "head", "step", "patches"):
            put(name, copy(FIELDS[name].default))


def uncancel() -> None:
    """Answer again what was cancelled."""
    st.session_state.pop(CANCELLED, None)


def within(name: str, options: Sequence[Value], fallback: Value) -> Value:
    """The present value if it is among the possible options, else `fallback`.

    The fallback then becomes the value.

    Args:
        name: of the value in the session.
        options: what it may be.
        fallback: one of the options.
    """
    if st.session_state.get(name) not in options:
        put(name, fallback)
    value: Value = st.session_state[name]
    return value


def among(name: str, options: Iterable[Any]) -> list[Any]:
    """The present values of a choice of several that are among the options now possible."""
    # None is what Streamlit returns for some widgets with nothing chosen.
    present = list(st.session_state[name] or [])
    known = [value for value in present if value in set(options)]
    # Only if something fell away: what a run writes replaces what is chosen meanwhile.
    if known != present:
        put(name, known)
    return known


def indices(count: int | Iterable[int]) -> list[str]:
    """Options for a layer or a head: the mean over all, then each."""
    numbers = range(count) if isinstance(count, int) else count
    return [ALL, *(str(number) for number in numbers)]


def chosen(name: str) -> int | None:
    """Layer or head as a number, None for all."""
    value = st.session_state[name]
    return None if value == ALL else int(value)


def _too_long(name: str, value: Any) -> bool:
    """Whether a choice is a text that is too long for an address."""
    return name in LONG and len(value or "") > MOST_TEXT


def _written(value: Any) -> str:
    # Before the numbers: bool is a kind of int, and `_flag` reads "1", not "True".
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, list):
        # `_several` splits at commas, so no value of such a choice may contain one.
        return ",".join(map(str, value))
    # Six digits, more than the finest step of a slider (0.01).
    return f"{value:g}" if isinstance(value, float) else str(value)
