"""Attention weights of one pass together with their gradients, a block of rows at a time.

Eager attention with `output_attentions` holds the weights of all layers at once, twice with their
gradients: 2 x layers x heads x n x n numbers. Here the model's own kernel runs, and the weights are
computed anew in the backward pass, which goes from the last layer to the first: each block of
query rows gives its weights, their gradient, and its part of the gradients of query, key and value,
and is forgotten. What is held beside the usual activations of a backward pass is one block of
weights, `BLOCK` numbers at most, and one row of n relevances per row of the batch.

Relevance propagation (Chefer et al., 2103.15679, rules 5 and 6) multiplies
R = (I + Ā_L) ... (I + Ā_1), Ā the mean over heads of the positive part of gradient times weight. Of
R only the row of the last position is wanted, and that row is a product from the left, so it needs
the layers in the order in which the backward pass meets them: r <- r + r Ā_l.

This module knows tensors and hooks; prompts, answers and images are the business of `maps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from avl.attention import (
    Attend,
    AttentionCall,
    Forward,
    attention_logits,
    attention_weights,
    sinks_of,
    softmax_weights,
)
from avl.families import UnsupportedModelError
from avl.hooks import Intervention, Observer, attached
from avl.tokens import TokenLayout
from avl_analysis.errors import InputError

BLOCK = 1 << 22
"""Most weights that are computed at once: 16 MB, and a few times that while their gradients are."""


@dataclass(frozen=True, eq=False)
class AttentionGradients:
    """What one pass says about the token that its last row predicts; everything on the CPU.

    Attributes:
        layers: decoder layers that called attention, ascending.
        raw: (batch, layers, query heads, keys) float32 weights of the last row.
        weighted: the same weights times the positive part of the gradient of the token's
            log-probability with respect to them.
        value_norm: (batch, layers, query heads, keys) float32, Euclidean length of the value vector
            that each query head reads at each key.
        propagated: (batch, keys) float32, the last row of R - I for the token's logit.
        log_prob: (batch,) log-probability of the token.
        layout: what every position is.
    """

    layers: tuple[int, ...]
    raw: Tensor
    weighted: Tensor
    value_norm: Tensor
    propagated: Tensor
    log_prob: Tensor
    layout: TokenLayout


def attention_gradients(
    model: nn.Module, inputs: Mapping[str, Any], targets: Tensor
) -> AttentionGradients:
    """Weights of the last row, gradient-weighted and propagated, for the token it should predict.

    One forward pass and two backward passes, without gradients of the model's own weights.

    Args:
        model: a loaded vision-language model without a policy, in eval mode.
        inputs: arguments of the model: `input_ids` (batch, length) without padding, pixels, ...
        targets: (batch,) ids of the tokens whose scores are differentiated.

    Raises:
        InputError: padded rows.
        avl.families.UnsupportedModelError: a model that cannot be followed, or whose attention
            depends on its input by more than query, key and value.
        avl.hooks.HookError: a policy is on the model.
    """
    _check_padding(inputs)
    watch = _Differentiated()
    with torch.enable_grad(), _frozen(model), attached(model, watch):
        # Without a cache, so that the keys of a call are those of this pass and in the autograd
        # graph.
        output = model(**{**inputs, "use_cache": False})
        # In double precision: of a word that is nearly certain, 1 - p is all there is to the
        # gradient, and float32 rounds it away. For the same reason the score is divided by 1 - p,
        # or half precision would lose the gradient on the way down.
        logits = output.logits[:, -1].double()
        chosen = targets.to(logits.device)[:, None]
        scores = torch.log_softmax(logits, -1).gather(1, chosen)[:, 0]
        # (batch,) 1 - p. It is multiplied back into `weighted` below; being positive, it does not
        # change which gradients the clamp in `see` removes.
        doubt = (1 - scores.detach().exp()).clamp_min(1e-12)
        watch.start("weighted")
        # The gradient of the anchor is thrown away: asking for it makes the backward pass visit
        # every layer, where `see` collects the results. The rows of a batch do not depend on each
        # other, so one sum serves them all.
        torch.autograd.grad((scores / doubt).sum(), watch.anchor, retain_graph=True)
        watch.start("propagated")
        torch.autograd.grad(logits.gather(1, chosen).sum(), watch.anchor)
    assert watch.layout is not None
    layers = tuple(sorted(watch.raw))
    row = watch.row
    if row is None:
        raise UnsupportedModelError("no gradient reached the attention layers of this model")
    return AttentionGradients(
        layers,
        # (batch, layers, query heads, keys)
        torch.stack([watch.raw[layer] for layer in layers], 1),
        torch.stack([watch.weighted[layer] for layer in layers], 1)
        * doubt.float().cpu()[:, None, None, None],
        torch.stack([watch.value_norm[layer] for layer in layers], 1),
        (row - watch.identity).cpu(),
        scores.detach().float().cpu(),
        watch.layout,
    )


def last_row_weights(
    model: nn.Module, inputs: Mapping[str, Any]
) -> tuple[tuple[int, ...], Tensor, TokenLayout]:
    """Weights of the last row of a prompt, without gradients.

    Args:
        model: a loaded vision-language model.
        inputs: as for `attention_gradients`.

    Returns:
        The layers, (batch, layers, query heads, keys) float32 on the CPU, and the layout.

    Raises:
        InputError, avl.families.UnsupportedModelError, avl.hooks.HookError: as there.
    """
    _check_padding(inputs)
    watch = _LastRow()
    with torch.no_grad(), attached(model, watch):
        model(**{**inputs, "use_cache": False})
    assert watch.layout is not None
    layers = tuple(sorted(watch.raw))
    return layers, torch.stack([watch.raw[layer] for layer in layers], 1), watch.layout


def _check_padding(inputs: Mapping[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and not bool(mask.bool().all()):
        raise InputError(
            "some rows of the batch are padded; relevance takes rows of equal length only, because"
            " a model called outside generate() does not shift the positions of padded rows: pass"
            " them one by one"
        )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, so nothing is held for theirs."""
    # Those that asked for no gradient before are left out, so that the way out does not switch
    # theirs on.
    parameters = [one for one in model.parameters() if one.requires_grad]
    for one in parameters:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in parameters:
            one.requires_grad_(True)


