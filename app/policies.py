"""Choosing policies: A-VL with a control for every setting, presets and calibrated files, and any others beside it.

Which policies there are is read from `avl_analysis.policy_files`, so one that is added there appears here too.
"""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

import avl
from app import state
from app.data import from_bytes
from app.page import problem
from avl_analysis.errors import InputError
from avl_analysis.policy_files import POLICIES, load_policy, named_policy

FULL = "full cache"
ADAPTIVE = "A-VL"
_NAMES = {
    "a-vl": ADAPTIVE,
    "random": "random",
    "stride": "uniform stride",
    "streaming": "StreamingLLM",
    "h2o": "H2O",
    "snapkv": "SnapKV",
    "fastv": "FastV",
    "vl-cache": "VL-Cache",
}
"""What policies are called in print; those without an entry go by their names on the command line."""

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
_OWN = {_CUSTOM: "own settings", _FILE: "a policy file"}
MOST_RIVALS = 3
"""Policies beside the full cache and A-VL; more columns cannot be read."""
_EXAMPLE = "a-vl:0.3; h2o:0.5,recent=0.2"


def rivals(*, adaptive: bool = False) -> dict[str, str]:
    """Names of the policies that can stand beside A-VL (or of A-VL too), with what they are called."""
    return {name: _NAMES.get(name, name) for name in POLICIES if name != "full" and (adaptive or name != "a-vl")}


def at_budget(name: str, budget: float) -> avl.Policy:
    """The policy of this name at a share of the full cache's bytes; one without a budget at its own settings."""
    try:
        return named_policy(f"{name}:{budget:g}")
    except InputError:
        return named_policy(name)


def choose() -> dict[str, avl.Policy]:
    """Draw the controls; the chosen policies by name, the full cache first."""
    chosen: dict[str, avl.Policy] = {FULL: avl.FullPolicy()}
    first, second = st.columns([1, 3], vertical_alignment="bottom")
    on = first.toggle("A-VL on", key="avl_on", help="Adaptive attention on the loaded model, for your answers only.")
    with second:
        _preset(disabled=not on)
    if on:
        adaptive = _from_file() if state.get("preset") == _FILE else _by_controls()
        if adaptive is not None:
            chosen[ADAPTIVE] = adaptive
    with st.expander("Other policies beside it", icon=":material/compare_arrows:", expanded=bool(_asked_for())):
        others = _others()
    for name, policy in others.items():
        chosen[name] = policy
    return chosen


def _asked_for() -> list[str]:
    return [*(state.get("rivals") or []), *str(state.get("more")).split()]


# -- others -----------------------------------------------------------------------------------------------------


def _others() -> dict[str, avl.Policy]:
    """Baselines at one budget, and policies written out as on the command line."""
    names = rivals()
    state.put("rivals", [name for name in state.get("rivals") or [] if name in names])
    picked = st.pills(
        "Baselines, all at one budget",
        list(names),
        selection_mode="multi",
        key="rivals",
        format_func=names.__getitem__,
        wrap=True,
    )
    left, right = st.columns(2)
    left.slider("Their budget, share of all keys", 0.02, 1.0, step=0.01, key="budget", disabled=not picked)
    right.text_input(
        "More, as on the command line",
        key="more",
        placeholder=_EXAMPLE,
        max_chars=300,
        help=f"Names with settings, semicolons between them: {_EXAMPLE}. Names: {', '.join(POLICIES)}.",
    )
    found = {names[name]: at_budget(name, float(state.get("budget"))) for name in picked}
    try:
        found |= written(str(state.get("more")))
    except InputError as error:
        problem(error)
    if len(found) > MOST_RIVALS:
        problem(f"{len(found)} policies are chosen; the first {MOST_RIVALS} are shown, take some away to see others.")
    return dict(list(found.items())[:MOST_RIVALS])


def written(text: str) -> dict[str, avl.Policy]:
    """The policies in a text like "a-vl:0.3; h2o", by that text.

    Raises:
        InputError: unknown names or settings, or a file, which has to be sent.
    """
    parts = [part.strip() for part in text.split(";") if part.strip()]
    if files := [part for part in parts if part.endswith(".json")]:
        raise InputError(f"{files[0]} is a file on the server; choose the preset “{_OWN[_FILE]}” and send it")
    return {part: named_policy(part) for part in parts}


