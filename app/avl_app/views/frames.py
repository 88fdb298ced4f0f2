"""The frames of a video in Ask: attention over each of them, and which frame each word looks at."""

from __future__ import annotations

import streamlit as st

from avl_analysis.answer_plots import by_layer, plot_video
from avl_analysis.figures import Figure, Overlay
from avl_analysis.live import Observation
from avl_app import code, state
from avl_app.page import Context, picture_height, plot, shown_token

_FRAMES_IN_A_ROW = 3


def show(
    context: Context, seen: Observation, step: int, layer: int | None, head: int | None
) -> tuple[Figure, str]:
    """The frames of a video with a map over each, and the strip over time.

    Returns the figure to take away and the code that gives it.

    Args:
        seen: the answer, watched.
        step: number of the chosen token.
        layer, head: the chosen ones; None for the mean.
    """
    frames = context.question.picture.frames
    figure = plot_video(seen, frames, step, layer, head).figure
    # One overlay for each frame drawn; the last panel is the strip over time.
    overlays = [panel for panel in figure.panels if isinstance(panel, Overlay)]
    st.markdown(f"**Every frame, for “{shown_token(seen.answer.words[step])}”**")
    for start in range(0, len(overlays), _FRAMES_IN_A_ROW):
        row = overlays[start : start + _FRAMES_IN_A_ROW]
        columns = st.columns(_FRAMES_IN_A_ROW)
        for number, (column, panel) in enumerate(zip(columns, row, strict=False), start):
            with column:
                plot(
                    panel,
                    f"frame{number}",
                    opacity=float(state.get("opacity")),
                    height=picture_height(frames[0], 240),
                )
    # All frames are drawn on one scale, so the first says it for all.
    top = overlays[0].value.limits[1] if overlays[0].value.limits else 0.0
    st.caption(
        f"Full colour: {top:.1%} of all attention, in every frame. Above each frame: its share of"
        " all attention."
    )
    left, right = st.columns(2)
    with left:
        st.markdown("**Over time: which frame each word looks at**")
        plot(figure.panels[-1], "over_time", titled=False, height=320)
    with right:
        st.markdown("**Picture or text, layer by layer**")
        plot(by_layer(seen, step, head), "by_layer", titled=False, height=320)
    return figure, code.video(context.question, step, layer, head)
