"""Three signatures of a sink among image tokens, measured on one batch while it is answered.

* Concentration: the token gets many times the attention of the mean image token. Rows are those of
  text (question and answer), weights the mean over heads (the view of "When attention sink
  emerges", Gu et al., ICLR 2025, on image tokens).
* Value drain: its value vector is short beside those of other image tokens, so that attention spent
  on it adds little (Guo et al., "Active-dormant attention heads", 2410.13835).
* Massive activation: its hidden state is huge in the few dimensions in which the model's own first
  token is (Sun et al., 2402.17762; for image tokens "See what you are told", Kang et al., ICLR
  2025, 2503.03321): `max_d |x_d| / sqrt(mean_d x_d^2)` over these dimensions d.

`SinkObserver` sees attention calls and `layer_inputs` the hidden states that enter each layer;
neither changes a bit of what the model does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avl.attention import AttentionCall, Forward, attention_weights
from avl.families import UnsupportedModelError, describe
from avl.hooks import Observer
from avl.tokens import Modality, TokenLayout
from avl_analysis.evaluation.generation import attention_modules

_ROWS = 128  # query rows whose weights are held at once


class SinkObserver(Observer):
    """Sums the attention on each image token over text rows, and keeps the values' norms.

    Attributes:
        places: per row of the batch the positions of its image tokens.
        received: per row (layers, image tokens) float64, attention of text rows, mean over heads.
        first: (layers, rows) attention of text rows on the first token.
        rows: (rows,) how many text rows were summed.
        value_norm: per row (layers, image tokens) float32, mean over key/value heads.
        first_value_norm: (layers, rows) the same of the first token.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.places: list[Tensor] = []

    def begin(self, forward: Forward) -> None:
        if forward.kind == "extend":
            raise UnsupportedModelError("sinks are measured on one question and its answer")
        if forward.kind == "prefill":
            layout = forward.layout
            is_image = layout.modality == Modality.IMAGE
            self.places = [row.nonzero().flatten().cpu() for row in is_image]
            self.first_places = first_positions(layout)
            counts = [len(places) for places in self.places]
            self.received = [np.zeros((self.layers, count)) for count in counts]
            self.value_norm = [np.full((self.layers, count), np.nan) for count in counts]
            self.first = np.zeros((self.layers, len(counts)))
            self.first_value_norm = np.full((self.layers, len(counts)), np.nan)
            self.rows = np.zeros(len(counts))
        # (batch, rows of this pass); the layout is of everything that is cached.
        start, stop = forward.start, forward.start + forward.tokens
        self._text = forward.layout.modality[:, start:stop] == Modality.TEXT
        self.rows += self._text.sum(1).cpu().numpy()

    def observe(self, call: AttentionCall, output: Tensor) -> None:
        # Image tokens have their values from the prompt's pass; decode steps only read them again.
        if call.forward.kind == "prefill":
            self._keep_values(call)
        text = self._text.to(call.query.device)
        rows = text.any(0).nonzero().flatten()
        if not len(rows):
            return
        total: Tensor | None = None
        # From the first to the last row that is text in any sample; others in between count 0
        # times.
        for start in range(int(rows[0]), int(rows[-1]) + 1, _ROWS):
            block = slice(start, min(start + _ROWS, int(rows[-1]) + 1))
            # (batch, rows, keys), mean over heads; then summed over each sample's own text rows.
            weights = attention_weights(call, block).mean(1)
            summed = torch.einsum("brk,br->bk", weights, text[:, block].float())
            total = summed if total is None else total + summed
        assert total is not None
        found = total.double().cpu().numpy()
        for row, places in enumerate(self._columns(call)):
            # A key that the layer no longer holds is not attended and adds nothing.
            known = places >= 0
            self.received[row][call.layer][known] += found[row][places[known]]
        for row, place in enumerate(self._columns(call, first=True)):
            if place[0] >= 0:
                self.first[call.layer, row] += found[row][place[0]]

    def _columns(self, call: AttentionCall, first: bool = False) -> list[np.ndarray]:
        """Per row the key columns of its image tokens (or first token), -1 where not held."""
        wanted = [place[None] for place in self.first_places] if first else self.places
        if call.key_positions is None:
            return [places.numpy() for places in wanted]
        if call.key_positions.dim() != 1:
            raise UnsupportedModelError("sinks need one set of keys for all rows and heads")
        # The inverse of `key_positions`: sequence position -> column of the held keys.
        column = np.full(call.forward.layout.length, -1)
        column[call.key_positions.cpu().numpy()] = np.arange(len(call.key_positions))
        return [column[places.numpy()] for places in wanted]

    def _keep_values(self, call: AttentionCall) -> None:
        # (batch, keys), mean over key/value heads.
        norms = torch.linalg.vector_norm(call.value.float(), dim=-1).mean(1).cpu().numpy()
        for row, places in enumerate(self._columns(call)):
            known = places >= 0
            self.value_norm[row][call.layer][known] = norms[row][places[known]]
        for row, place in enumerate(self._columns(call, first=True)):
            if place[0] >= 0:
                self.first_value_norm[call.layer, row] = norms[row][place[0]]


