"""Relevance the obvious way: eager attention that returns all weights, torch's own gradients of
them, and the whole matrix R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def slow_gradients(
    model: Any, inputs: dict[str, Any], targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """raw, weighted (batch, layers, heads, keys), propagated (batch, keys), log_prob (batch,)."""
    output = model(**inputs, output_attentions=True, use_cache=False)
    logits = output.logits[:, -1].double()
    rows = torch.arange(len(targets))
    log_prob = torch.log_softmax(logits, -1)[rows, targets]
    of_log_prob = torch.autograd.grad(log_prob.sum(), output.attentions, retain_graph=True)
    of_logit = torch.autograd.grad(logits[rows, targets].sum(), output.attentions)
    raw = torch.stack([weights[:, :, -1] for weights in output.attentions], 1)
    weighted = torch.stack(
        [
            (weights * gradient.clamp_min(0))[:, :, -1]
            for weights, gradient in zip(output.attentions, of_log_prob, strict=True)
        ],
        1,
    )
    length = raw.shape[-1]
    propagated = []
    for row in range(len(targets)):
        relevance = torch.eye(length)
        for weights, gradient in zip(output.attentions, of_logit, strict=True):
            heads = (gradient[row] * weights[row]).clamp(min=0)
            relevance = relevance + heads.mean(0) @ relevance
        propagated.append((relevance - torch.eye(length))[-1])
    parts = (raw, weighted, torch.stack(propagated), log_prob.float())
    return tuple(part.detach() for part in parts)  # type: ignore[return-value]