class _LastRow(Observer):
    """Keeps the weights of the last row of every layer."""

    def __init__(self) -> None:
        self.raw: dict[int, Tensor] = {}
        self.layout: TokenLayout | None = None

    def begin(self, forward: Forward) -> None:
        self.layout = forward.layout.to("cpu")

    def observe(self, call: AttentionCall, output: Tensor) -> None:
        self.raw[call.layer] = _last_row(call)


def _last_row(call: AttentionCall) -> Tensor:
    """(batch, query heads, keys) float32 on the CPU."""
    last = call.query.shape[2] - 1
    return attention_weights(call, slice(last, last + 1))[:, :, 0].detach().cpu()


def _value_norm(call: AttentionCall) -> Tensor:
    """(batch, query heads, keys) float32 on the CPU: length of the value that a head reads."""
    # Query heads of a group stand next to each other and read the same key/value head.
    group = call.query.shape[1] // call.value.shape[1]
    lengths = call.value.detach().float().norm(dim=-1)
    return lengths.repeat_interleave(group, 1).cpu()


class _Differentiated(Intervention):
    """Puts a function into every attention layer whose backward pass sees weights and gradients.

    Attributes:
        anchor: what gradients are asked of. Every layer's output depends on it by zero, so that the
            backward pass visits every layer though nothing else needs a gradient.
        raw, weighted: (batch, query heads, keys) of the last row, by layer.
        value_norm: (batch, query heads, keys) lengths of the value vectors, by layer.
        row, identity: (batch, keys) running row of relevances, and what it began as.
    """

    def __init__(self) -> None:
        self.anchor = torch.zeros((), requires_grad=True)
        self.raw: dict[int, Tensor] = {}
        self.weighted: dict[int, Tensor] = {}
        self.value_norm: dict[int, Tensor] = {}
        self.row: Tensor | None = None
        self.identity: Tensor = torch.zeros(())
        self.layout: TokenLayout | None = None
        self._doing, self._above = "", 0
        self._before: Tensor | None = None  # `row` as it was above the layer that is being passed

    @property
    def description(self) -> str:
        return "relevance"

    def begin(self, forward: Forward) -> None:
        self.layout = forward.layout.to("cpu")

    def start(self, doing: str) -> None:
        """A backward pass begins: "weighted" or "propagated"."""
        # Above the number of any layer, so that the first layer that is reached passes the check in
        # `enter`.
        self._doing, self._above = doing, 1 << 30
        self.row = None

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        _refuse(call)
        if call.layer in self.raw:
            raise UnsupportedModelError(
                f"layer {call.layer} of {type(call.module).__name__} calls attention more than once"
                " in a pass, so its weights are not one matrix"
            )
        self.raw[call.layer] = _last_row(call)
        self.value_norm[call.layer] = _value_norm(call)
        return _Attention.apply(self.anchor, call.query, call.key, call.value, call, inner, self)

    def see(self, call: AttentionCall, rows: slice, weights: Tensor, gradient: Tensor) -> None:
        """One block of rows; both tensors (batch, query heads, rows, keys) float32."""
        # Weights are never negative, so this is the weight times the positive part of its gradient,
        # and also the positive part of the product, which rule 5 of Chefer et al. asks for.
        positive = (weights * gradient).clamp_min_(0)
        last = call.query.shape[2] - 1
        if self._doing == "weighted":
            # Only the block that ends with the last row holds the row that predicts the token.
            if rows.stop == last + 1:
                self.weighted[call.layer] = positive[:, :, -1].cpu()
            return
        assert self._before is not None
        assert self.row is not None
        # (batch, rows). The relevances from above this layer, and not `row`, which earlier blocks
        # of the same layer have already added to.
        share = self._before[:, rows].to(positive.device)
        self.row += torch.einsum("br,brk->bk", share, positive.mean(1)).to(self.row.device)

    def enter(self, call: AttentionCall) -> None:
        """The backward pass reaches a layer."""
        # Descending numbers are what makes r <- r + r A_l a product in the right order.
        if call.layer >= self._above:
            raise UnsupportedModelError(
                f"the gradient reached layer {call.layer} after layer {self._above}; layers that"
                " do not follow one another have no relevance propagation here"
            )
        self._above = call.layer
        if self._doing == "propagated" and self.row is None:
            batch, _, length, _ = call.query.shape
            self.identity = torch.zeros(batch, length, device=call.query.device)
            # The last row of the identity matrix: before any layer the last position draws from
            # itself only.
            self.identity[:, -1] = 1.0
            self.row = self.identity.clone()
        self._before = None if self.row is None else self.row.clone()


