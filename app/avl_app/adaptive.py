"""A-VL's settings: presets, a control for every one of them, and files that calibration wrote.

Presets that can be named on the command line appear here by themselves. While a preset is chosen it
alone says what the policy is and the controls show it; moving any of them makes the settings one's
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

import avl
from avl.policies import registry
from avl_analysis.evaluation.policy_files import load_evidence, load_policy, named_policy
from avl_app import state
from avl_app.page import problem
from avl_app.sent import sent_files
from avl_app.uploads import from_bytes

PRESETS: Mapping[str, tuple[str, avl.AdaptivePolicy]] = {
    "paper": ("the paper's setting", avl.AdaptivePolicy()),
    "prefill": ("the paper's, with its prefill filter", avl.AdaptivePolicy(prefill=0.5)),
    "vision": ("images only, text untouched", avl.AdaptivePolicy(text=None)),
    "no_core": ("no core: held keys are always read", avl.AdaptivePolicy(core=None)),
    "strong": (
        "strong: a quarter held, a tenth read",
        avl.AdaptivePolicy(secondary=0.25, core=0.1, text=0.5),
    ),
    "identity": (
        "everything kept: changes nothing",
        avl.AdaptivePolicy(secondary=1.0, core=1.0, text=None),
    ),
}
"""Settings to start from; the sliders show what they mean."""
CUSTOM, FILE = "custom", "file"
OWN = {CUSTOM: "own settings", FILE: "a policy file"}
"""Where settings come from that are no preset."""
_OPENED = "settings_opened"
"""Session key of whether A-VL's settings are shown from the start."""
_MOVED = "setting_moved"
"""Session key that says that a control was moved since the last run."""
_TAKEN = "preset_taken"
"""Session key of the preset that the controls were last set to."""

COLD: Mapping[str, tuple[int | str | None, str]] = {
    "dropped": (None, "are dropped: the paper"),
    "8": (8, "are kept in 8 bits"),
    "4": (4, "are kept in 4 bits"),
    "2": (2, "are kept in 2 bits"),
    "16": (16, "are kept as they are"),
    "host": ("host", "are kept in host memory"),
}
"""What may become of image keys that are not secondary, in the address, as a setting, in words."""
PLAIN = {
    "secondary": "secondary",
    "refresh": "refresh_every",
    "prefill_layer": "prefill_layer",
    "sparse_refresh": "sparse_refresh",
}
"""Choice in the address -> A-VL's setting."""
SWITCHED = {"core": "core", "text": "text", "share": "budget", "drift": "drift"}
"""The same for settings that None switches off; whether they are on is the choice use_..."""


def presets() -> list[str]:
    """Names of A-VL's presets: those above, and those one can name on the command line."""
    # Presets of other policies stand among the rivals (policies.py).
    named = [
        name for name in registry.PRESETS if isinstance(named_policy(name), avl.AdaptivePolicy)
    ]
    return [*PRESETS, *(name for name in named if name not in PRESETS)]


def preset(name: str) -> avl.AdaptivePolicy:
    """The settings of a preset."""
    policy = PRESETS[name][1] if name in PRESETS else named_policy(name)
    assert isinstance(policy, avl.AdaptivePolicy)
    return policy


def _label(name: str) -> str:
    if name in PRESETS:
        return PRESETS[name][0]
    if name in registry.PRESETS:
        return registry.PRESETS[name].about
    return OWN.get(name, name)


def choose_preset(*, disabled: bool) -> None:
    """Where A-VL's settings come from."""
    options = [*presets(), *OWN]
    state.within("preset", options, "paper")
    if st.session_state.pop(_MOVED, False):
        # Settled here rather than in the control's callback: while controls are moved quickly, the
        # browser goes on sending the preset it was last told.
        st.session_state[_TAKEN] = CUSTOM
        if state.get("preset") != CUSTOM:
            state.put("preset", CUSTOM)
    # Another preset was chosen, or a link named one; the controls still show the one before.
    elif st.session_state.get(_TAKEN) != state.get("preset"):
        _take_preset()
    st.selectbox(
        "A-VL's settings",
        options,
        key="preset",
        disabled=disabled,
        format_func=_label,
    )


