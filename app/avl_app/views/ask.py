"""Ask: the answer token by token, and where the model looked for the token that is chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import streamlit as st

from avl_analysis.answer_plots import plot_over_answer, plot_token
from avl_analysis.corpus.regions import Region, on_tokens, word_regions
from avl_analysis.figures import Box, Figure, Overlay, looks
from avl_analysis.live import FOCUS, Floats, Focus, Observation
from avl_analysis.relevance import METHODS
from avl_analysis.scenes import SceneSample
from avl_analysis.scenes.drawing import SIDE
from avl_app import chat, code, history, state
from avl_app.examples import asked_scene
from avl_app.page import (
    Context,
    distinct,
    doing,
    keep,
    picture_height,
    plain,
    plot,
    shown_token,
    streaming,
    strip,
)
from avl_app.views import frames, maps, tokens


def show(context: Context) -> None:
    """Draw the view."""
    chat.said(context.question)
    st.markdown(f"### {plain(context.question.prompt)}")
    seen = observe(context)
    sample = asked_scene(context.question.picture, context.question.prompt)
    step = pick_token(seen, sample)
    if step is None:
        return
    with st.container(key="ask"):
        with st.container(key="ask_controls"):
            video = bool(context.question.picture.frames)
            # Relevance maps are drawn over one picture with known patches.
            method = maps.choose() if seen.drawable and not video else "raw"
            whole = not video and _whole(seen)
            layer, head = _layer_and_head(seen)
        region = _region(seen, sample, step)
        with st.container(key="ask_pictures"):
            st.markdown(f"#### {_sentence(seen, step, layer, head, region)}")
            if video and seen.drawable:
                figure, python = frames.show(context, seen, step, layer, head)
            else:
                figure, python = _pictures(context, seen, step, layer, head, region, method, whole)
            keep(figure, python, "ask")
        with st.container(key="ask_words"):
            _words(seen, step, layer, head)
            tokens.choices(context, seen, step)
            chat.further(context.question)
        if video:  # the parts below are about one picture
            tokens.words(context, seen, layer, head)
            return
        _over_answer(context, seen, layer, head)
        tokens.readers(context, seen, step, layer, head)
        tokens.words(context, seen, layer, head)
        tokens.rollout(context, seen, step, layer, patch_frames(seen, region))
        tokens.lens(context, seen, step)
        maps.words_of_patches(context, seen)
        _beside(context, seen, step, layer, head)


def _beside(
    context: Context, seen: Observation, step: int, layer: int | None, head: int | None
) -> None:
    """Another question of this visit beside the present one, on one scale.

    Two pictures, or two questions about one.

    Args:
        seen: the present answer, watched.
        step: number of its chosen token.
        layer, head: the chosen ones, for both; None for the mean.
    """
    # Layers and heads of another model are not comparable, nor would the chosen ones exist in it.
    known = [q for q in history.others(context.question) if q.model == context.question.model]
    known = [question for question in known if not question.picture.frames]
    if not known:
        return
    names = dict(zip(known, history.titles(known), strict=True))
    other = st.selectbox(
        "Set beside it",
        [None, *known],
        key="beside",
        format_func=lambda q: "no other question" if q is None else names[q],
    )
    if other is None:
        return
    twin = observe(replace(context, question=other))
    words = twin.answer.words[: twin.steps]
    if not words:
        st.info("The model ended that answer at once, without a word.", icon=":material/info:")
        return
    labels = distinct([shown_token(word) for word in words])
    chosen = st.pills(
        "Tokens of the other answer",
        range(len(words)),
        default=min(twin.most_telling[0], len(words) - 1),
        format_func=labels.__getitem__,
        required=True,
        # a widget for each question: a token chosen in one answer may not exist in another
        key=f"beside_token_{hash(other)}",
    )
    shown = [(context.question, seen, step), (other, twin, int(chosen or 0))]
    # Largest attention on a patch of the first image, one for each answer. Never 0, so that the
    # colour scale has a length where nothing is looked at.
    tops = [
        float(np.nanmax(one.look(at, layer, head)[one.image == 0], initial=1e-6))
        for _, one, at in shown
    ]
    for number, (column, (question, one, at)) in enumerate(zip(st.columns(2), shown, strict=True)):
        with column:
            word = shown_token(one.answer.words[at])
            st.markdown(f"**{plain(question.prompt)}** → {plain(one.answer.text)}  \n“{word}”")
            if one.drawable:
                pixels = question.picture.pixels
                look = one.on_image(one.look(at, layer, head))
                height = picture_height(pixels, 420)
                overlay = looks.token_overlay(pixels, look, top=max(tops))
                plot(overlay, f"beside{number}", height=height)
    st.caption(f"Full colour: {max(tops):.1%} of all attention, in both.")


def _words(seen: Observation, step: int, layer: int | None, head: int | None) -> None:
    """The words the token looked at, and what their shade means."""
    # Positions of the whole row: the answer begins at `seen.prompt`, and the chosen token stands
    # `step` further on.
    shown = looks.token_strip(
        seen.tokens, seen.look(step, layer, head), seen.modality, seen.prompt, seen.prompt + step
    )
    most = float(np.nanmax(shown.values, initial=0.0))
    assert shown.value.limits is not None
    full = f"full shade: {shown.value.limits[1]:.1%} of all attention"
    st.markdown(f"**The words it looked at** · at most {most:.1%} on one word; {full}")
    strip(shown)


def _over_answer(context: Context, seen: Observation, layer: int | None, head: int | None) -> None:
    """The attention moving over the picture while the answer is written, when asked for."""
    if seen.drawable and st.toggle("Play over the answer", key="over_answer"):
        moving = plot_over_answer(seen, context.question.picture.pixels, layer, head).figure
        plot(moving.panels[0], "over_answer_plot")
        keep(moving, code.over_answer(context.question, layer, head), "moving")


def observe(context: Context) -> Observation:
    """The observation of the present question, streamed if it is not known yet."""
    known: Observation | None = context.bench.known("observation", context.question)
    if known is not None:
        return known
    with streaming(doing(context)) as (on_token, waiting):
        return context.bench.observation(context.question, on_token=on_token, waiting=waiting)


def pick_token(seen: Observation, sample: SceneSample | None = None) -> int | None:
    """The answer as tokens one can choose from; returns the chosen one, None where there is none.

    Args:
        seen: the answer, watched.
        sample: the question with its truth, which is then said too.
    """
    # Weights were kept of the first `steps` tokens only; the others cannot be looked at.
    words = seen.answer.words[: seen.steps]
    if not words:
        st.info(
            "The model ended its answer at once, without a word; ask something else.",
            icon=":material/info:",
        )
        return None
    # -1 while none is chosen; a link can name a token that this answer does not have.
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


def _layer_and_head(seen: Observation) -> tuple[int | None, int | None]:
    """Controls for layer, head and opacity, in one row."""
    layers, heads = state.indices(seen.layers), state.indices(seen.heads)
    # Until a layer is chosen: the one whose attention says most about the picture.
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


def _region(seen: Observation, sample: SceneSample | None, step: int) -> Region:
    """What the token is about; empty where that is not known."""
    # The known regions belong to the words of the right answer; no word of a wrong one has any.
    if sample is None or seen.answer.text != sample.answer:
        return Region()
    # With several images it is not known which one the regions are of.
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
    # no image tokens at all in the prompt
    if focus.of == 0:
        return f"To write {word}, {who} had no picture to look at."
    said = (
        f"To write {word}, {who} gives {focus.mass:.0%} of its attention to the picture,"
        f" {FOCUS:.0%} of that to {focus.patches} of {focus.of} patches"
    )
    # NaN where no region is known: there is nothing to compare with chance.
    if not np.isfinite(focus.lift):
        return f"{said}."
    return (
        f"{said}; {focus.region:.0%} of its attention to the picture falls on the framed patches,"
        f" which show what the word is about: {focus.lift:.1f} times chance."
    )


def _pictures(
    context: Context,
    seen: Observation,
    step: int,
    layer: int | None,
    head: int | None,
    region: Region,
    method: str,
    whole: bool,
) -> tuple[Figure, str]:
    """The picture as it is, with a map over it, and how layers divide their attention.

    Returns the figure to take away and the code that gives it.

    Args:
        seen: the answer, watched.
        step: number of the chosen token.
        layer, head: the chosen ones; None for the mean.
        region: what the token is about.
        method: which map lies over the picture.
        whole: whether the view of the whole picture is drawn without its parts.
    """
    pixels = context.question.picture.pixels
    framed = patch_frames(seen, region)
    top = _top(seen, layer, head)
    # Panels: the picture, the overlay where places of patches are known, and by layer.
    figure = plot_token(seen, pixels, step, layer, head, boxes=framed, top=top, whole=whole).figure
    shown = None
    if method != "raw":
        shown = maps.of_token(context, seen, step, layer, head, framed, whole)
    height = picture_height(pixels)
    plainly, over, lines = st.columns([1, 1, 1])
    with plainly:
        st.markdown("**The picture**" + (" and what the word is about" if framed else ""))
        plot(figure.panels[0], "picture", height=height)
    with over:
        name = METHODS[method].capitalize() if shown is not None else "Attention"
        st.markdown(f"**{name} for “{shown_token(seen.answer.words[step])}”**")
        if seen.drawable:
            overlay = figure.panels[1] if shown is None else shown.overlay(method)
            assert isinstance(overlay, Overlay)
            plot(
                overlay,
                "overlay",
                titled=False,
                opacity=float(state.get("opacity")),
                height=height,
            )
            if shown is None:
                st.caption(_scale(seen, seen.look(step, layer, head), overlay, top))
            else:
                st.caption(shown.caption(method))
        else:
            st.info(
                "This model does not say which patch of the picture a token stands for.",
                icon=":material/info:",
            )
    with lines:
        st.markdown("**Picture or text, layer by layer**")
        plot(figure.panels[-1], "by_layer", titled=False, height=320)
    if shown is not None:
        return shown.figure, shown.code
    return figure, code.token(context.question, step, layer, head, framed, top, whole)


def _whole(seen: Observation) -> bool:
    """Of a picture seen as a whole and in parts: whether the view of the whole is drawn."""
    if not seen.drawable or not seen.on_image(seen.look(0), seen.drawable[0]).in_parts:
        return False
    return st.toggle(
        "View of the whole picture",
        key="whole",
        help="The model sees this picture twice: as a whole, and in parts of higher resolution."
        " Tokens of the parts cover those of the whole unless this is on.",
    )


def _scale(seen: Observation, look: Floats, overlay: Overlay, top: float | None) -> str:
    """What full colour stands for, and how much attention the drawing does not show.

    Args:
        seen: the answer, watched.
        look: (positions,) attention of the chosen token.
        overlay: the picture with it.
        top: attention that is drawn at full strength; None for the largest that is seen.
    """
    assert overlay.patches is not None
    # Under a common scale the largest attention of this token can be far below `top`.
    full = "Full colour" if top is None else f"Full colour: {top:.1%}; here at most"
    said = f"{full}: {overlay.patches.largest:.1%} of all attention, on the patch that gets most."
    # Tokens of the other view, and those without a place, such as the ends of rows.
    unseen = float(np.nansum(look[seen.images[0].position][~overlay.patches.seen]))
    if unseen < 0.0005:
        return said
    return f"{said} {unseen:.1%} is on image tokens that are not seen here."


def _top(seen: Observation, layer: int | None, head: int | None) -> float | None:
    """Attention on a patch that is drawn at full strength; None for the largest of the token."""
    scale = state.get("scale")
    if scale == "answer":
        looks_of_all = (seen.look(step, layer, head) for step in range(seen.steps))
        return max(float(np.nanmax(look[seen.image == 0], initial=1e-6)) for look in looks_of_all)
    # A whole row of attention adds up to 1.
    return 1.0 if scale == "row" else None


def patch_frames(seen: Observation, region: Region) -> tuple[Box, ...]:
    """Frames around the patches that count as what a word is about, in pixels of the scene.

    A patch counts as soon as it touches the object, so the frame reaches beyond the object's edge.
    Without known places of patches the object's own frame is all there is.
    """
    if not region.tokens or len(seen.images) != 1 or not seen.images[0].placed:
        return region.boxes
    # (tokens, 4): left, top, right, bottom. Boxes of image tokens are shares of the picture's width
    # and height; the regions are in pixels of the drawn scene.
    patches = seen.images[0].boxes[list(region.tokens)] * SIDE
    frames = []
    for box in region.boxes:
        # Two boxes overlap unless one lies wholly beside, above or below the other; a common edge
        # alone is no overlap.
        touched = patches[
            (patches[:, 0] < box.right)
            & (patches[:, 2] > box.left)
            & (patches[:, 1] < box.bottom)
            & (patches[:, 3] > box.top)
        ]
        if len(touched):
            # the smallest box around all touched patches
            low, high = touched[:, :2].min(0), touched[:, 2:].max(0)
            edges = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
            frames.append(Box(*edges, box.label))
        else:
            frames.append(box)
    return tuple(frames)
