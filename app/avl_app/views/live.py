"""A-VL live: policies on and off side by side, and what they do to every patch."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from itertools import groupby

import numpy as np
import streamlit as st

import avl
from avl.tokens import Modality
from avl_analysis.figures import looks
from avl_analysis.figures.spec import Axis, Lines
from avl_analysis.figures.strip import visible
from avl_analysis.live import Answer, Disagreement, Observation
from avl_analysis.policy_plots import color_slot, plot_divergence
from avl_app import code, policies, state
from avl_app.data import Timings
from avl_app.page import Context, Progress, doing, keep, plain, plot, shown_token, streaming, strip
from avl_app.views.ask import observe

_TICK = 0.6  # seconds a step is shown while playing


def show(context: Context) -> None:
    """Draw the view."""
    chosen = policies.choose()
    answers = _answers(context, chosen)
    full = answers[policies.FULL]
    off = _disagreements(context, chosen, full)
    _table(answers, off)
    figure = plot_divergence(off, context.question.model).figure if off else None
    keep(figure, code.policies(context.question, chosen), "live")
    _times(context, chosen)
    if off:
        # Policies only: the full cache drops no patch, so there is nothing to draw of it.
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
        # An answer that is known is shown at once, without a button to cancel it.
        known: Answer | None = context.bench.known("answer", context.question, policy)
        if known is None:
            with streaming(doing(context), places[name]) as (on_token, waiting):
                known = context.bench.answer(context.question, policy, on_token, waiting)
        answers[name] = known
        # `policies.choose` puts the full cache first, so its words are there for every policy.
        reference = answers[policies.FULL].words
        places[name].markdown(marked(known.words, reference) + ("" if known.finished else " …"))
    return answers


def _disagreements(
    context: Context, chosen: dict[str, avl.Policy], full: Answer
) -> dict[str, Disagreement]:
    """How every policy's predictions differ from the full cache's, with what is being computed."""
    off: dict[str, Disagreement] = {}
    for name, policy in chosen.items():
        if name == policies.FULL:
            continue
        known = context.bench.known("disagreement", context.question, policy)
        if known is None:
            with streaming(f"Comparing the predictions of {name} along the answer") as (_, waiting):
                known = context.bench.disagreement(context.question, policy, full, waiting)
        off[name] = known
    return off


_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
"""Japanese, Chinese and Korean signs, which are written without blanks between words."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
"""A word: letters up to the next blank, or one sign of a script without blanks."""


def marked(words: tuple[str, ...], reference: tuple[str, ...]) -> str:
    """An answer as Markdown, with what differs from the full cache's.

    Words of its own set off by colour, words it leaves out struck through where they would stand.

    Args:
        words, reference: text of each token of the answer, and of the full cache's.
    """
    own, full = "".join(words), "".join(reference)
    # Whole words rather than tokens: a word may be split in two ways and still be the same.
    ours, theirs = _WORD.findall(own), _WORD.findall(full)
    parts: list[str] = []
    # One part of Markdown for each run of words of one kind.
    for kind, group in groupby(_differences(theirs, ours), lambda step: step[0]):
        text = plain(_spaced([word for _, word in group], own if kind != "out" else full))
        parts.append(
            {"same": text, "own": f":orange-background[**{text}**]", "out": f"~~{text}~~"}[kind]
        )
    if not ours:
        parts.insert(0, "*nothing*")
    return " ".join(parts) or "␣"


def _spaced(words: list[str], source: str) -> str:
    """Words that follow each other in a text, with the blanks they have there."""
    # A source with blanks is joined by blanks, one in a script without them by nothing.
    return (" " if re.search(r"\s", source.strip()) or len(words) == 1 else "").join(words)


def _differences(theirs: list[str], ours: list[str]) -> list[tuple[str, str]]:
    """What leads from one list of words to another.

    As many words are kept as possible and, among those ways, the earliest: ("same" | "own" | "out",
    word).

    The longest common subsequence, by dynamic programming over the ends of both lists.
    """
    # common[i, j]: most words that theirs[i:] and ours[j:] have in common; 0 at either end.
    common = np.zeros((len(theirs) + 1, len(ours) + 1), dtype=int)
    for i in reversed(range(len(theirs))):
        for j in reversed(range(len(ours))):
            same = theirs[i] == ours[j]
            common[i, j] = (
                common[i + 1, j + 1] + 1 if same else max(common[i + 1, j], common[i, j + 1])
            )
    steps: list[tuple[str, str]] = []
    i = j = 0
    while i < len(theirs) or j < len(ours):
        if i < len(theirs) and j < len(ours) and theirs[i] == ours[j]:
            steps.append(("same", ours[j]))
            i, j = i + 1, j + 1
        # Where both ways keep as many words, what is left out comes before what is put in.
        elif j == len(ours) or (i < len(theirs) and common[i + 1, j] >= common[i, j + 1]):
            steps.append(("out", theirs[i]))
            i += 1
        else:
            steps.append(("own", ours[j]))
            j += 1
    return steps


