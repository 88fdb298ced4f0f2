"""A second question after an answer: the conversation that the present question continues.

What the visitor keeps, and what a link carries, are the earlier questions alone. Their answers are
the model's own, given again (or found among the results) in the order of the conversation, so a
link leads to the same conversation wherever the model gives the same answers.
"""

from __future__ import annotations

import json
from dataclasses import replace

import streamlit as st

from avl_app import state
from avl_app.data import ModelServer, Question
from avl_app.page import plain, streaming

OWN = "own question"
"""The choice among the questions of an example that stands for one of the visitor's own."""


def continued(bench: ModelServer, question: Question) -> Question:
    """The question with what was said before it; earlier questions are answered where need be.

    A conversation is about one picture and ends when another picture, model or system prompt is
    chosen.
    """
    about = (question.model, question.digest, question.system)
    # Where nothing is noted, the choices come from a link or from the list of questions.
    before = st.session_state.get(state.CONVERSATION, about)
    st.session_state[state.CONVERSATION] = about
    if before != about:
        state.put("earlier", "")
    history: tuple[tuple[str, str], ...] = ()
    for prompt in state.earlier():
        turn = replace(question, prompt=prompt, history=history)
        history = (*history, (prompt, _answer(bench, turn)))
    return replace(question, history=history)


def _answer(bench: ModelServer, turn: Question) -> str:
    """What the model said to an earlier question."""
    seen = bench.known("observation", turn)
    if seen is None:
        with streaming("Answering what was asked before") as (on_token, waiting):
            seen = bench.observation(turn, on_token=on_token, waiting=waiting)
    return str(seen.answer.text)


def said(question: Question) -> None:
    """The conversation so far, and the way out of it."""
    if not question.history:
        return
    with st.container(key="said"):
        for asked, answer in question.history:
            st.markdown(f":small[{plain(asked)}]  \n→ {plain(answer) or '(no word)'}")
        st.button(
            "Ask this alone",
            icon=":material/delete_history:",
            type="tertiary",
            on_click=state.put,
            args=("earlier", ""),
            help="Leaves out what was said before; the question at the side stays.",
        )


def further(question: Question) -> None:
    """The field for a question that continues from the present answer.

    Args:
        question: the present one, with what was said before it.
    """
    written = _with(question.prompt)
    if written is None:
        st.caption(
            "This conversation is as long as a link can carry; “Ask this alone” begins another."
        )
        return
    st.chat_input(
        "Ask further about it",
        key="further",
        max_chars=state.MOST_TEXT,
        on_submit=_take,
        args=(written,),
    )


def _with(prompt: str) -> str | None:
    """The earlier questions and one more, as the address has them; None where they are too many."""
    written = json.dumps([*state.earlier(), prompt], ensure_ascii=False)
    return state.conversation(written)


def _take(written: str) -> None:
    """What was written becomes the question, and the present one an earlier one."""
    if text := str(st.session_state["further"] or "").strip():
        state.put("earlier", written)
        state.put("task", OWN)
        state.put("prompt", text)
