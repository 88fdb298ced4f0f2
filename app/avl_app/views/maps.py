"""The relevance maps of Ask: which map of a token lies over the picture, and what it says."""

from __future__ import annotations

from dataclasses import dataclass

import streamlit as st

from avl_analysis.figures import Box, Figure, Overlay
from avl_analysis.live import Observation
from avl_analysis.relevance import METHODS
from avl_analysis.relevance.maps import Relevance
from avl_app import code, state
from avl_app.page import Context, keep, picture_height, plain, plot

SHORT = {
    "raw": "raw attention",
    "value": "value-weighted",
    "relative": "relative",
    "gradient": "gradient-weighted",
    "chefer": "Chefer relevance",
}
"""Name of a map -> what the choice calls it."""
_HELP = """\
**Raw attention**: the weights as the model computed them. **Value-weighted**: times the length of
the value vector that is read, which can be nearly zero where the weight is large. **Relative**:
divided by the weights under a generic instruction about the same picture. **Gradient-weighted**:
times the part of their gradient that raises the word's probability. **Chefer relevance**: such
products multiplied through all layers. None says that the model would answer otherwise without a
patch."""


def choose() -> str:
    """The choice of a map; returns its name."""
    # `Shown.overlay` finds a map's panel by its place in `SHORT`; the figure has them in the order
    # of `METHODS`.
    assert tuple(SHORT) == tuple(METHODS)
    st.segmented_control(
        "Map over the picture",
        list(SHORT),
        key="map",
        format_func=SHORT.__getitem__,
        required=True,
        help=_HELP,
    )
    return str(state.get("map"))


@dataclass(frozen=True, eq=False)
class Shown:
    """The maps of one token on the page.

    Attributes:
        found: the maps.
        figure: all of them, to take away; behind the picture they stand in their order.
        code: Python that gives the figure.
    """

    found: Relevance
    figure: Figure
    code: str

    def overlay(self, method: str) -> Overlay:
        """One map over the picture."""
        # panel 0 is the picture alone
        panel = self.figure.panels[1 + list(SHORT).index(method)]
        assert isinstance(panel, Overlay)
        return panel

    def caption(self, method: str) -> str:
        """What full colour means on a map."""
        patches = self.overlay(method).patches
        assert patches is not None
        top = patches.largest
        if method == "relative":
            usual = plain(self.found.instruction)
            return f"Full colour: {top:.1f} times its attention under “{usual}”"
        if method == "value":
            return f"Full colour: {top:.2g}, attention times the length of the value vector."
        if method == "gradient":
            return f"Full colour: {top:.2g}, attention times what it adds to the log-probability."
        return (
            f"Full colour: a relevance of {top:.2g}, through all layers and heads; layer and head"
            " above do not change this map."
        )


def of_token(
    context: Context,
    seen: Observation,
    step: int,
    layer: int | None,
    head: int | None,
    framed: tuple[Box, ...],
    whole: bool = False,
) -> Shown:
    """The maps of a token, computed where they are not known yet.

    Args:
        seen: the answer, watched.
        step: number of the chosen token.
        layer, head: the chosen ones; None for the mean.
        framed: frames over the picture.
        whole: whether the view of the whole picture is drawn without its parts.
    """
    from avl_analysis.map_plots import plot_relevance

    with st.spinner("Following the word back through the model …"):
        found = context.bench.relevance(context.question, seen.answer, step)
    pixels = context.question.picture.pixels
    drawn = plot_relevance(found, pixels, layer, head, boxes=framed, whole=whole)
    python = code.relevance(context.question, step, layer, head, framed, whole)
    return Shown(found, drawn.figure, python)


def words_of_patches(context: Context, seen: Observation) -> None:
    """The word each patch says after a number of layers, when asked for.

    Args:
        seen: the answer, watched.
    """
    if not seen.drawable or not st.toggle("What each patch says", key="patch_words"):
        return
    from avl_analysis.map_plots import plot_patch_words

    with st.spinner("Reading the patches …"):
        found = context.bench.patch_words(context.question)
    depths = range(found.depths)
    state.within("depth", depths, 0)
    st.select_slider("Layers passed", depths, key="depth")
    depth = int(state.get("depth"))
    pixels = context.question.picture.pixels
    drawn = plot_patch_words(found, pixels, depth).figure
    # panel 0 is the picture alone, which the sidebar shows already
    plot(drawn.panels[1], "patch_words_plot", titled=False, height=picture_height(pixels, 700, 700))
    st.caption(
        "The most probable word of each patch's state, as if the layer were the last one (logit"
        " lens); the stronger the colour, the more probable. That a state says a word does not mean"
        " that the answer uses it."
    )
    keep(drawn, code.patch_words(context.question, depth), "patch_words")