def first_positions(layout: TokenLayout) -> Tensor:
    """(batch,) position of the first token of every row that is no padding."""
    return (layout.modality != Modality.PADDING).int().argmax(1).cpu()


class HiddenStates:
    """What is kept of the hidden states that enter each layer, on the way through a prompt.

    Attributes:
        largest: (layers, batch, positions) largest dimension over the root mean square.
        chosen: the same over `dimensions` alone; NaN without any.
        norm: (layers, batch, positions) Euclidean norms.
        first: (layers, batch, width) the first token's dimensions over its root mean square.
    """

    def __init__(self, layers: int, first_places: Tensor, dimensions: Sequence[int] = ()) -> None:
        self.dimensions = list(dimensions)
        self.first_places = first_places
        nothing = np.zeros(0)
        self.largest, self.chosen, self.norm, self.first = ([nothing] * layers for _ in range(4))

    def keep(self, layer: int, hidden: Tensor) -> None:
        """Reduce the states (batch, positions, width) that enter a layer."""
        states = hidden.float()
        size = torch.linalg.vector_norm(states, dim=-1)
        # Root mean square = norm / sqrt(width). The lower bound is for padding, whose states may be
        # 0.
        relative = states.abs() / (size / states.shape[-1] ** 0.5).clamp_min(1e-12)[..., None]
        self.norm[layer] = size.cpu().numpy()
        self.largest[layer] = relative.amax(-1).cpu().numpy()
        none = np.full(size.shape, np.nan)
        chosen = relative[..., self.dimensions].amax(-1).cpu().numpy() if self.dimensions else none
        self.chosen[layer] = chosen
        rows = torch.arange(len(states), device=states.device)
        self.first[layer] = relative[rows, self.first_places.to(rows.device)].cpu().numpy()


@contextmanager
def layer_inputs(model: nn.Module, keep: Any) -> Iterator[bool]:
    """Inside, `keep(layer, states)` is called with what enters each decoder layer with a prompt.

    Args:
        model: a loaded model.
        keep: takes the layer's index and (batch, positions, width) states.

    Yields:
        Whether the layers were found: modules that hold one attention module each.
    """
    decoder = describe(model).decoder
    names = {id(module): name for name, module in decoder.named_modules()}
    layers: dict[int, nn.Module] = {}
    for module in attention_modules(model):
        # The module that holds the attention module is taken for the decoder layer.
        parent = names.get(id(module), "").rpartition(".")[0]
        if parent and isinstance(module.layer_idx, int):
            layers[module.layer_idx] = decoder.get_submodule(parent)

    def hook(index: int) -> Any:
        def keep_states(module: nn.Module, args: Any, kwargs: Any) -> None:
            # Decode steps have one position and are left out.
            states = args[0] if args else kwargs.get("hidden_states")
            if isinstance(states, Tensor) and states.dim() == 3 and states.shape[1] > 1:
                keep(index, states.detach())

        return keep_states

    handles = [
        layer.register_forward_pre_hook(hook(index), with_kwargs=True)
        for index, layer in layers.items()
    ]
    try:
        yield len(layers) == describe(model).layers
    finally:
        for handle in handles:
            handle.remove()
