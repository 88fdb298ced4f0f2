"""Attention rollout: attention followed through all layers, back to the tokens of the input.

Abnar and Zuidema (2020, arXiv 2005.00928, section 3.1): the attention of layer l, mean over heads,
is averaged with the identity for the residual connection, A_l = (W_l + I) / 2, its rows add up to
1, and what position i draws from position j through layers 1 to l is the product A_l ... A_1.

That product is an n x n matrix, and so is every A_l. Only the rows that produce answer tokens are
asked for, though, and a row of a product needs no other rows: r A_l ... A_1 is computed from the
left, one vector and one layer at a time, from the last layer down. The softmax weights of a layer
are computed a block of rows at a time from the queries and keys that its pass left behind, used and
forgotten, so that memory grows with n and not with its square.

Rollout assumes that attention says what is passed on, and that heads and the residual count alike:
a description of where information could come from, not of what the answer depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avl.attention import AttentionCall, Forward, attention_weights
from avl.families import UnsupportedModelError, describe
from avl.hooks import Observer, attached
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.evaluation.generation import generate
from avl_analysis.models.loading import VLM

BLOCK_BYTES = 64 << 20
"""Bytes of the softmax weights that are held at a time."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """What every token of an answer draws from every position, through the layers.

    Attributes:
        values: (tokens, positions) float32, rows that add up to 1. Token t is produced by the row
            before it, so it draws nothing from its own position.
        layer: the last layer that was followed.
    """

    values: NDArray[np.float32]
    layer: int


def rollout(vlm: VLM, sample: Sample, ids: Sequence[int], layer: int | None = None) -> Rollout:
    """Attention rollout of every token of an answer.

    Args:
        vlm: a loaded model.
        sample: the question.
        ids: the answer, (tokens,), as `Answer.ids`; the model is led along it.
        layer: follow the layers up to this one; None for all.

    Raises:
        InputError: no such layer, an empty answer, pictures or a prompt that cannot be used.
        avl.families.UnsupportedModelError: a model that cannot be followed, or whose layers forget
            keys, as in sliding windows shorter than the prompt.
    """
    layers = describe(vlm.model).layers
    last = layers - 1 if layer is None else layer
    if not 0 <= last < layers:
        raise InputError(f"there is no layer {last}: this model has layers 0 to {layers - 1}")
    if not ids:
        raise InputError("the answer has no token, so there is nothing to follow back")
    rows = _Rows(last)
    with attached(vlm.model, rows):
        generate(vlm, [sample], None, max_new_tokens=len(ids), forced=[list(ids)])
    with torch.no_grad():
        values = rows.followed()
    values_array: NDArray[np.float32] = values.cpu().numpy()
    values_array.setflags(write=False)
    return Rollout(values_array, last)


class _Rows(Observer):
    """Keeps what the weights of every layer are made from: a call for the prompt, a row a step."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.prompt: dict[int, AttentionCall] = {}
        self.steps: dict[int, list[Tensor]] = {}

    def begin(self, forward: Forward) -> None:
        if forward.kind == "extend":
            raise UnsupportedModelError("rollout follows one prompt that is read in one pass")

    def observe(self, call: AttentionCall, output: Tensor) -> None:
        if call.layer > self.last:
            return
        forward = call.forward
        seen = forward.start + forward.tokens
        # A product of layers needs the weights on every earlier position; keys that a layer has
        # dropped leave gaps in it.
        if call.key_positions is not None or call.key.shape[2] != seen:
            raise UnsupportedModelError(
                f"layer {call.layer} holds {call.key.shape[2]} of {seen} keys, so what came before"
                " cannot be followed; ask a shorter question, or look at single layers"
            )
        if forward.kind == "prefill":
            # without the values, which the weights do not need
            kept = replace(call, value=call.value.new_empty(0))
            self.prompt[call.layer], self.steps[call.layer] = kept, []
        else:
            # A decode step has one row, so its weights are kept as they are, (keys so far,).
            self.steps[call.layer].append(_normalised(attention_weights(call))[0])

    def followed(self) -> Tensor:
        """(tokens, positions): the rows that produce tokens, times all layers."""
        # The last token of the answer never enters the model, so it has no position here.
        first = self.prompt[self.last]
        prompt, later = first.query.shape[2], len(self.steps[self.last])
        device = first.query.device
        followed = torch.zeros(1 + later, prompt + later, device=device)
        producing = torch.arange(prompt - 1, prompt + later, device=device)
        # Each row begins at the position that produces its token, as one row of the identity.
        followed[torch.arange(1 + later, device=device), producing] = 1.0
        for layer in sorted(self.prompt, reverse=True):
            # r A_l with A_l = (W_l + I) / 2.
            followed = (followed + self._times_weights(followed, layer)) / 2
        return followed

    def _times_weights(self, followed: Tensor, layer: int) -> Tensor:
        """`followed` times the weights of a layer, which are never there as a whole."""
        call, result = self.prompt[layer], torch.zeros_like(followed)
        prompt = call.query.shape[2]
        # Rows per block: float32 weights of all heads on all prompt keys take 4 x heads x prompt
        # bytes a row.
        size = max(1, BLOCK_BYTES // (4 * call.query.shape[1] * prompt))
        for start in range(0, prompt, size):
            rows = slice(start, min(start + size, prompt))
            weights = _normalised(attention_weights(call, rows))
            # Rows of the prompt see no later position, so its block of columns is enough.
            result[:, :prompt] += followed[:, rows] @ weights.to(followed.device)
        # Rows of generated tokens, one each, with keys up to their own position.
        for step, row in enumerate(self.steps[layer]):
            at = prompt + step
            result[:, : at + 1] += followed[:, at, None] * row.to(followed.device)
        return result


def _normalised(weights: Tensor) -> Tensor:
    """(rows, keys): mean over heads of (1, heads, rows, keys), rows that add up to 1.

    Learned sinks take a part of a row that belongs to no token, so its weights add up to less.
    """
    mean = weights[0].mean(0)
    return mean / mean.sum(-1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)
