"""A-VL live: policies switched on and off on the loaded model, side by side, and what they do to
every patch.
"""

from __future__ import annotations

import math
import time
from difflib import SequenceMatcher
from itertools import groupby

import numpy as np
import streamlit as st

import avl
from avl.tokens import Modality
from avl_analysis.figures import looks
from avl_analysis.figures.spec import Axis
from avl_analysis.figures.strip import visible
from avl_analysis.live import Answer, Disagreement, Observation
from avl_app import policies, state
from avl_app.page import Context, plain, plot, shown_token, streaming, strip
from avl_app.views.ask import observe

_TICK = 0.6  # seconds a step is shown while playing


def show(context: Context) -> None:
    """Draw the view."""
    chosen = policies.choose()
    answers = _answers(context, chosen)
    full = answers[policies.FULL]
    off = {
        name: context.bench.disagreement(context.question, policy, full)
        for name, policy in chosen.items()
        if name != policies.FULL
    }
    _table(answers, off)
    if off:
        _patches(context, observe(context), {name: answers[name] for name in off})
        _fidelity(full, off)
        _curves(answers, off)


def _answers(context: Context, chosen: dict[str, avl.Policy]) -> dict[str, Answer]:
    """Every policy's own answer, one after the other on the one model, streamed side by side."""
    columns = st.columns(len(chosen))
    places = {}
    for column, name in zip(columns, chosen, strict=True):
        with column:
            st.markdown(f"**{plain(name)}**")
            places[name] = st.empty()
    answers: dict[str, Answer] = {}
    for name, policy in chosen.items():
        known: Answer | None = context.bench.known("answer", context.question, policy)
        if known is None:
            with streaming("Answering", places[name]) as (on_token, waiting):
                known = context.bench.answer(context.question, policy, on_token, waiting)
        answers[name] = known
        reference = answers[policies.FULL].words
        places[name].markdown(marked(known.words, reference) + ("" if known.finished else " …"))
    return answers


def marked(words: tuple[str, ...], reference: tuple[str, ...]) -> str:
    """An answer with the tokens that differ from the full cache's set off, by colour and by
    underlining.
    """
    if not words:
        return "*nothing*"
    same = set()
    for block in SequenceMatcher(None, reference, words, autojunk=False).get_matching_blocks():
        same |= set(range(block.b, block.b + block.size))
    parts = []
    for alike, places in groupby(range(len(words)), same.__contains__):
        text = "".join(words[place] for place in places)
        space, shown = " " if text.startswith(" ") else "", plain(text.strip())
        parts.append(space + (shown if alike or not shown else f":orange-background[**{shown}**]"))
    return "".join(parts).strip() or "␣"


def _table(answers: dict[str, Answer], off: dict[str, Disagreement]) -> None:
    """What each policy cost and how far it is from the full cache."""
    rows = []
    for name, said in answers.items():
        usage, differs = said.usage, off.get(name)
        assert usage is not None
        keys = [np.mean(step.attended) for step in usage.steps if step.step > 0]
        rows.append(
            {
                "policy": name,
                "KV bytes held": usage.filled,
                "of full cache": usage.filled_share,
                "keys read per step": float(np.mean(keys)) if keys else math.nan,
                "TTFT, ms": 1000 * said.ttft,
                "TPOT, ms": 1000 * said.tpot,
                "tokens": len(said.words),
                "first difference at": _first_difference(said, answers[policies.FULL]),
                "same prediction": 1.0 if differs is None else float(differs.agree.mean()),
                "KL, nats": 0.0 if differs is None else float(differs.kl.mean()),
            }
        )
    st.dataframe(
        {key: [row[key] for row in rows] for key in rows[0]},
        hide_index=True,
        column_config={
            "KV bytes held": st.column_config.NumberColumn(
                "KV bytes", format="localized", width=88
            ),
            "of full cache": st.column_config.ProgressColumn(
                "of full", format="percent", min_value=0, max_value=1, color="blue", width=110
            ),
            "keys read per step": st.column_config.NumberColumn(
                "keys/step", format="%.1f", width=82
            ),
            "TTFT, ms": st.column_config.NumberColumn(format="%.0f", width=76),
            "TPOT, ms": st.column_config.NumberColumn(format="%.1f", width=76),
            "tokens": st.column_config.NumberColumn(width=64),
            "first difference at": st.column_config.TextColumn("differs at", width=78),
            "same prediction": st.column_config.NumberColumn(
                "agreement", format="percent", width=88
            ),
            "KL, nats": st.column_config.NumberColumn(format="%.3f", width=76),
        },
        alt="cost and fidelity of every policy",
    )
    st.caption(
        "Times are single runs on this machine, one policy after the other; on a small model a"
        " policy's own work outweighs what it saves. Agreement and KL(full || policy): fed the full"
        " cache's answer, mean over tokens."
    )
    for name, said in answers.items():
        if said.usage is not None and said.usage.host:
            st.caption(f"{plain(name)} also holds {said.usage.host:,} bytes in host memory.")


def _first_difference(said: Answer, full: Answer) -> str:
    """Index of the first token that differs from the full cache's, a dash if none does."""
    for index, (one, other) in enumerate(zip(said.ids, full.ids, strict=False)):
        if one != other:
            return str(index)
    return "-" if len(said.ids) == len(full.ids) else str(min(len(said.ids), len(full.ids)))