def _table(answers: dict[str, Answer], off: dict[str, Disagreement]) -> None:
    """What each policy cost and how far it is from the full cache."""
    rows = []
    for name, said in answers.items():
        usage, differs = said.usage, off.get(name)
        assert usage is not None
        # Decode steps only: step 0 is the pass over the prompt.
        keys = [np.mean(step.attended) for step in usage.steps if step.step > 0]
        rows.append(
            {
                "policy": name,
                "KV bytes held": usage.filled,
                "of full cache": usage.filled_share,
                "keys read per step": float(np.mean(keys)) if keys else math.nan,
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
            "tokens": st.column_config.NumberColumn(width=64),
            "first difference at": st.column_config.TextColumn("differs at", width=78),
            "same prediction": st.column_config.NumberColumn(
                "agreement", format="percent", width=88
            ),
            "KL, nats": st.column_config.NumberColumn(format="%.3f", width=76),
        },
        alt="cost and fidelity of every policy",
    )
    about = (
        "Agreement and KL(full || policy): fed the full cache's answer, mean over tokens. In the"
        " answers above, a policy's own words are set off and words it leaves out are struck"
        " through."
    )
    if any(name.startswith("random") for name in answers):
        about += (
            " “random” is one draw of patches for one question; where many patches show the same,"
            " a draw can do as well as any choice. Compare on many questions in Benchmark."
        )
    st.caption(about)
    for name, said in answers.items():
        if said.usage is not None and said.usage.host:
            st.caption(f"{plain(name)} also holds {said.usage.host:,} bytes in host memory.")


_ROUNDS = 5
"""How often each policy is timed."""


def _times(context: Context, chosen: dict[str, avl.Policy]) -> None:
    """Times on demand: all policies in turn, again and again, so that they can be compared."""
    key = (context.question, tuple(chosen.items()))
    # Measured times stay until the question or a policy changes; they are of this visit alone.
    measured: tuple[object, Timings] | None = st.session_state.get("timings")
    if measured is None or measured[0] != key:
        if not st.button(
            "Measure times",
            icon=":material/timer:",
            help=f"Answers {_ROUNDS} times under each policy, in turn. Any other click stops it.",
        ):
            return
        with Progress("Answering once to warm up", "answers") as bar:
            times = context.bench.timings(
                context.question,
                list(chosen.values()),
                rounds=_ROUNDS,
                progress=bar.done,
                waiting=bar.waiting,
            )
        measured = st.session_state["timings"] = (key, times)
    times = measured[1]
    rows: dict[str, list[str]] = {"policy": list(chosen)}
    for name, seconds in (("TTFT, ms", times.ttft), ("TPOT, ms", times.tpot)):
        # (policies, rounds) in seconds; shown in milliseconds
        rows[name] = [_median(1000 * row) for row in seconds]
    st.dataframe(rows, hide_index=True, alt="times of every policy")
    st.caption(
        f"Median of {_ROUNDS} rounds [fastest, slowest]; each round answers once under every"
        " policy. Time to the first token, and per token after it. On a small model a policy's own"
        " work outweighs what it saves."
    )


def _median(values: np.ndarray) -> str:
    """Median with range; a dash where nothing was measured."""
    if not np.isfinite(values).any():
        return "-"
    return f"{np.median(values):.1f} [{values.min():.1f}, {values.max():.1f}]"


def _first_difference(said: Answer, full: Answer) -> str:
    """Index of the first token that differs from the full cache's, a dash if none does."""
    # Where one answer is the beginning of the other, they differ where the shorter one ends.
    for index, (one, other) in enumerate(zip(said.ids, full.ids, strict=False)):
        if one != other:
            return str(index)
    return "-" if len(said.ids) == len(full.ids) else str(min(len(said.ids), len(full.ids)))


def _curves(answers: dict[str, Answer], off: dict[str, Disagreement]) -> None:
    """Per token: divergence, and keys read."""
    left, right = st.columns(2)
    with left:
        st.markdown("**Divergence from the full cache, token by token**")
        plot(plot_divergence(off).figure.panels[0], "kl", titled=False, height=280)
    with right:
        st.markdown("**Keys read, step by step**")
        read = {name: _keys_read(said) for name, said in answers.items()}
        keys = looks.evolution("keys read", read, Axis("keys read", "mean over layers"))
        plot(_coloured(keys), "keys", titled=False, height=280)


def _coloured(lines: Lines) -> Lines:
    """Every policy in the colour it has in all views and reports."""
    return replace(
        lines,
        lines=tuple(replace(line, slot=color_slot(line.name)) for line in lines.lines),
    )


