"""Part of Ask: what the chosen token could have been, who looked at a patch, and rollout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import streamlit as st

from avl_analysis.answer_plots import plot_choices, plot_lens, plot_patch, plot_rollout, plot_words
from avl_analysis.figures import Box, looks
from avl_analysis.figures.strip import visible
from avl_analysis.live import END, Observation
from avl_app import code, state
from avl_app.page import (
    Context,
    chosen_patches,
    keep,
    patches,
    picture_height,
    plot,
    shown_token,
    streaming,
)

_TOLD = 3
"""Likeliest tokens that are named in the sentence."""


def choices(context: Context, seen: Observation, step: int) -> None:
    """With which probability the chosen token was written, and what else it could have been.

    Args:
        context: of the page.
        seen: the answer, watched.
        step: number of the chosen token.
    """
    choice = seen.answer.choices[step]
    likeliest = zip(choice.words[:_TOLD], choice.probabilities[:_TOLD], strict=True)
    told = ", ".join(
        f"{'the end' if word == END else f'“{shown_token(word)}”'} {share:.1%}"
        for word, share in likeliest
    )
    rank = "" if choice.rank == 0 else f", {choice.rank} tokens being likelier"
    st.markdown(
        f"**“{shown_token(seen.answer.words[step])}” was written with probability"
        f" {choice.probability:.1%}**{rank} · likeliest: {told} · entropy {choice.entropy:.2f} nats"
    )
    with st.expander("Next-token probabilities", icon=":material/casino:"):
        figure = plot_choices(seen, step).figure
        for column, panel in zip(st.columns(2), figure.panels, strict=True):
            with column:
                st.markdown(f"**{panel.title.capitalize()}**")
                plot(panel, f"choices_{panel.title[:11]}", titled=False, height=280)
        st.caption(
            "After the penalties of the model's own generation settings, at the temperature of the"
            " answer; at 1 where it takes the likeliest token every time."
        )
        keep(figure, code.choices(context.question, step), "choices")


def words(context: Context, seen: Observation, layer: int | None, head: int | None) -> None:
    """Attention from every answer token to every word, when asked for.

    Args:
        context: of the page.
        seen: the answer, watched.
        layer, head: the chosen ones; None for the mean.
    """
    if not st.toggle("From every token to every word", key="words"):
        return
    figure = plot_words(seen, layer, head).figure
    # 24 pixels for each answer token and 120 for the axis; six rows at least.
    plot(figure.panels[0], "words_map", titled=False, height=120 + 24 * max(6, seen.steps))
    keep(figure, code.words(context.question, layer, head), "words")


def readers(
    context: Context, seen: Observation, step: int, layer: int | None, head: int | None
) -> None:
    """From patches to the tokens that looked at them, when asked for.

    Args:
        context: of the page.
        seen: the answer, watched.
        step: number of the chosen token, whose attention lies over the picture.
        layer, head: the chosen ones; None for the mean.
    """
    if not seen.drawable or not st.toggle("Which tokens looked at a patch?", key="readers"):
        return
    # The picture is that of the first image with known patches, and chosen numbers count its tokens
    # from 0.
    first = seen.drawable[0]
    count = len(seen.images[first].position)
    # Text, because that is what a choice of several is in the address.
    known = [str(number) for number in range(count)]
    chosen = [int(number) for number in state.among("patches", known)]
    pixels = context.question.picture.pixels
    left, right = st.columns([1, 2])
    with left:
        framing = st.toggle("Draw a frame around several", key="framing")
        told = "Draw a frame around patches" if framing else "Click a patch"
        st.markdown(f"**{told}**")
        overlay = looks.token_overlay(pixels, seen.on_image(seen.look(step, layer, head), first))
        # A widget for each way of choosing: the two have different selection modes.
        key = "patch_frame" if framing else "patch_map"
        patches(
            overlay,
            key,
            chosen,
            lambda: _take_patches(key),
            framing=framing,
            height=picture_height(pixels),
        )
        st.multiselect("Image tokens", known, key="patches", placeholder="or choose by number")
    with right:
        if not chosen:
            st.info("No patch is chosen yet.", icon=":material/touch_app:")
            return
        figure = plot_patch(seen, chosen, layer, head, image=first).figure
        bars = figure.panels[0]
        st.markdown("**Attention of every answer token on what is chosen**")
        plot(bars, "patch_bars", titled=False, height=300)
        share = len(chosen) / count
        st.caption(f"{len(chosen)} of {count} patches, {share:.1%} of the picture's tokens.")
        keep(figure, code.patch(context.question, chosen, layer, head), "patch")


def _take_patches(key: str) -> None:
    """What was chosen in the picture becomes the choice."""
    # As many as the address is read back with (`state`).
    state.put("patches", [str(number) for number in chosen_patches(key)[:64]])


def rollout(
    context: Context,
    seen: Observation,
    step: int,
    layer: int | None,
    framed: tuple[Box, ...],
) -> None:
    """Attention followed through the layers, when asked for.

    Args:
        context: of the page.
        seen: the answer, watched.
        step: number of the chosen token.
        layer: the last layer that is followed; None for all.
        framed: frames over the picture.
    """
    if not seen.drawable or not st.toggle("Followed through the layers (rollout)", key="rollout"):
        return
    with streaming("Following attention back through the layers") as (_, waiting):
        found = context.bench.rollout(context.question, seen.answer, layer, waiting)
    pixels = context.question.picture.pixels
    figure = plot_rollout(seen, found, pixels, step, boxes=framed).figure
    for number, (column, panel) in enumerate(zip(st.columns(2), figure.panels, strict=True)):
        with column:
            st.markdown(f"**{panel.title.capitalize()}**")
            shown = replace(panel, title="")
            plot(
                shown,
                f"rollout{number}",
                opacity=float(state.get("opacity")),
                height=picture_height(pixels, 420),
            )
    # (positions,): image tokens of any picture in the prompt
    on_image = seen.image >= 0
    share = float(np.nansum(found.values[step][on_image]))
    st.caption(
        f"{share:.0%} of what this token draws comes from the picture. Rollout multiplies the"
        " attention of all layers, half of each being the token itself; heads count alike, so the"
        " choice of a head changes nothing here."
    )
    keep(figure, code.rollout(context.question, step, layer, framed), "rollout")


def lens(context: Context, seen: Observation, step: int) -> None:
    """What every layer would write, when asked for.

    Args:
        context: of the page.
        seen: the answer, watched.
        step: number of the chosen token.
    """
    if not st.toggle("What would every layer write? (logit lens)", key="lens"):
        return
    with streaming("Reading every layer as if it were the last") as (_, waiting):
        found, words = context.bench.lens(context.question, seen.answer, waiting)
    figure = plot_lens(seen, found).figure
    left, right = st.columns([3, 2])
    with left:
        st.markdown("**Probability of what was written, layer by layer**")
        plot(figure.panels[0], "lens_map", titled=False, height=320)
    with right:
        word = shown_token(seen.answer.words[step])
        st.markdown(f"**In the place of “{word}”**")
        st.dataframe(
            {
                "layer": list(range(len(words[step]))),
                "would write": [visible(text) for text in words[step]],
                "with": [f"{share:.1%}" for share in found.share[step]],
                "what was written": [f"{share:.1%}" for share in found.written[step]],
            },
            hide_index=True,
            alt="what every layer would write",
        )
    st.caption(
        "The state behind a layer through the model's own last norm and output embedding. A layer"
        " that writes in another way than the last one looks as if it knew nothing."
    )
    keep(figure, code.lens(context.question), "lens")
