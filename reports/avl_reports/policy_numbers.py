"""The numbers of A-VL that figures are held against.

The paper's evaluation setting (Zhang et al., AAAI 2025).
"""

from __future__ import annotations

from avl.policies.registry import color_slots

SECONDARY = 0.5
"""S: share of image tokens held after prefill."""
CORE = 0.3
"""C: share of image tokens attended at an ordinary decode step."""
REFRESH = 3
"""K: decode steps between two choices of the core."""
TEXT = 0.7
"""T: share of text tokens kept."""
PREFILL = 0.5
"""P: share of image tokens kept by the optional prefill filter."""
TARGET = 0.95
"""Share of the attention a cut must keep to be called harmless here; the paper states no such
number.
"""
LOSS = -0.02
"""Change of accuracy that counts as none: two percentage points."""
PAPER = "A-VL (paper)"
"""Name of the paper's own setting in frontier files and figures, beside A-VL at some budget."""
_PAPER_SLOT = 9


def color_slot(label: str) -> int:
    """Number of the palette's style for a policy in figures; unknown ones get the first.

    Args:
        label: what the policy is called in figures.
    """
    # `PAPER` is the name of a setting, not of a policy, so the registry gives it no style.
    return {**color_slots(), PAPER: _PAPER_SLOT}.get(label, 0)


def midway(chance: float) -> float:
    """Half-way from chance to identity: the least overlap called agreement here."""
    return (1 + chance) / 2