def _curves(answers: dict[str, Answer], off: dict[str, Disagreement]) -> None:
    """Per token: divergence, and keys read."""
    left, right = st.columns(2)
    with left:
        st.markdown("**Divergence from the full cache, token by token**")
        axis = Axis("KL(full || policy)", "nats")
        series = {name: differs.kl for name, differs in off.items()}
        plot(looks.evolution("divergence", series, axis, slot=2), "kl", titled=False, height=280)
    with right:
        st.markdown("**Keys read, step by step**")
        read = {name: _keys_read(said) for name, said in answers.items()}
        keys = looks.evolution("keys read", read, Axis("keys read, mean over layers", "keys"))
        plot(keys, "keys", titled=False, height=280)


def _fidelity(full: Answer, off: dict[str, Disagreement]) -> None:
    """The full cache's answer once per policy, shaded by divergence; where predictions differ, what
    it would write.
    """
    st.markdown(
        "**The full cache's answer, token by token**; shade: how far the policy's prediction is"
        f" from it (full from {looks.UNLIKE:g} nat), frame: it would write another token, which"
        " follows the arrow"
    )
    for slot, (name, differs) in enumerate(off.items(), start=2):
        other = {int(at): visible(differs.preferred[at]) for at in np.flatnonzero(~differs.agree)}
        strip(looks.fidelity_strip(name, full.words, differs.kl, other, slot))


def _keys_read(said: Answer) -> np.ndarray:
    """Keys each pass read, mean over layers; the prompt's last row first."""
    assert said.usage is not None
    return np.array([float(np.mean(step.attended)) for step in said.usage.steps])


def _patches(context: Context, seen: Observation, answers: dict[str, Answer]) -> None:
    """Core, secondary and minor patches on the picture, scrubbed or played over decode steps."""
    if not seen.grids or seen.grids[0] == (0, 0):
        st.info(
            "This model does not say which patch of the picture a token stands for.",
            icon=":material/info:",
        )
        return
    st.markdown("**What happens to every patch**: choose a layer, move the step, or let it play")
    first, second, third = st.columns([2, 2, 1], vertical_alignment="bottom")
    names = list(answers)
    if st.session_state.get("drawn_policy") not in names:
        st.session_state["drawn_policy"] = names[0]
    first.segmented_control("Policy", names, key="drawn_policy", required=True, format_func=plain)
    said = answers[st.session_state["drawn_policy"]]
    layers = [str(layer) for layer in said.layers]
    state.within("live_layer", layers, layers[len(layers) // 2])
    second.select_slider("Layer", layers, key="live_layer")
    playing = third.toggle("Play", key="playing")
    st.fragment(_player, run_every=_TICK if playing else None)(
        context, seen, said, int(state.get("live_layer")), playing
    )


def _player(context: Context, seen: Observation, said: Answer, layer: int, playing: bool) -> None:
    """The step slider and the picture at that step; moves on by itself while playing."""
    assert said.states is not None
    states = said.states[said.layers.index(layer)]
    last = len(states) - 1
    step = min(int(state.get("step")), last)
    if playing and time.monotonic() - st.session_state.get("moved", 0.0) > _TICK / 2:
        step = (step + 1) % (last + 1)
        st.session_state["moved"] = time.monotonic()
    if last == 0:
        st.caption(
            "The answer has a single token, so there is nothing but the choice after the prompt."
        )
        step = 0
    else:
        state.put("step", step)
        st.slider("Decode step", 0, last, key="step", help="0 is the choice made after the prompt.")
    codes = states[step].astype(np.float64)
    codes[codes < 0] = np.nan
    image = codes[: len(seen.image)][seen.image[: len(codes)] == 0]
    counts = {int(code): int((image == code).sum()) for code in avl.State if code >= 0}
    left, right = st.columns([1, 1])
    with left:
        plot(
            looks.states_overlay(context.question.picture.pixels, seen.on_picture(codes)),
            "states",
            height=420,
        )
    with right:
        word = shown_token(said.words[step]) if step < len(said.words) else "the end"
        when = "After the prompt" if step == 0 else f"After decode step {step}"
        st.markdown(f"#### {when}, layer {layer}")
        st.markdown(
            f"{counts[2]} of {image.size} patches are **core**: held and read at every step.  \n"
            f"{counts[1]} are **secondary**: held, read at refresh steps only.  \n"
            f"{counts[0]} are **minor**: dropped for good."
        )
        read, held = _read_and_held(said, step, layer)
        st.markdown(
            f"This pass read {read:.0f} keys in this layer, words included; {held:.0f} are held"
            " after it."
        )
        text = (
            states[step][np.flatnonzero(seen.modality == Modality.TEXT)[0] :]
            if seen.modality.size
            else states[step]
        )
        known = text[text >= 0]
        st.markdown(
            f"Of the text so far, {int((known > 0).sum())} of {known.size} tokens are held."
        )
        st.markdown(f"The model now writes “{word}”.")


def _read_and_held(said: Answer, step: int, layer: int) -> tuple[float, float]:
    """Keys one layer read in a pass, and holds after it."""
    assert said.usage is not None
    at, usage = said.usage.layers.index(layer), said.usage.steps[step]
    return float(np.mean(usage.attended[at])), float(np.mean(usage.held[at]))
