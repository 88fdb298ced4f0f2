"""Policies: A-VL, the full cache, and baselines at equal bytes, each in a file of its own.

base.py says what a policy is asked; registry.py lists all of them.
"""

from avl.policies.ada_snapkv import AdaSnapKVPolicy as AdaSnapKVPolicy
from avl.policies.adaptive import AdaptivePolicy as AdaptivePolicy
from avl.policies.base import CoredPolicy as CoredPolicy
from avl.policies.base import Policy as Policy
from avl.policies.budget import BudgetPolicy as BudgetPolicy
from avl.policies.divprune import DivPrunePolicy as DivPrunePolicy
from avl.policies.downsample import DownsamplePolicy as DownsamplePolicy
from avl.policies.fastv import FastVPolicy as FastVPolicy
from avl.policies.full import FullPolicy as FullPolicy
from avl.policies.h2o import H2OPolicy as H2OPolicy
from avl.policies.kivi import KIVIPolicy as KIVIPolicy
from avl.policies.mixkv import MixKVPolicy as MixKVPolicy
from avl.policies.prefixkv import PrefixKVPolicy as PrefixKVPolicy
from avl.policies.quest import QuestPolicy as QuestPolicy
from avl.policies.random_keys import RandomPolicy as RandomPolicy
from avl.policies.scope import SCOPEPolicy as SCOPEPolicy
from avl.policies.snapkv import SnapKVPolicy as SnapKVPolicy
from avl.policies.streaming import StreamingPolicy as StreamingPolicy
from avl.policies.stride import StridePolicy as StridePolicy
from avl.policies.vl_cache import VLCachePolicy as VLCachePolicy