class _Attention(torch.autograd.Function):
    """The model's own attention, and a backward pass that computes the weights anew."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: AttentionCall,
        inner: Attend,
        watch: _Differentiated,
    ) -> Tensor:
        ctx.call, ctx.watch = call, watch
        return inner(call)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call, watch = ctx.call, ctx.watch
        watch.enter(call)
        with torch.enable_grad():
            # Cut off from the graph of the forward pass: the gradients inside this function are
            # asked of these copies and handed on to autograd as the return value.
            query, key = (part.detach().float().requires_grad_() for part in (call.query, call.key))
        value = call.value.detach().float()
        own = replace(call, query=query, key=key, value=value)
        # Float32 sums over the blocks of rows, whatever the model's dtype.
        grads = [torch.zeros_like(part) for part in (query, key, value)]
        batch, heads, length, _ = query.shape
        grad_heads = grad_output.float().transpose(1, 2)  # (batch, heads, rows, value dim)
        step = max(1, BLOCK // (batch * heads * key.shape[2]))
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            with torch.enable_grad():
                logits = attention_logits(own, rows)
            weights = softmax_weights(logits.detach(), sinks_of(call, rows))
            # With grouped queries, consecutive query heads share a key/value head. Folding heads of
            # a group and rows into one axis gives one product per key/value head, and sums the
            # group's parts in the gradient of the values.
            shape = (batch, key.shape[1], -1)
            wanted = grad_heads[:, :, rows].reshape(*shape, grad_heads.shape[-1])
            # d score / d weights, (batch, query heads, rows, keys)
            gradient = (wanted @ value.transpose(-1, -2)).view_as(weights)
            watch.see(call, rows, weights, gradient)
            grads[2] += weights.reshape(*shape, key.shape[2]).transpose(-1, -2) @ wanted
            # The softmax's own derivative; sinks take part in the normalisation only.
            # Masked keys have weight 0, so their logits get no gradient.
            inner = (weights * gradient).sum(-1, keepdim=True)
            of_logits = weights * (gradient - inner)
            for total, part in zip(
                grads[:2], torch.autograd.grad(logits, (query, key), of_logits), strict=True
            ):
                total += part
        given = (call.query, call.key, call.value)
        back = [grad.to(like.dtype) for grad, like in zip(grads, given, strict=True)]
        # One gradient per argument of `forward`: anchor, query, key, value, and none for the rest.
        return torch.zeros((), device="cpu"), *back, None, None, None


def _refuse(call: AttentionCall) -> None:
    """Attention that depends on the input by more than query, key and value."""
    bias = call.position_bias
    if call.options.get("sinks") is not None or (bias is not None and bias.requires_grad):
        raise UnsupportedModelError(
            f"{type(call.module).__name__} computes attention sinks or biases from its input, whose"
            " gradients are not followed, so relevance would be wrong below this layer"
        )
