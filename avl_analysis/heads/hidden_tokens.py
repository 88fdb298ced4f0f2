"""Interventions on single image tokens: hidden from the text, or exchanged before the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from avl.attention import Attend, AttentionCall, Forward
from avl.families import UnsupportedModelError, describe
from avl.hooks import HookError, Intervention, attached
from avl.tokens import Modality
from avl_analysis.heads.knockout import additive_mask, row_and_key_places

Flags = Sequence[NDArray[np.bool_]]
"""Per row of a batch (layers, image tokens): which are hidden."""
Pairs = Sequence[Sequence[tuple[int, int]]]
"""Per row of a batch pairs of image tokens, each in one pair at most."""


class _HiddenTokens(Intervention):
    def __init__(self, hidden: Flags) -> None:
        self.hidden = hidden
        self._by_layer: Tensor | None = None

    def begin(self, forward: Forward) -> None:
        if forward.kind == "extend":
            raise HookError("hiding follows one question and its answer; start a new cache")
        modality = forward.layout.modality
        if forward.kind == "prefill":
            layers = len(self.hidden[0])
            # (layers, batch, positions), from flags that count image tokens only.
            flags = torch.zeros((layers, *modality.shape), dtype=torch.bool)
            for row, hidden in enumerate(self.hidden):
                places = (modality[row] == Modality.IMAGE).nonzero().flatten().cpu()
                flags[:, row, places] = torch.from_numpy(np.ascontiguousarray(hidden))
            self._by_layer = flags
        assert self._by_layer is not None
        # Tokens generated since the last pass are not of the image, so nothing of them is hidden.
        missing = modality.shape[1] - self._by_layer.shape[2]
        self._by_layer = torch.nn.functional.pad(self._by_layer, (0, missing))

    def attend(self, call: AttentionCall, inner: Attend) -> Tensor:
        assert self._by_layer is not None
        hidden = self._by_layer[call.layer].to(call.query.device)
        if not bool(hidden.any()):
            return inner(call)
        row_index, key_index = row_and_key_places(call)
        modality = call.forward.layout.modality.to(hidden.device)
        # Only text rows are cut off: image tokens still read the hidden ones, so that what they
        # exchange among themselves stays as it was.
        text = modality[:, row_index] == Modality.TEXT
        # (batch, 1, rows, keys). `key_index` is needed because a layer may have forgotten keys.
        cut = (text[:, :, None] & hidden[:, key_index][:, None])[:, None]
        mask = additive_mask(call, row_index, key_index)
        # The lowest finite number rather than -inf: a row whose keys are all masked stays finite.
        call.mask = torch.where(cut, torch.finfo(call.query.dtype).min, mask)
        return inner(call)


@contextmanager
def hidden_tokens(model: nn.Module, hidden: Flags) -> Iterator[None]:
    """Inside, text rows of the next batch do not attend to these image tokens in these layers.

    Args:
        model: a loaded model without a policy, with SDPA or eager attention.
        hidden: see `Flags`; as many layers as the decoder has.

    Raises:
        avl.families.UnsupportedModelError, avl.hooks.HookError: as for a policy.
    """
    with attached(model, _HiddenTokens(hidden)):
        yield


@contextmanager
def exchanged_embeddings(model: nn.Module, pairs: Pairs) -> Iterator[None]:
    """Inside, the embeddings of paired image tokens change places before the decoder.

    What vision tower and projector made of a patch then enters the decoder in another place. Models
    that feed image features into later layers, too (Qwen3-VL), leave those where they were.

    Args:
        model: a loaded model.
        pairs: see `Pairs`.

    Raises:
        UnsupportedModelError: the decoder is not given embeddings.
    """
    family = describe(model)
    layouts: list[Tensor] = []

    def remember(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        ids = kwargs.get("input_ids")
        # The decoder is given embeddings, in which image tokens cannot be told from text, so their
        # places are read from the token ids that the whole model gets. Passes of one token are
        # decode steps.
        if isinstance(ids, Tensor) and ids.shape[1] > 1:
            mask = kwargs.get("attention_mask")
            layout = family.layout(ids, mask if isinstance(mask, Tensor) else None, kwargs)
            layouts.append(layout.modality == Modality.IMAGE)

    def exchange(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        embeds = kwargs.get("inputs_embeds")
        if isinstance(embeds, Tensor) and embeds.shape[1] == 1:
            return None
        if not isinstance(embeds, Tensor) or not layouts:
            raise UnsupportedModelError(
                f"the decoder of {type(model).__name__} is not given embeddings, so none can be"
                " exchanged"
            )
        changed = embeds.clone()
        for row, chosen in enumerate(pairs):
            places = layouts[-1][row].nonzero().flatten().to(embeds.device)
            for one, other in chosen:
                # Read from the original, written to the copy: both directions see the state before
                # the exchange.
                changed[row, places[one]] = embeds[row, places[other]]
                changed[row, places[other]] = embeds[row, places[one]]
        return args, {**kwargs, "inputs_embeds": changed}

    handles = [
        model.register_forward_pre_hook(remember, with_kwargs=True),
        family.decoder.register_forward_pre_hook(exchange, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
