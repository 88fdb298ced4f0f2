"""Choosing policies: A-VL with a slider for every parameter, presets and calibrated files, and the baselines."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

import avl
from app import state
from app.data import from_bytes
from app.page import problem
from avl_analysis.errors import InputError
from avl_analysis.policy_files import POLICIES, load_policy, with_budget

FULL = "full cache"
ADAPTIVE = "A-VL"
BASELINES = {
    "random": "random",
    "stride": "uniform stride",
    "streaming": "StreamingLLM",
    "h2o": "H2O",
    "snapkv": "SnapKV",
    "fastv": "FastV",
    "vl-cache": "VL-Cache",
}
"""Policies by their names on the command line, as one calls them."""

PRESETS: Mapping[str, tuple[str, avl.AdaptivePolicy]] = {
    "paper": ("the paper's setting", avl.AdaptivePolicy()),
    "prefill": ("the paper's, with its prefill filter", avl.AdaptivePolicy(prefill=0.5)),
    "vision": ("images only, text untouched", avl.AdaptivePolicy(text=None)),
    "no_core": ("no core: held keys are always read", avl.AdaptivePolicy(core=None)),
    "strong": ("strong: a quarter held, a tenth read", avl.AdaptivePolicy(secondary=0.25, core=0.1, text=0.5)),
    "identity": ("everything kept: changes nothing", avl.AdaptivePolicy(secondary=1.0, core=1.0, text=None)),
}
"""Settings to start from; the sliders show what they mean."""
_CUSTOM, _FILE = "custom", "file"
MOST_RIVALS = 3
"""Baselines beside the full cache and A-VL; more columns cannot be read."""


def choose() -> dict[str, avl.Policy]:
    """Draw the controls; the chosen policies by name, the full cache first.

    Raises:
        InputError: settings that contradict each other; the message says which.
    """
    chosen: dict[str, avl.Policy] = {FULL: avl.FullPolicy()}
    first, second, third = st.columns([1, 5, 2], vertical_alignment="bottom")
    on = first.toggle("A-VL on", key="avl_on", help="Adaptive attention on the loaded model, for your answers only.")
    state.put("rivals", [name for name in state.get("rivals") or [] if name in BASELINES])
    rivals = second.pills(
        "Baselines beside it, all at one budget",
        list(BASELINES),
        selection_mode="multi",
        key="rivals",
        format_func=BASELINES.__getitem__,
    )
    third.slider("Their budget, share of all keys", 0.02, 1.0, step=0.01, key="budget", disabled=not rivals)
    if on:
        with st.expander("A-VL's settings", icon=":material/tune:"):
            adaptive = _adaptive()
        if adaptive is not None:
            chosen[ADAPTIVE] = adaptive
    if len(rivals) > MOST_RIVALS:
        problem(f"{len(rivals)} baselines are chosen; the first {MOST_RIVALS} are shown, take some away to see others.")
    for name in rivals[:MOST_RIVALS]:
        chosen[BASELINES[name]] = with_budget(POLICIES[name], float(state.get("budget")))
    return chosen


def _adaptive() -> avl.Policy | None:
    """A-VL as the sliders, a preset or a file say; None, with the reason said, if that is no policy."""
    options = [*PRESETS, _CUSTOM, _FILE]
    state.within("preset", options, "paper")
    st.selectbox(
        "Preset",
        options,
        key="preset",
        on_change=_take_preset,
        format_func=lambda name: PRESETS[name][0] if name in PRESETS else {"custom": "own", "file": "a file"}[name],
    )
    if state.get("preset") == _FILE:
        return _from_file()
    columns = st.columns(4)
    with columns[0]:
        st.slider("Held of the image (S)", 0.01, 1.0, key="secondary", on_change=_own)
        st.slider("Filter: image tokens passed on (P)", 0.01, 1.0, key="prefill", on_change=_own, help="1 is off.")
    with columns[1]:
        st.toggle("Core", key="use_core", on_change=_own, help="Off: every step reads all that is held.")
        st.slider(
            "Read at ordinary steps (C)", 0.01, 1.0, key="core", on_change=_own, disabled=not state.get("use_core")
        )
    with columns[2]:
        st.slider("Refresh every K steps", 0, 16, key="refresh", on_change=_own, help="0: no core.")
    with columns[3]:
        st.toggle("Text rule", key="use_text", on_change=_own, help="Off: all words are held.")
        st.slider("Text held (T)", 0.01, 1.0, key="text", on_change=_own, disabled=not state.get("use_text"))
    try:
        return avl.AdaptivePolicy(
            secondary=state.get("secondary"),
            core=state.get("core") if state.get("use_core") else None,
            refresh_every=state.get("refresh"),
            text=state.get("text") if state.get("use_text") else None,
            prefill=state.get("prefill") if state.get("prefill") < 1 else None,
        )
    except ValueError as error:
        problem(f"These settings contradict each other: {error}.")
        return None


def _take_preset() -> None:
    """The sliders show the preset."""
    if state.get("preset") not in PRESETS:
        return
    policy = PRESETS[state.get("preset")][1]
    shares = {"secondary": policy.secondary, "core": policy.core, "text": policy.text, "prefill": policy.prefill}
    for name, value in shares.items():
        if value is not None or name == "prefill":
            state.put(name, value or 1.0)
    state.put("use_core", policy.core is not None)
    state.put("use_text", policy.text is not None)
    state.put("refresh", policy.refresh_every)


def _own() -> None:
    """A slider moved: no longer the preset."""
    state.put("preset", _CUSTOM)


def _from_file() -> avl.Policy | None:
    """The policy in a file that avl calibrate or save_policy wrote."""
    sent = st.file_uploader(
        "Policy file (.json), as avl calibrate writes it", ["json"], key="policy", max_upload_size=1
    )
    if sent is None:
        st.info("Send a policy file, or choose a preset.", icon=":material/upload_file:")
        return None
    try:
        policy = from_bytes(load_policy, sent.getvalue(), "policy.json")
    except InputError as error:
        problem(error)
        return None
    st.code(repr(policy), language=None)
    return policy