# -- A-VL -------------------------------------------------------------------------------------------------------


def _preset(*, disabled: bool) -> None:
    """Where A-VL's settings come from."""
    options = [*PRESETS, *_OWN]
    state.within("preset", options, "paper")
    _take_preset()
    st.selectbox(
        "A-VL's settings",
        options,
        key="preset",
        on_change=_take_preset,
        disabled=disabled,
        format_func=lambda name: PRESETS[name][0] if name in PRESETS else _OWN[name],
    )


def _by_controls() -> avl.Policy | None:
    """A-VL as its controls say; None, with the reason said, if that is no policy."""
    with st.expander("Every setting", icon=":material/tune:", expanded=state.get("preset") == _CUSTOM):
        columns = st.columns(4)
        with columns[0]:
            _share("Image keys held (S)", "secondary", help="1 holds all.")
            st.toggle("Byte budget instead", key="use_share", on_change=_own, help="S then only sets the core's size.")
            _share("Budget, share of all keys", "share", disabled=not state.get("use_share"))
        with columns[1]:
            st.toggle("Core", key="use_core", on_change=_own, help="Off: every step reads all that is held.")
            _share("Image keys read at ordinary steps (C)", "core", disabled=not state.get("use_core"))
            st.slider("Refresh every K steps", 0, 16, key="refresh", on_change=_own, help="0: no core.")
        with columns[2]:
            st.toggle("Text rule", key="use_text", on_change=_own, help="Off: all words are held.")
            _share("Text keys held (T)", "text", disabled=not state.get("use_text"))
        with columns[3]:
            _share("Prefill filter: image tokens passed on (P)", "prefill", help="1 is off.")
            off = state.get("prefill") >= 1
            st.number_input("after this many layers", 1, 256, key="prefill_layer", on_change=_own, disabled=off)
        st.caption("Shares are of the original number of keys of their kind; S >= C, and P >= S.")
    try:
        policy = from_state()
    except ValueError as error:
        problem(f"These settings contradict each other: {error}.")
        return None
    st.caption(f"`{policy!r}`")
    return policy


def present() -> avl.Policy:
    """A-VL as last set in A-VL live: from its controls, or from the file sent there.

    Raises:
        ValueError: settings that contradict each other; the message says which.
    """
    sent: avl.Policy | None = st.session_state.get("sent_policy") if state.get("preset") == _FILE else None
    return sent or from_state()


def from_state() -> avl.AdaptivePolicy:
    """The policy the controls stand at.

    Raises:
        ValueError: settings that contradict each other; the message says which.
    """
    return avl.AdaptivePolicy(
        secondary=state.get("secondary"),
        core=state.get("core") if state.get("use_core") else None,
        refresh_every=state.get("refresh"),
        text=state.get("text") if state.get("use_text") else None,
        prefill=state.get("prefill") if state.get("prefill") < 1 else None,
        prefill_layer=state.get("prefill_layer"),
        budget=state.get("share") if state.get("use_share") else None,
    )


def _share(label: str, key: str, *, disabled: bool = False, help: str | None = None) -> None:
    st.slider(label, 0.01, 1.0, step=0.01, key=key, on_change=_own, disabled=disabled, help=help)


def _take_preset() -> None:
    """The controls show the preset."""
    if state.get("preset") not in PRESETS:
        return
    policy = PRESETS[state.get("preset")][1]
    shares = {"secondary": policy.secondary, "core": policy.core, "text": policy.text, "share": policy.budget}
    for name, value in shares.items():
        if value is not None:
            state.put(name, value)
    state.put("prefill", policy.prefill or 1.0)
    state.put("use_core", policy.core is not None)
    state.put("use_text", policy.text is not None)
    state.put("use_share", policy.budget is not None)
    state.put("refresh", policy.refresh_every)
    state.put("prefill_layer", policy.prefill_layer)


def _own() -> None:
    """A control moved: no longer the preset."""
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
    st.session_state["sent_policy"] = policy
    return policy
