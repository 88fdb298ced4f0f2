"""Ask: the answer token by token, and where the model looked for the token that is chosen."""

from __future__ import annotations

import numpy as np
import streamlit as st

from avl_analysis.corpus.regions import Region, on_tokens, word_regions
from avl_analysis.figures import looks
from avl_analysis.figures.spec import Lines
from avl_analysis.live import Focus, Observation
from avl_analysis.scenes import Sample
from avl_app import state
from avl_app.examples import asked_scene
from avl_app.page import Context, distinct, doing, plain, plot, shown_token, streaming, strip


def show(context: Context) -> None:
    """Draw the view."""
    st.markdown(f"### {plain(context.question.prompt)}")
    seen = observe(context)
    sample = asked_scene(context.question.picture, context.question.prompt)
    step = pick_token(seen, sample)
    layer, head = _layer_and_head(seen, step)
    region = _region(seen, sample, step)
    st.markdown(f"#### {_sentence(seen, step, layer, head, region)}")
    _pictures(context, seen, step, layer, head, region)
    st.markdown("**The words it looked at**")
    strip(
        looks.token_strip(
            seen.tokens,
            seen.look(step, layer, head),
            seen.modality,
            seen.prompt,
            seen.prompt + step,
        )
    )


def observe(context: Context) -> Observation:
    """The observation of the present question, streamed if it is not known yet."""
    known: Observation | None = context.bench.known("observation", context.question)
    if known is not None:
        return known
    with streaming(doing(context)) as (on_token, waiting):
        return context.bench.observation(context.question, on_token=on_token, waiting=waiting)


def pick_token(seen: Observation, sample: Sample | None = None) -> int:
    """The answer as tokens one can choose from; returns the chosen one."""
    words = seen.answer.words[: seen.steps]
    if not words:
        st.info(
            "The model ended its answer at once, without a word; ask something else.",
            icon=":material/info:",
        )
        st.stop()
    if state.get("token") not in range(len(words)):
        state.put("token", seen.most_telling[0])
    truth = ""
    if sample is not None:
        right = seen.answer.text == sample.answer
        truth = (
            " · :green[right]" if right else f" · :orange[the truth is “{plain(sample.answer)}”]"
        )
    ended = "" if seen.answer.finished else " · stopped at the longest length"
    st.markdown(
        f"**Answer**, token by token; choose one to see where the model looked for it{truth}{ended}"
    )
    labels = distinct([shown_token(word) for word in words])
    st.pills(
        "Answer tokens",
        range(len(words)),
        key="token",
        format_func=labels.__getitem__,
        required=True,
        label_visibility="collapsed",
    )
    return int(state.get("token"))


def _layer_and_head(seen: Observation, step: int) -> tuple[int | None, int | None]:
    """Controls for layer, head and opacity, in one row."""
    layers, heads = state.indices(seen.layers), state.indices(seen.heads)
    state.within("layer", layers, str(seen.most_telling[1]))
    state.within("head", heads, state.ALL)
    first, second, third = st.columns([3, 3, 2])
    first.select_slider(
        "Layer",
        layers,
        key="layer",
        format_func=lambda v: "mean over layers" if v == state.ALL else v,
    )
    second.select_slider(
        "Head", heads, key="head", format_func=lambda v: "mean over heads" if v == state.ALL else v
    )
    third.slider("Opacity of the patches", 0.0, 1.0, step=0.05, key="opacity")
    return state.chosen("layer"), state.chosen("head")


def _region(seen: Observation, sample: Sample | None, step: int) -> Region:
    """What the token is about; empty where that is not known."""
    if sample is None or seen.answer.text != sample.answer:
        return Region()
    image = seen.images[0] if len(seen.images) == 1 else None
    return on_tokens(word_regions(sample, seen.answer.words)[step], image)


def _sentence(
    seen: Observation, step: int, layer: int | None, head: int | None, region: Region
) -> str:
    """What one sees, in one sentence."""
    focus: Focus = seen.focus(step, layer, head, region.tokens)
    word = f"“{shown_token(seen.answer.words[step])}”"
    who = "the model" if layer is None else f"layer {layer}"
    who = who if head is None else f"head {head} of {who}"
    if focus.of == 0:
        return f"To write {word}, {who} had no picture to look at."
    said = (
        f"To write {word}, {who} gives {focus.mass:.0%} of its attention to the picture, most of it"
        f" to {focus.patches} of {focus.of} patches"
    )
    if not np.isfinite(focus.lift):
        return f"{said}."
    return (
        f"{said}; {focus.region:.0%} of that falls on what the word is about, {focus.lift:.1f}"
        " times chance."
    )


def _pictures(
    context: Context,
    seen: Observation,
    step: int,
    layer: int | None,
    head: int | None,
    region: Region,
) -> None:
    """The picture as it is, with the attention over it, and how layers divide their attention."""
    pixels = context.question.picture.pixels
    look = seen.look(step, layer, head)
    plainly, over, lines = st.columns([1, 1, 1])
    with plainly:
        st.markdown("**The picture**" + (" and what the word is about" if region.boxes else ""))
        plot(looks.plain_picture(pixels, region.boxes), "picture", height=320)
    with over:
        st.markdown(f"**Attention for “{shown_token(seen.answer.words[step])}”**")
        if seen.drawable:
            top = float(np.nanmax(look[seen.image == 0], initial=0.0))
            overlay = looks.token_overlay(pixels, seen.on_image(look), boxes=region.boxes)
            plot(overlay, "overlay", opacity=float(state.get("opacity")), height=320)
            st.caption(f"Full amber: {top:.1%} of all attention, on the patch that gets most.")
        else:
            st.info(
                "This model does not say which patch of the picture a token stands for.",
                icon=":material/info:",
            )
    with lines:
        st.markdown("**Picture or text, layer by layer**")
        plot(by_layer(seen, step, head), "by_layer", titled=False, height=320)


def by_layer(seen: Observation, step: int, head: int | None) -> Lines:
    """How every layer divides this token's attention."""
    masses = [seen.mass(step, layer, head) for layer in seen.layers]
    return looks.mass_by_layer(
        seen.layers, {name: [mass[name] for mass in masses] for name in masses[0]}
    )
