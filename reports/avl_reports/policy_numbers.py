"""The numbers of A-VL that figures are held against: the paper's evaluation setting (Zhang et al.,
AAAI 2025).
"""

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
FAMILIES = (
    "VL-Cache",
    "A-VL",
    "random",
    "stride",
    "StreamingLLM",
    "H2O",
    "SnapKV",
    "FastV",
    "A-VL cold",
    "A-VL (paper)",
)
"""Names of policies in figures; their order is that of the palette's slots. The full cache is a
line across.
"""


def midway(chance: float) -> float:
    """Half-way from chance to identity: the least overlap called agreement here."""
    return (1 + chance) / 2
