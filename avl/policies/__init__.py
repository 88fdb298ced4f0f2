"""Policies: A-VL, the full cache, and baselines at equal bytes, each in a file of its own.

base.py says what a policy is asked; registry.py lists all of them.
"""

from avl.policies.ada_snapkv import AdaSnapKVPolicy
from avl.policies.adaptive import AdaptivePolicy
from avl.policies.base import CoredPolicy, Policy
from avl.policies.budget import BudgetPolicy
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

__all__ = [
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
]
