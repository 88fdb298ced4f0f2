"""Choosing policies: A-VL (adaptive.py) and any others beside it.

Which policies there are, and what they are called, is read from `avl.policies.registry`, so one
that is added there appears here too.
"""

from __future__ import annotations

import streamlit as st

import avl
from avl.policies.registry import PRESETS, label_of, policies
from avl_analysis.errors import InputError
from avl_analysis.evaluation.policy_files import named_policy
from avl_app import adaptive, state
from avl_app.page import problem

FULL = avl.FullPolicy.label
ADAPTIVE = avl.AdaptivePolicy.label

MOST_RIVALS = 3
"""Policies beside the full cache and A-VL; more columns cannot be read."""
_EXAMPLE = "a-vl:0.3; snapkv:0.5,window=8"


def rivals(*, ours: bool = False) -> dict[str, str]:
    """Names of the policies that can stand beside A-VL, with what they are called.

    A-VL itself is among them where settings are compared.
    """
    full, adaptive_name = avl.FullPolicy.name, avl.AdaptivePolicy.name
    left_out = {full} if ours else {full, adaptive_name}
    return {name: label_of(name) for name in (*policies(), *PRESETS) if name not in left_out}


def at_budget(name: str, budget: float) -> avl.Policy:
    """The policy of this name at a share of the full cache's bytes.

    One without a budget at its own settings.
    """
    # A policy without a budget refuses one.
    try:
        return named_policy(f"{name}:{budget:g}")
    except InputError:
        return named_policy(name)


def choose() -> dict[str, avl.Policy]:
    """Draw the controls; the chosen policies by name, the full cache first."""
    chosen: dict[str, avl.Policy] = {FULL: avl.FullPolicy()}
    first, second = st.columns([1, 3], vertical_alignment="bottom")
    on = first.toggle(
        "A-VL on",
        key="avl_on",
        help="Adaptive attention on the loaded model, for your answers only.",
    )
    with second:
        adaptive.choose_preset(disabled=not on)
    if on:
        ours = (
            adaptive.from_file() if state.get("preset") == adaptive.FILE else adaptive.by_controls()
        )
        if ours is not None:
            chosen[ADAPTIVE] = ours
    with st.expander(
        "Other policies beside it", icon=":material/compare_arrows:", expanded=bool(_asked_for())
    ):
        others = _others()
    for name, policy in others.items():
        chosen[name] = policy
    return chosen


def _asked_for() -> list[str]:
    # Only whether there is any matters here, so the written ones are not taken apart properly.
    return [*(state.get("rivals") or []), *str(state.get("more")).split()]


# -- others ----------------------------------------------------------------------------------------


def _others() -> dict[str, avl.Policy]:
    """Baselines at one budget, and policies written out as on the command line."""
    names = rivals()
    state.among("rivals", names)
    picked = st.pills(
        "Baselines, all at one budget",
        list(names),
        selection_mode="multi",
        key="rivals",
        format_func=names.__getitem__,
        wrap=True,
    )
    left, right = st.columns(2)
    left.slider(
        "Their budget, share of all keys", 0.02, 1.0, step=0.01, key="budget", disabled=not picked
    )
    right.text_input(
        "More, as on the command line",
        key="more",
        placeholder=_EXAMPLE,
        max_chars=300,
        help=(
            f"Names with settings, semicolons between them: {_EXAMPLE}. Names:"
            f" {', '.join(('full', *names))}."
        ),
    )
    found = {names[name]: at_budget(name, float(state.get("budget"))) for name in picked}
    try:
        for name, policy in written(str(state.get("more"))).items():
            # A policy picked above by this name must not be replaced by the written one.
            found[f"{name} (as written)" if name in found else name] = policy
    except InputError as error:
        problem(error)
    if len(found) > MOST_RIVALS:
        problem(
            f"{len(found)} policies are chosen; the first {MOST_RIVALS} are shown, take some away"
            " to see others."
        )
    return dict(list(found.items())[:MOST_RIVALS])


def written(text: str) -> dict[str, avl.Policy]:
    """The policies in a text like "a-vl:0.3; h2o", by that text.

    Raises:
        InputError: unknown names or settings, or a file, which has to be sent.
    """
    parts = [part.strip() for part in text.split(";") if part.strip()]
    # Checked first: `named_policy` would open the path on the server, for any visitor who typed it.
    if files := [part for part in parts if part.endswith(".json")]:
        raise InputError(
            f"{files[0]} is a file on the server; choose the preset “{adaptive.OWN[adaptive.FILE]}”"
            " and send it"
        )
    try:
        return {part: named_policy(part) for part in parts}
    except InputError as error:  # a file would have to lie on the server
        raise InputError(str(error).removesuffix(", or name a .json file")) from error
