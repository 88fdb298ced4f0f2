"""Part of Heads: the answer while one head's output is zero."""

from __future__ import annotations

import streamlit as st

from avl_analysis.live import Observation
from avl_app import code
from avl_app.page import Context, keep, shown_token, streaming
from avl_app.views.live import marked


def show(context: Context, seen: Observation, layer: int, head: int) -> None:
    """Draw it below the heads, when asked for.

    Args:
        context: of the page.
        seen: the answer with all heads.
        layer: decoder layer of the chosen head.
        head: the chosen query head.
    """
    if not st.toggle(f"Answer without head {head} of layer {layer}", key="without_head"):
        return
    left, right = st.columns(2)
    left.markdown(f"**With all heads**  \n{marked(seen.answer.words, seen.answer.words)}")
    with right:
        place = st.empty()
        with streaming("Answering without it", place) as (on_token, waiting):
            said = context.bench.without_heads(
                context.question, ((layer, head),), on_token, waiting
            )
        place.markdown(f"**Without it**  \n{marked(said.words, seen.answer.words)}")
    # An answer has at least one id, if only that of its end, which has a choice but no word.
    first, other = seen.answer.choices[0], said.choices[0]
    written = shown_token(seen.answer.words[0])
    if said.ids[0] == seen.answer.ids[0]:
        st.caption(
            f"The first token, “{written}”, has probability {first.probability:.1%} with all heads"
            f" and {other.probability:.1%} without this one."
        )
    else:
        st.caption(
            f"Instead of “{written}” ({first.probability:.1%}) the first token is now"
            f" “{shown_token(said.words[0] if said.words else '')}” ({other.probability:.1%})."
        )
    st.caption(
        "One head that can be missed is not useless: others may do the same. `avl ablate` compares"
        " kinds of heads over many questions, against as many others."
    )
    keep(None, code.without_head(context.question, layer, head), "silence")