def by_controls() -> avl.Policy | None:
    """A-VL as its controls say; None, with the reason said, if that is no policy."""
    # Decided once: an expander that opens by itself while its sliders are moved is drawn anew in
    # the browser, and the sliders in it start again from where they were.
    opened = st.session_state.setdefault(_OPENED, state.get("preset") == CUSTOM)
    with st.expander("Every setting", icon=":material/tune:", expanded=opened):
        columns = st.columns(4)
        with columns[0]:
            st.markdown("**Held**")
            _share(
                "Image keys held whole (S)",
                "secondary",
                least=0.0,
                help="1 holds all; 0 needs a quantised tier.",
            )
            _choice(
                "Image keys that are not",
                "cold",
                COLD,
                help="Few bits: the quantised tier.",
            )
            st.toggle(
                "Byte budget",
                key="use_share",
                on_change=_own,
                help="S then only sets the core's size.",
            )
            _share("Budget, share of all bytes", "share", disabled=not state.get("use_share"))
        with columns[1]:
            on = st.toggle(
                "**Core**",
                key="use_core",
                on_change=_own,
                help="Off: every step reads all that is held.",
            )
            _share("Image keys read at ordinary steps (C)", "core", disabled=not on)
            st.slider(
                "Refresh every K steps",
                0,
                16,
                key="refresh",
                on_change=_own,
                disabled=not on,
                help="0: no core",
            )
            st.toggle(
                "Refresh reads the core only",
                key="sparse_refresh",
                on_change=_own,
                disabled=not on,
            )
            drift = st.toggle(
                "Refresh on drift instead",
                key="use_drift",
                on_change=_own,
                disabled=not on,
            )
            _share("at a cosine of at most", "drift", disabled=not (on and drift))
        with columns[2]:
            on = st.toggle(
                "**Text rule**", key="use_text", on_change=_own, help="Off: all words are held."
            )
            _share("Text keys held (T)", "text", disabled=not on)
        with columns[3]:
            st.markdown("**Prefill filter**")
            _share("Prefill filter: image tokens passed on (P)", "prefill", help="1 is off.")
            # At 1 all image tokens pass, so the layer has no effect.
            off = state.get("prefill") >= 1
            st.number_input(
                "after this many layers", 1, 256, key="prefill_layer", on_change=_own, disabled=off
            )
        st.caption(
            "Shares are of the original number of keys of their kind; C is at most S, and S at"
            " most P."
        )
        try:
            policy = from_state()
        # The policy checks its settings when it is made. Its message names arguments; the page
        # names its own controls where it knows the contradiction.
        except (TypeError, ValueError) as error:
            problem(f"These settings contradict each other: {_contradiction() or error}.")
            return None
        st.code(repr(policy), language=None, wrap_lines=True)
        return policy


def _contradiction() -> str:
    """What is wrong with the controls, in their own names; empty if it is something else."""
    # S, C and P of the labels above.
    held, read = float(state.get("secondary")), float(state.get("core"))
    passed = float(state.get("prefill"))
    if state.get("use_core") and read > held:
        return (
            f"the image keys read at ordinary steps (C = {read:g}) are more than those held whole"
            f" (S = {held:g}); lower C, raise S, or switch the core off"
        )
    if passed < 1 and held > passed:
        return (
            f"the image keys held whole (S = {held:g}) are more than the prefill filter passes on"
            f" (P = {passed:g}); lower S or raise P"
        )
    if held == 0 and state.get("cold") == "dropped":
        return "no image key is held (S = 0) and those that are not held are dropped"
    return ""


