"""How a prompt ranks its image keys: the paper's way, and others that have been proposed.

    last      the last row's weights, mean over heads: the paper (A-VL, arXiv 2409.14846) question
    weights of all prompt text rows, mean over rows and heads (post-vision scoring of VL-Cache,
    2410.23317) max       the last row's weights, largest over heads sink      mean over heads of
    weights normalised over the image keys, so that a head that rests on the first token
              counts as much as others (attention sinks, StreamingLLM, 2309.17453) position  the
    paper's, over the trend `mu * exp(sigma * i / N)` fitted to the row's N image keys in raster
    order
              (Attention Debiasing, 2508.17807) value     weights times the length of the key's
    value vector (VATP, 2406.12335) diverse   half rank of the paper's score, half rank of how
    unlike the mean image key a key is (after MixKV, which
              mixes importance and diversity)

With `own`, heads are averaged (or maximised) within the group of a key/value head only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from avl.policies.base import Prompt
from avl.tokens import Modality

KINDS = ("last", "question", "max", "sink", "position", "value", "diverse")


def image_scores(prompt: Prompt, kind: str, own: bool) -> Tensor:
    """(batch, 1 or (own) key/value heads, keys); only the order of image keys has a meaning."""
    image = prompt.modality == Modality.IMAGE
    if kind == "question":
        rows = prompt.row_modality == Modality.TEXT
        rows = torch.where(rows.any(1, keepdim=True), rows, prompt.newest(1))
        sums = prompt.row_sums(rows)
        return sums if own else sums.mean(1, keepdim=True)
    weights = prompt.last_row()
    weights = weights.unflatten(
        1, (prompt.keys.shape[1], -1)
    )  # (batch, key/value heads, groups, keys)
    if kind == "sink":
        weights = weights * image[:, :, None]
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    elif kind == "value":
        weights = weights * prompt.values.float().norm(dim=-1)[:, :, None]
    scores = over_heads(weights, kind, own)
    if kind == "position":
        return scores / _trend(scores, image)
    if kind == "diverse":
        return _rank(scores, image) + _rank(_unlike(prompt, image, own), image)
    return scores


def over_heads(weights: Tensor, kind: str, own: bool) -> Tensor:
    """(batch, key/value heads, groups, keys) -> (batch, 1 or key/value heads, keys): mean, or
    largest for `max`.
    """
    weights = weights if own else weights.flatten(1, 2)[:, None]
    return weights.amax(2) if kind == "max" else weights.mean(2)


def _trend(scores: Tensor, image: Tensor) -> Tensor:
    """`mu * exp(sigma * i / N)`, least squares of the logarithm over each row's image keys."""
    image = image.expand_as(scores)
    count = image.sum(-1, keepdim=True).clamp_min(1)
    place = torch.where(image, (image.cumsum(-1) - 1) / count, 0.0)
    logs = torch.where(image, scores.clamp_min(1e-12).log(), 0.0)
    mean_place, mean_log = place.sum(-1, keepdim=True) / count, logs.sum(-1, keepdim=True) / count
    off = torch.where(image, place - mean_place, 0.0)
    sigma = (off * (logs - mean_log)).sum(-1, keepdim=True) / off.square().sum(
        -1, keepdim=True
    ).clamp_min(1e-12)
    return (mean_log + sigma * (place - mean_place)).exp()


def _unlike(prompt: Prompt, image: Tensor, own: bool) -> Tensor:
    """Minus the cosine between a key and the mean unit image key, mean over heads unless `own`."""
    unit = torch.nn.functional.normalize(prompt.keys.float(), dim=-1) * image[..., None]
    mean = torch.nn.functional.normalize(unit.sum(2, keepdim=True), dim=-1)
    unlike = -(unit * mean).sum(-1)
    return unlike if own else unlike.mean(1, keepdim=True)


def _rank(scores: Tensor, image: Tensor) -> Tensor:
    """0 for the lowest image key, then 1, 2, ...; others below."""
    scores = scores.masked_fill(~image, -torch.inf)
    return scores.argsort(dim=-1, stable=True).argsort(dim=-1).float() - (~image).sum(
        -1, keepdim=True
    )
