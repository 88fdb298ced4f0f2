"""Floating-point operations of a decode step, attention apart from everything else.

A multiplication and an addition count as two. Attention's share follows from the number of keys
that were really read, so a policy is credited for what it skips and for nothing else; its own
scoring and sorting are not counted here, they show in the times. Everything else is the same under
every policy and is measured once, by counting the matrix products of one real step. Embedding
look-ups, norms and softmax are left out on both sides, as is usual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from avl.families import Family, describe

# Parts of the names of operators that compute attention, and of convolutions.
_NOT_LINEAR = ("bmm", "baddbmm", "scaled_dot_product", "flash", "efficient", "conv")


def attention_flops(family: Family, keys: float) -> float:
    """Operations of one query row against `keys` keys, summed over layers.

    q k^T, and weights times values.

    2 (multiply, add) x 2 (products) x query heads x head dimension, per key.
    """
    return 4.0 * family.query_heads * head_dim(family) * keys


def head_dim(family: Family) -> int:
    """Width of one attention head."""
    text: Any = family.config.get_text_config(decoder=True)
    return int(getattr(text, "head_dim", None) or text.hidden_size // family.query_heads)


@torch.no_grad()
def linear_flops(model: nn.Module) -> float:
    """Operations of one decode step of one row outside attention.

    Projections, feed-forward layers, output head.
    """
    family = describe(model)
    # One token without a picture: what is left is what every decode step does besides attention.
    ids = torch.tensor([[_plain_token(family)]], device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    return float(
        sum(n for op, n in counts.items() if not any(part in str(op) for part in _NOT_LINEAR))
    )


def _plain_token(family: Family) -> int:
    """An id that does not stand for a picture."""
    return next(
        token
        # Among n + 1 ids at least one is none of the n.
        for token in range(len(family.image_token_ids) + 1)
        if token not in family.image_token_ids
    )
