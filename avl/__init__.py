"""Adaptive attention for large vision-language models that are already loaded.

This package *acts*: it lays out tokens by modality, hooks into the attention and the cache of a
stock `transformers` model, and restores both on the way out. It needs torch and transformers,
nothing else; recording, statistics and pictures live in `avl_analysis`, which knows this package
while this package does not know it. The public names are imported when first used, so that what
needs neither torch nor transformers (plugins.py) can be used without loading them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avl.accounting import StepUsage as StepUsage
    from avl.accounting import Usage as Usage
    from avl.families import UnsupportedModelError as UnsupportedModelError
    from avl.hooks import HookError as HookError
    from avl.policies import AdaptivePolicy as AdaptivePolicy
    from avl.policies import AdaSnapKVPolicy as AdaSnapKVPolicy
    from avl.policies import BudgetPolicy as BudgetPolicy
    from avl.policies import CoredPolicy as CoredPolicy
    from avl.policies import DivPrunePolicy as DivPrunePolicy
    from avl.policies import DownsamplePolicy as DownsamplePolicy
    from avl.policies import FastVPolicy as FastVPolicy
    from avl.policies import FullPolicy as FullPolicy
    from avl.policies import H2OPolicy as H2OPolicy
    from avl.policies import KIVIPolicy as KIVIPolicy
    from avl.policies import MixKVPolicy as MixKVPolicy
    from avl.policies import Policy as Policy
    from avl.policies import PrefixKVPolicy as PrefixKVPolicy
    from avl.policies import QuestPolicy as QuestPolicy
    from avl.policies import RandomPolicy as RandomPolicy
    from avl.policies import SCOPEPolicy as SCOPEPolicy
    from avl.policies import SnapKVPolicy as SnapKVPolicy
    from avl.policies import StreamingPolicy as StreamingPolicy
    from avl.policies import StridePolicy as StridePolicy
    from avl.policies import VLCachePolicy as VLCachePolicy
    from avl.selection import Selection as Selection
    from avl.selection import State as State
    from avl.session import AdaptiveSession as AdaptiveSession
    from avl.session import adaptive as adaptive

_MODULES = {  # module -> public names that live in it
    "session": ("adaptive", "AdaptiveSession"),
    "policies": (
        "Policy",
        "CoredPolicy",
        "AdaptivePolicy",
        "FullPolicy",
        "BudgetPolicy",
        "RandomPolicy",
        "StridePolicy",
        "StreamingPolicy",
        "H2OPolicy",
        "SnapKVPolicy",
        "FastVPolicy",
        "VLCachePolicy",
        "AdaSnapKVPolicy",
        "PrefixKVPolicy",
        "MixKVPolicy",
        "KIVIPolicy",
        "QuestPolicy",
        "SCOPEPolicy",
        "DivPrunePolicy",
        "DownsamplePolicy",
    ),
    "accounting": ("Usage", "StepUsage"),
    "selection": ("Selection", "State"),
    "hooks": ("HookError",),
    "families": ("UnsupportedModelError",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; public are {', '.join(sorted(_HOME))}"
        )
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
