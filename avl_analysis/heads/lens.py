"""Logit lens: what every layer would write if the model ended there.

The hidden state behind a layer goes through the model's own last norm and output embedding, which
gives a distribution over next tokens (nostalgebraist, 2020, "interpreting GPT: the logit lens";
Belrose et al., 2023, arXiv 2303.08112, section 2, say how far it can mislead: layers that write in
another basis look as if they knew nothing). A model is refused where norm and output embedding,
applied to the last layer, do not give the model's own distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from avl.families import UnsupportedModelError, describe
from avl_analysis.corpus.questions import Sample
from avl_analysis.errors import InputError
from avl_analysis.evaluation.generation import generate
from avl_analysis.models.loading import VLM

_CLOSE = 2e-2
"""Largest difference of log-probabilities between the last layer and the model's own output that
rounding explains, also in bfloat16, among tokens with at least `_LIKELY`.
"""
_LIKELY = 1e-3


@dataclass(frozen=True, eq=False)
class Lens:
    """What the layers would write in the place of every token of an answer.

    Attributes:
        likeliest: (tokens, layers) id of the likeliest token behind each layer.
        share: (tokens, layers) its probability.
        written: (tokens, layers) probability of the token that was written.
    """

    likeliest: NDArray[np.int64]
    share: NDArray[np.float32]
    written: NDArray[np.float32]


def logit_lens(vlm: VLM, sample: Sample, ids: Sequence[int]) -> Lens:
    """The distributions behind every layer, at every token of an answer.

    Args:
        vlm: a loaded model.
        sample: the question.
        ids: the answer, (tokens,), as `Answer.ids`; the model is led along it.

    Raises:
        InputError: an empty answer, pictures or a prompt that cannot be used.
        avl.families.UnsupportedModelError: a model whose layers, last norm or output embedding are
            not found, or do not give its own distribution.
    """
    if not ids:
        raise InputError("the answer has no token, so there is nothing to look at behind layers")
    layers = decoder_layers(vlm.model)
    states: list[list[Tensor]] = []
    logits: list[Tensor] = []
    with _kept(layers, states):
        generate(
            vlm,
            [sample],
            None,
            max_new_tokens=len(ids),
            forced=[list(ids)],
            on_logits=lambda step, row: logits.append(row[0].float()),
        )
    with torch.no_grad():
        head = lens_head(vlm.model, states[0][-1], logits[0])
        shape = (len(ids), len(layers))
        likeliest = np.zeros(shape, np.int64)
        share, written = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for token, (row, chosen) in enumerate(zip(states, ids, strict=False)):
            # (layers, vocabulary), one token at a time, so that memory does not grow with the
            # answer.
            shares = torch.softmax(head(torch.stack(row)).float(), -1)
            best = shares.max(-1)
            likeliest[token] = best.indices.cpu().numpy()
            share[token] = best.values.cpu().numpy()
            written[token] = shares[:, chosen].cpu().numpy()
    return Lens(likeliest, share, written)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers.

    Raises:
        avl.families.UnsupportedModelError: it has no single list of them.
    """
    family = describe(model)
    lists = [
        part
        for part in family.decoder.children()
        if isinstance(part, nn.ModuleList) and len(part) == family.layers
    ]
    if len(lists) != 1:
        raise UnsupportedModelError(
            f"{type(family.decoder).__name__} has no single list of {family.layers} layers, so what"
            " stands behind each of them is not known"
        )
    return lists[0]


@contextmanager
def _kept(layers: nn.ModuleList, states: list[list[Tensor]]) -> Iterator[None]:
    """Keep the last row behind every layer; `states` gets a list per pass."""

    def keep(module: nn.Module, args: Any, output: Any, first: bool) -> None:
        state = output[0] if isinstance(output, tuple) else output
        if first:
            states.append([])
        # The batch is one sample. Only the last row predicts: in the prompt's pass the first token
        # of the answer, in each later pass the next one.
        states[-1].append(state[0, -1])

    handles = [
        layer.register_forward_hook(
            # The first layer begins the list of a new pass. The default binds its value now.
            lambda module, args, output, first=number == 0: keep(module, args, output, first)
        )
        for number, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lens_head(model: nn.Module, last: Tensor, logits: Tensor) -> nn.Module:
    """The last norm and the output embedding, tried on the last layer's state.

    Args:
        model: the model.
        last: (width,) state behind the last layer.
        logits: (vocabulary,) what the model made of it.

    Raises:
        avl.families.UnsupportedModelError: no norm gives the model's own distribution.
    """
    output = model.get_output_embeddings()
    decoder = describe(model).decoder
    norms = [part for name, part in decoder.named_children() if "norm" in name or "ln" in name]
    # Unlikely tokens are left out: rounding moves their log-probabilities most.
    wanted = torch.log_softmax(logits, -1)
    likely = wanted.exp() >= _LIKELY
    # The last norm has no common name, so every candidate, and no norm at all, is tried on a state
    # whose distribution is known.
    for norm in [*norms, nn.Identity()]:
        if output is None:
            break
        head = nn.Sequential(norm, output)
        try:
            found = torch.log_softmax(head(last[None])[0].float(), -1)
        except (RuntimeError, TypeError):  # a norm of another width, or of another kind
            continue
        if found.shape == wanted.shape and (found - wanted)[likely].abs().max() < _CLOSE:
            return head
    raise UnsupportedModelError(
        f"no norm of {type(decoder).__name__} and the output embedding give the distribution of"
        f" {type(model).__name__} from its last layer, so the lens would show something else"
    )