def present() -> avl.Policy:
    """A-VL as last set in A-VL live: from its controls, or from the file sent there.

    Raises:
        ValueError: settings that contradict each other; the message says which.
    """
    # What `sent_files` keeps under this key: the policy and what it was chosen by.
    sent = st.session_state.get("policy_held") if state.get("preset") == FILE else None
    return from_state() if sent is None else sent.value[0]


def from_state() -> avl.AdaptivePolicy:
    """The preset, or the policy the controls stand at.

    Raises:
        ValueError: settings that contradict each other; the message says which.
    """
    # A preset is taken whole: it can hold what no control shows, such as one number per layer.
    if state.get("preset") in presets():
        return preset(state.get("preset"))
    settings = {field: state.get(key) for key, field in PLAIN.items()}
    for key, field in SWITCHED.items():
        # The slider keeps its value while it is off, so None stands for off only here.
        settings[field] = state.get(key) if state.get(f"use_{key}") else None
    settings["prefill"] = state.get("prefill") if state.get("prefill") < 1 else None
    # An address can name a tier there is none of, which counts as dropped.
    settings["cold"] = COLD.get(str(state.get("cold")), (None,))[0]
    return avl.AdaptivePolicy(**settings)


def _take_preset() -> None:
    """The controls show the preset.

    Only when it is chosen, not in every run: what a run writes to a control replaces what the
    visitor has moved it to in the meantime.
    """
    st.session_state[_TAKEN] = state.get("preset")
    if state.get("preset") not in presets():
        return
    policy = preset(state.get("preset"))
    for key, field in PLAIN.items():
        # One number per layer has no place on a slider, which then stays as it was.
        if (value := getattr(policy, field)) is not None and not isinstance(value, tuple):
            state.put(key, value)
    for key, field in SWITCHED.items():
        value = getattr(policy, field)
        state.put(f"use_{key}", value is not None)
        if value is not None and not isinstance(value, tuple):
            state.put(key, value)
    # None holds all image keys, which is 1 on the slider. A float in any case: Streamlit refuses a
    # slider with numbers of two types.
    state.put("secondary", 1.0 if policy.secondary is None else float(state.get("secondary")))
    state.put("prefill", policy.prefill or 1.0)
    # The storage of every preset must be in `COLD`: this raises StopIteration for another one.
    state.put("cold", next(key for key, (value, _) in COLD.items() if value == policy.cold))


def _own() -> None:
    """A control moved: no longer the preset."""
    st.session_state[_MOVED] = True


def _share(
    label: str, key: str, *, least: float = 0.01, disabled: bool = False, help: str | None = None
) -> None:
    st.slider(
        label,
        least,
        1.0,
        step=0.01,
        key=key,
        on_change=_own,
        disabled=disabled,
        help=help,
    )


def _choice(
    label: str, key: str, options: Mapping[str, tuple[object, str]], help: str | None = None
) -> None:
    state.within(key, list(options), next(iter(options)))
    st.selectbox(
        label,
        list(options),
        key=key,
        on_change=_own,
        format_func=lambda o: options[o][1],
        help=help,
    )


def from_file() -> avl.Policy | None:
    """The policy in a file that avl calibrate or save_policy wrote."""
    sent = sent_files(
        "Policy file (.json), as avl calibrate writes it",
        ["json"],
        _read,
        key="policy",
        most_megabytes=1,
    )
    if sent is None:
        # With a file in the uploader there is no policy because reading failed, which is said
        # there.
        if not st.session_state.get("policy"):
            st.info("Send a policy file, or choose a preset.", icon=":material/upload_file:")
        return None
    policy, evidence = sent.value
    st.code(repr(policy), language=None, wrap_lines=True)
    if evidence:
        with st.expander("What it was chosen by"):
            st.json(evidence)
    return policy


def _read(files: Mapping[str, bytes]) -> tuple[avl.Policy, Any]:
    """The policy of a file and what it was chosen by."""
    name, data = next(iter(files.items()))
    # Each of the two readers opens the file by itself.
    return from_bytes(load_policy, data, name), from_bytes(load_evidence, data, name)
