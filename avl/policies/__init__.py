"""Policies: A-VL, the full cache, and baselines at equal bytes. `base` says what a
policy is asked."""

from avl.policies.adaptive import AdaptivePolicy
from avl.policies.base import Policy
from avl.policies.budget import (
    BudgetPolicy,
    FastVPolicy,
    FullPolicy,
    H2OPolicy,
    RandomPolicy,
    SnapKVPolicy,
    StreamingPolicy,
    StridePolicy,
    VLCachePolicy,
)

__all__ = [
    "Policy",
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
]
