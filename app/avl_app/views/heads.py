"""Heads: a map of all heads coloured by any statistic, and any two of them side by side."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import streamlit as st

from avl_analysis.answer_plots import plot_head_overlays, plot_mass, plot_token
from avl_analysis.figures import looks
from avl_analysis.figures.spec import Axis
from avl_analysis.heads import taxonomy
from avl_analysis.heads.ablation import visual_head_score
from avl_analysis.heads.taxonomy import Measure
from avl_analysis.live import Observation
from avl_analysis.plots import plot_heads
from avl_analysis.recordings.recording import Recording
from avl_analysis.statistics import catalogue
from avl_app import code, state
from avl_app.page import (
    Context,
    cells,
    clicked,
    keep,
    picture_height,
    plain,
    plot,
    prose,
    shown_token,
    strip,
)
from avl_app.views import knockout, silence
from avl_app.views.ask import observe, pick_token

_FIRST = "modality_mass/image"
_ALONE = "no other head"
KIND_TEXTS = {
    "visual": (
        f"at least {taxonomy.VISUAL:.0%} on the picture; where it is known, most on what the first"
        " word is about"
    ),
    "scanning": f"at least {taxonomy.VISUAL:.0%} on the picture; most on something else",
    "sink": f"at least {taxonomy.SINK:.0%} on the first token",
    "local": f"text heads with {taxonomy.LOCAL:.0%} of it on the 16 newest words",
    "text": f"at least {taxonomy.TEXT:.0%} on text",
    "mixed": "everything else",
}
"""What the kinds of heads are; where it is not known what words are about, no head is scanning."""


def show(context: Context) -> None:
    """Draw the view."""
    seen = observe(context)
    recording = seen.recording
    step = pick_token(seen)
    if step is None:
        return
    chosen, single = _measure(recording)
    # (layers, heads); rows are places in `seen.layers`, which need not be the layers' numbers
    values = taxonomy.matrix(recording, chosen, step if single else None)
    _, kinds = _known(recording)
    layer, head = _present(seen, values)
    left, right = st.columns([3, 2])
    with left:
        st.markdown(f"**{plain(chosen.title)}**, every head; click one")
        place = (seen.layers.index(layer), head)
        # Said beside the map, since on a narrow window the head itself is shown further down.
        st.caption(
            f"Chosen: layer {layer}, head {head}, {values[place]:.3g} {plain(chosen.unit)},"
            f" {kinds[place]}. Where it looked is shown below."
        )
        value = Axis(chosen.title, chosen.unit)
        heat = looks.head_map(values, seen.layers, value)
        cells(heat, "head_map", place, lambda: _take(seen))
        _by_keys(seen, layer, head)
    with right:
        _ranking(seen, values, kinds, (layer, head))
    single_step = step if single else None
    keep(
        plot_heads(recording, chosen.key, single_step).figure,
        code.head_map(context.question, chosen.key, single_step),
        "heads",
    )
    _compare(context, seen, recording, step, (layer, head), values, kinds, chosen)
    _all_heads(context, seen, step, layer)
    silence.show(context, seen, layer, head)
    knockout.show(context, recording)


def _all_heads(context: Context, seen: Observation, step: int, layer: int) -> None:
    """Every head of the layer over the picture, on one scale, when asked for."""
    if not seen.drawable or not st.toggle(
        f"All heads of layer {layer} over the picture", key="all_heads"
    ):
        return
    pixels = context.question.picture.pixels
    figure = plot_head_overlays(seen, pixels, step, layer).figure
    columns = st.columns(min(6, len(figure.panels)))
    for head, panel in enumerate(figure.panels):
        with columns[head % len(columns)]:
            st.markdown(f"**Head {head}**")
            height = picture_height(pixels, 170)
            plot(panel, f"grid{layer}_{head}", titled=False, height=height)
    st.caption(plain(figure.caption.what))
    keep(figure, code.head_overlays(context.question, step, layer), "head_overlays")


def _measure(recording: Recording) -> tuple[Measure, bool]:
    """The chosen statistic, and whether it is that of the chosen token alone."""
    keys, _ = _known(recording)
    first, second = st.columns([3, 2], vertical_alignment="bottom")
    # A statistic named in a link may have no values in this recording.
    state.within("measure", list(keys), _FIRST if _FIRST in keys else next(iter(keys)))
    first.selectbox("Statistic", list(keys), key="measure", format_func=lambda key: keys[key].title)
    chosen = keys[state.get("measure")]
    if about := _about(chosen):
        st.caption(about)
    single = False
    # A statistic kept once for the whole answer has no value for a single token.
    if taxonomy.has_steps(recording, chosen):
        single = second.toggle("of the chosen token alone", key="single_token")
    return chosen, single


def _about(chosen: Measure) -> str:
    """What a statistic is, from where it is computed; empty for what is not a statistic."""
    # A key is "name" or "name/label"; the prompt's version of a statistic shares its entry.
    name = chosen.key.partition("/")[0].removesuffix("_prefill")
    entry = next((one for one in _statistics() if one["name"] == name), None)
    return "" if entry is None else f"{plain(entry['meaning'])} · {prose(entry['formula'])}"


@lru_cache(maxsize=1)
def _statistics() -> list[dict[str, str]]:
    """What every statistic is; looking for those of other packages takes a while."""
    return catalogue()


def _known(recording: Recording) -> tuple[dict[str, Measure], np.ndarray]:
    """The measures this recording has values of, and the kinds of its heads.

    Found once per visitor.
    """
    held = st.session_state.get("heads_of")
    # By identity: comparing two recordings would compare all their arrays.
    if held is None or held[0] is not recording:
        known = [
            m
            for m in taxonomy.measures(recording)
            if np.isfinite(taxonomy.matrix(recording, m)).any()
        ]
        kinds = taxonomy.kinds(recording, visual_head_score(recording))
        held = st.session_state["heads_of"] = (recording, ({m.key: m for m in known}, kinds))
    found: tuple[dict[str, Measure], np.ndarray] = held[1]
    return found


def _present(seen: Observation, values: taxonomy.Matrix) -> tuple[int, int]:
    """The chosen head; the one with the largest value until one is chosen.

    What is chosen here is chosen in Ask as well, so looking at this view alone chooses nothing.
    """
    # As text, since both can be "all" or empty, or beyond this model's layers and heads.
    layer, head = str(state.get("layer")), str(state.get("head"))
    if layer in map(str, seen.layers) and head in map(str, range(seen.heads)):
        return int(layer), int(head)
    # `rank` gives the number of the layer, not its row in `values`.
    layer_index, head_index, _ = taxonomy.rank(values, seen.layers)[0]
    return layer_index, head_index


def _take(seen: Observation) -> None:
    """The clicked cell becomes the chosen head."""
    if (cell := clicked("head_map")) is not None:
        state.put("layer", str(seen.layers[cell[0]]))
        state.put("head", str(cell[1]))


def _by_keys(seen: Observation, layer: int, head: int) -> None:
    """The chosen head as two fields, for visitors without a pointer: the map takes no focus."""
    left, right = st.columns(2)
    for place, key, value, options in (
        (left, "layer", layer, seen.layers),
        (right, "head", head, range(seen.heads)),
    ):
        field = f"{key}_field"
        # Follows a click on the map or in the table. The field has a key of its own because its
        # value is a number, while the shared choice is text and can be "all".
        if st.session_state.get(field) != value:
            st.session_state[field] = value
        place.selectbox(key.capitalize(), list(options), key=field, on_change=_take_fields)


def _take_fields() -> None:
    for key in ("layer", "head"):
        state.put(key, str(st.session_state[f"{key}_field"]))


def _ranking(
    seen: Observation, values: taxonomy.Matrix, kinds: np.ndarray, chosen: tuple[int, int]
) -> None:
    """Heads from the largest value down, filtered by kind; choosing a row chooses the head.

    Args:
        values, kinds: (layers, heads).
        chosen: layer and head of the row that is ticked.
    """
    present = [kind for kind in taxonomy.KINDS if (kinds == kind).any()]
    st.markdown("**Ranking**; choose a row, or filter by kind")
    wanted = st.pills(
        "Kinds of heads",
        present,
        selection_mode="multi",
        key="kinds",
        label_visibility="collapsed",
        format_func=lambda kind: f"{kind} {int((kinds == kind).sum())}",
        help="; ".join(f"{kind}: {text}" for kind, text in KIND_TEXTS.items()),
    )
    ranked = [
        # `kinds` has a row for each watched layer, `rank` the layers' numbers
        (layer, head, value, str(kinds[seen.layers.index(layer), head]))
        for layer, head, value in taxonomy.rank(values, seen.layers)
    ]
    ranked = [row for row in ranked if not wanted or row[3] in wanted]
    columns = ("layer", "head", "value", "kind")
    ticked = [row for row, (layer, head, *_) in enumerate(ranked) if (layer, head) == chosen]
    # A table remembers its tick by the row's number. With another order of rows or another head it
    # is another table, which starts with its tick at the chosen head.
    key = f"ranking_{hash((tuple(ranked), chosen))}"
    st.dataframe(
        {name: [row[i] for row in ranked] for i, name in enumerate(columns)},
        key=key,
        hide_index=True,
        height=280,
        selection_mode="single-row",
        selection_default={"selection": {"rows": ticked}},
        on_select=lambda: _take_row(ranked, key),
        column_config={"value": st.column_config.NumberColumn(format="%.4f")},
        alt="heads ranked by the chosen statistic",
    )


def _take_row(ranked: list[tuple[int, int, float, str]], key: str) -> None:
    if rows := st.session_state[key]["selection"]["rows"]:
        state.put("layer", str(ranked[rows[0]][0]))
        state.put("head", str(ranked[rows[0]][1]))


def _compare(
    context: Context,
    seen: Observation,
    recording: Recording,
    step: int,
    first: tuple[int, int],
    values: taxonomy.Matrix,
    kinds: np.ndarray,
    chosen: Measure,
) -> None:
    """The chosen head, and another one beside it if one is chosen."""
    others = [
        f"{layer}.{head}"
        for layer in seen.layers
        for head in range(seen.heads)
        if (layer, head) != first
    ]
    state.within("other", ["", *others], "")
    second = st.selectbox(
        "Compare with",
        ["", *others],
        key="other",
        format_func=lambda o: "layer {}, head {}".format(*o.split(".")) if o else _ALONE,
    )
    shown = [first]
    if second:
        layer, _, number = str(second).partition(".")
        shown.append((int(layer), int(number)))
    # The largest of them is the scale of both pictures, so that their colours are comparable.
    tops = [_most(seen, step, row, head) for row, head in shown]
    for column, (row, head) in zip(
        st.columns(2) if len(shown) == 2 else [st.container()], shown, strict=True
    ):
        with column:
            at = seen.layers.index(row)
            st.markdown(
                f"#### Layer {row}, head {head}: a {kinds[at, head]} head\n"
                f"{KIND_TEXTS[str(kinds[at, head])]} · {plain(chosen.title)} {values[at, head]:.3f}"
            )
            _head(
                context,
                seen,
                recording,
                step,
                row,
                head,
                narrow=len(shown) == 2,
                top=max(tops),
                ages=_age_limits(recording, shown),
            )


def _most(seen: Observation, step: int, layer: int, head: int) -> float:
    """Attention on the patch of the first image that gets most."""
    return float(np.nanmax(seen.look(step, layer, head)[seen.image == 0], initial=1e-6))


def _age_limits(recording: Recording, shown: list[tuple[int, int]]) -> tuple[float, float] | None:
    """The scale of text ages that the heads shown share; None where nothing was measured."""
    if "text_age_profile" not in recording.names:
        return None
    profile = recording["text_age_profile"].mean("sample")
    top = max(float(profile.sel(layer=row, head=head).max()) for row, head in shown)
    # a little room above the highest point of any head shown
    return (0.0, 1.05 * top) if top > 0 else None


def _head(
    context: Context,
    seen: Observation,
    recording: Recording,
    step: int,
    layer: int,
    head: int,
    *,
    narrow: bool,
    top: float,
    ages: tuple[float, float] | None,
) -> None:
    """One head: where it looked for the token, over the answer, and how far back in the text.

    Args:
        narrow: whether another head stands beside it.
        top: attention on a patch drawn at full strength, the same for both heads.
        ages: scale of the attention by age, the same for both heads.
    """
    name = f"{layer}_{head}"
    look = seen.look(step, layer, head)
    # Beside another head: two narrow columns, and a row of its own for the third plot.
    places = list(st.columns(2)) + list(st.columns(1)) if narrow else list(st.columns(3))
    word = shown_token(seen.answer.words[step])
    with places[0]:
        st.markdown(f"**Picture, for “{word}”**")
        if seen.drawable:
            plot(
                looks.token_overlay(context.question.picture.pixels, seen.on_image(look), top=top),
                f"o{name}",
                height=picture_height(context.question.picture.pixels, 210 if narrow else 280),
            )
            st.caption(
                f"Full colour: {top:.1%} of all attention"
                + ", in both heads." * narrow
                + " The first frame of the video." * bool(context.question.picture.frames)
            )
    with places[1]:
        st.markdown("**Over the answer**")
        mass = plot_mass(seen, layer, head).figure.panels[0]
        plot(mass, f"e{name}", titled=False, height=280)
    with places[2]:
        st.markdown("**How far back in the text**")
        _ages(recording, layer, head, name, ages)
    framed = plot_token(seen, context.question.picture.pixels, step, layer, head).figure
    keep(framed, code.token(context.question, step, layer, head), f"head{name}")
    # position of the chosen token in prompt and answer together
    place = seen.prompt + step
    strip(looks.token_strip(seen.tokens, look, seen.modality, seen.prompt, place))


def _ages(
    recording: Recording, layer: int, head: int, name: str, limits: tuple[float, float] | None
) -> None:
    """The head's mean attention on text by age; `limits` is the scale."""
    if "text_age_profile" not in recording.names:
        st.info("The recording holds no profile of text ages.", icon=":material/info:")
        return
    profile = recording["text_age_profile"].sel(layer=layer, head=head).mean("sample")
    # Ages that no phase has a value for are cut off; a phase without values stays NaN there.
    kept = profile.isel(age=np.flatnonzero(np.isfinite(profile).any("age_phase").values))
    if not kept.sizes["age"]:
        st.info("No text token was old enough to measure.", icon=":material/info:")
        return
    weights = {str(phase): kept.sel(age_phase=phase).values for phase in kept["age_phase"].values}
    panel = looks.age_profile(kept["age"].values, weights)
    panel = replace(panel, y=replace(panel.y, limits=limits))
    plot(panel, f"a{name}", titled=False, height=280)
