"""The questions of this visit: listed, asked again with a click, and set beside the present one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st

from avl_app import state
from avl_app.data import Question
from avl_app.page import distinct

_KEY = "history"
_MOST = 20
_CHOICES = (
    *("model", "source", "scene", "clip", "task", "prompt"),
    *("longest", "temperature", "seed", "system", "earlier"),
)
"""Choices that make a question."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A question of this visit, with the choices and the file that lead back to it."""

    question: Question
    choices: dict[str, Any]
    file: Any


def note(question: Question) -> None:
    """Remember the present question, the newest last."""
    held: list[Asked] = st.session_state.setdefault(_KEY, [])
    choices = {name: state.get(name) for name in _CHOICES}
    # A question that is asked again moves to the end instead of being listed twice.
    kept = [asked for asked in held if asked.question != question]
    # `file_held` is what `sent_files` keeps of the picture uploader, whose key is `file`.
    kept.append(Asked(question, choices, st.session_state.get("file_held")))
    st.session_state[_KEY] = kept[-_MOST:]


def others(question: Question) -> list[Question]:
    """The other questions of this visit, the newest first."""
    held: list[Asked] = st.session_state.get(_KEY, [])
    return [asked.question for asked in reversed(held) if asked.question != question]


def titles(questions: list[Question]) -> list[str]:
    """The questions in words, each different; not escaped."""
    return distinct([f"{q.picture.name}: {q.prompt[:60]}" for q in questions])


def show(question: Question) -> None:
    """List the other questions of this visit.

    Choosing one asks it again, without an answer's wait.
    """
    known = others(question)
    if not known:
        return
    names = titles(known)
    with st.expander(f"Asked before ({len(known)})"):
        for number, (asked, name) in enumerate(zip(known, names, strict=True)):
            st.button(
                name,
                key=f"history_{number}",
                type="tertiary",
                on_click=_again,
                args=(asked,),
            )


def _again(question: Question) -> None:
    """Return to a question: its choices, and the picture that was sent for it."""
    for asked in st.session_state[_KEY]:
        if asked.question == question:
            for name, value in asked.choices.items():
                state.put(name, value)
            # The conversation of these choices is about their own picture.
            st.session_state.pop(state.CONVERSATION, None)
            # No script can fill an uploader; an empty one shows what is kept here.
            if asked.file is not None:
                st.session_state["file_held"] = asked.file
