"""Adaptive attention for large vision-language models that are already loaded.

This package *acts*: it lays out tokens by modality, hooks into the attention and the cache of a
stock `transformers` model, and restores both on the way out. It needs torch and transformers,
nothing else; recording, statistics and pictures live in `avl_analysis`, which knows this package
while this package does not know it.
"""

from avl.accounting import StepUsage, Usage
from avl.families import UnsupportedModelError
from avl.hooks import HookError
from avl.policies import (
    AdaptivePolicy,
    BudgetPolicy,
    CoredPolicy,
    FastVPolicy,
    FullPolicy,
    H2OPolicy,
    Policy,
    RandomPolicy,
    SnapKVPolicy,
    StreamingPolicy,
    StridePolicy,
    VLCachePolicy,
)
from avl.selection import Selection, State
from avl.session import AdaptiveSession, adaptive

__all__ = [
    "adaptive",
    "AdaptiveSession",
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
    "Usage",
    "StepUsage",
    "Selection",
    "State",
    "HookError",
    "UnsupportedModelError",
]
