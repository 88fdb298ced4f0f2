"""Every policy there is, by its name on the command line; and presets of some.

A new policy is one file beside this one and one line in `BUILT_IN`. Other distributions add
policies through entry points of the group "avl.policies", each naming a subclass of `Policy` whose
class attribute `name` is not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from avl.plugins import POLICIES, left_out, plugins
from avl.policies.ada_snapkv import AdaSnapKVPolicy
from avl.policies.adaptive import AdaptivePolicy
from avl.policies.base import Policy
from avl.policies.divprune import DivPrunePolicy
from avl.policies.downsample import DownsamplePolicy
from avl.policies.fastv import FastVPolicy
from avl.policies.full import FullPolicy
from avl.policies.h2o import H2OPolicy
from avl.policies.kivi import KIVIPolicy
from avl.policies.mixkv import MixKVPolicy
from avl.policies.prefixkv import PrefixKVPolicy
from avl.policies.quest import QuestPolicy
from avl.policies.random_keys import RandomPolicy
from avl.policies.scope import SCOPEPolicy
from avl.policies.snapkv import SnapKVPolicy
from avl.policies.streaming import StreamingPolicy
from avl.policies.stride import StridePolicy
from avl.policies.vl_cache import VLCachePolicy

BUILT_IN: tuple[type[Policy], ...] = (
    FullPolicy,
    AdaptivePolicy,
    RandomPolicy,
    StridePolicy,
    StreamingPolicy,
    H2OPolicy,
    SnapKVPolicy,
    FastVPolicy,
    VLCachePolicy,
    AdaSnapKVPolicy,
    PrefixKVPolicy,
    MixKVPolicy,
    KIVIPolicy,
    QuestPolicy,
    SCOPEPolicy,
    DivPrunePolicy,
    DownsamplePolicy,
)
"""Policies of this package, in the order in which they are listed."""


@dataclass(frozen=True)
class Preset:
    """Settings of a policy that have a name of their own.

    Attributes:
        name: on the command line.
        label: in figures, tables and the dashboard.
        color_slot: number of the palette's style in figures.
        about: what it does, in a few words.
        make: gives the policy, alone or from a share of the full cache's bytes.
    """

    name: str
    label: str
    color_slot: int
    about: str
    make: Callable[..., Policy]


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "a-vl-cold",
            "A-VL cold",
            8,
            "quantised tier: every image key, in 4 bits",
            AdaptivePolicy.with_cold_tier,
        ),
    )
}
"""Name on the command line -> preset."""


@lru_cache
def policies() -> Mapping[str, type[Policy]]:
    """Name on the command line -> policy, those of other distributions last.

    An entry point that names no policy, or a policy whose name is taken, is left out with a
    `PluginWarning`.
    """
    named = {kind.name: kind for kind in BUILT_IN}
    for entry, kind in plugins(POLICIES).items():
        if problem := _problem(kind, named):
            left_out(POLICIES, entry, problem)
        else:
            named[kind.name] = kind
    return named


def _problem(kind: object, named: Mapping[str, type[Policy]]) -> str:
    """Why a policy of another distribution cannot be used; empty if it can."""
    if not isinstance(kind, type) or not issubclass(kind, Policy):
        return f"it names {kind!r}, which is not a subclass of avl.Policy"
    if not kind.name:
        return f"{kind.__name__} has no name; set its class attribute `name`"
    if kind.name in named or kind.name in PRESETS:
        return f"a policy is called {kind.name!r} already"
    return ""


def label_of(name: str) -> str:
    """What a policy or preset is called in figures, tables and the dashboard.

    Args:
        name: on the command line; another name is its own label.
    """
    if name in PRESETS:
        return PRESETS[name].label
    kind = policies().get(name)
    return name if kind is None else kind.label or kind.__name__


def label_of_class(class_name: str) -> str:
    """What policies of a class are called in figures; the class's name if it is none of ours."""
    return next(
        (kind.label or class_name for kind in policies().values() if kind.__name__ == class_name),
        class_name,
    )


def color_slots() -> dict[str, int]:
    """Label -> number of the palette's style, of all policies and presets."""
    presets = {preset.label: preset.color_slot for preset in PRESETS.values()}
    slots = {kind.label or kind.__name__: kind.color_slot for kind in policies().values()}
    return {**slots, **presets}