def _fidelity(full: Answer, off: dict[str, Disagreement]) -> None:
    """The full cache's answer once per policy, shaded by divergence.

    Where predictions differ, what it would write.
    """
    st.markdown(
        "**The full cache's answer, token by token**; shade: how far the policy's prediction is"
        f" from it (full from {looks.UNLIKE:g} nat), frame: it would write another token, which"
        " follows the arrow"
    )
    for name, differs in off.items():
        # token of the full cache's answer -> what the policy would write in its place
        other = {int(at): visible(differs.preferred[at]) for at in np.flatnonzero(~differs.agree)}
        strip(looks.fidelity_strip(name, full.words, differs.kl, other, color_slot(name)))


def _keys_read(said: Answer) -> np.ndarray:
    """Keys each pass read, mean over layers; the prompt's last row first."""
    assert said.usage is not None
    return np.array([float(np.mean(step.attended)) for step in said.usage.steps])


def _patches(context: Context, seen: Observation, answers: dict[str, Answer]) -> None:
    """Core, secondary and minor patches on the picture, scrubbed or played over decode steps."""
    if not seen.drawable:
        st.info(
            "This model does not say which patch of the picture a token stands for.",
            icon=":material/info:",
        )
        return
    st.markdown("**What happens to every patch**: choose a layer, move the step, or let it play")
    first, second, fourth, third = st.columns([2, 2, 2, 1], vertical_alignment="bottom")
    fourth.slider("Opacity of the patches", 0.0, 1.0, step=0.05, key="opacity")
    names = list(answers)
    # A link, or the run before, may name a policy that is not chosen now.
    if st.session_state.get("drawn_policy") not in names:
        st.session_state["drawn_policy"] = names[0]
    first.segmented_control("Policy", names, key="drawn_policy", required=True, format_func=plain)
    said = answers[st.session_state["drawn_policy"]]
    layers = [str(layer) for layer in said.layers]
    state.within("live_layer", layers, layers[len(layers) // 2])
    second.select_slider("Layer", layers, key="live_layer")
    playing = third.toggle("Play", key="playing")
    # Only the fragment runs at each tick; the rest of the page stays as it is.
    st.fragment(_player, run_every=_TICK if playing else None)(
        context, seen, said, int(state.get("live_layer")), playing
    )


def _player(context: Context, seen: Observation, said: Answer, layer: int, playing: bool) -> None:
    """The step slider and the picture at that step; moves on by itself while playing."""
    assert said.states is not None
    # (steps, positions) of one layer; step 0 is after the prompt
    states = said.states[said.layers.index(layer)]
    last = len(states) - 1
    step = min(int(state.get("step")), last)
    # Other widgets cause runs as well; one soon after a move must not move again.
    if playing and time.monotonic() - st.session_state.get("moved", 0.0) > _TICK / 2:
        step = (step + 1) % (last + 1)
        st.session_state["moved"] = time.monotonic()
    if last == 0:
        st.caption(
            "The answer has a single token, so there is nothing but the choice after the prompt."
        )
        step = 0
    else:
        # Before the slider is drawn, which cannot be moved by the script afterwards.
        state.put("step", step)
        st.slider("Decode step", 0, last, key="step", help="0 is the choice made after the prompt.")
    codes = states[step].astype(np.float64)
    # PADDING: the position did not exist yet, and nothing is drawn for it.
    codes[codes < 0] = np.nan
    # The policy's answer and the watched one may differ in length, so both are cut to the shorter.
    # The prompt is the same in both, and with it the places of the first image's tokens.
    image = codes[: len(seen.image)][seen.image[: len(codes)] == 0]
    counts = {int(code): int((image == code).sum()) for code in avl.State if code >= 0}
    left, right = st.columns([1, 1])
    with left:
        plot(
            looks.states_overlay(context.question.picture.pixels, seen.on_image(codes)),
            "states",
            opacity=float(state.get("opacity")),
            height=420,
        )
        if context.question.picture.frames:
            st.caption("The first frame of the video; the numbers are of all frames.")
    with right:
        word = shown_token(said.words[step]) if step < len(said.words) else None
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
        # without positions that did not exist yet; above 0 is held (SECONDARY, CORE)
        known = text[text >= 0]
        st.markdown(
            f"Of the text so far, {int((known > 0).sum())} of {known.size} tokens are held."
        )
        st.markdown("The answer ends here." if word is None else f"The model now writes “{word}”.")


def _read_and_held(said: Answer, step: int, layer: int) -> tuple[float, float]:
    """Keys one layer read in a pass, and holds after it."""
    assert said.usage is not None
    # `attended` and `held` are (layers, rows); the one question is the only row.
    at, usage = said.usage.layers.index(layer), said.usage.steps[step]
    return float(np.mean(usage.attended[at])), float(np.mean(usage.held[at]))
