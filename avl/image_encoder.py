"""What the image encoder itself looks at: attention weights inside a vision tower.

The queries and keys of one layer's attention are taken by forward hooks where its projections make
them, and the weights computed from them; the encoder runs as it always does. This is possible for
towers in the manner of CLIP and SigLIP, whose layers have an attention with `q_proj` and `k_proj`,
and whose tokens become image tokens one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from avl.families import Family, UnsupportedModelError
from avl.module_hooks import ModuleHook, add_hook


class EncoderAttention:
    """How much attention each token of an image gets in the encoder's last layer but one."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self._name = family.name
        self._module = _attention(model, family)
        self._outputs: dict[str, Tensor] = {}
        self._hooks: list[ModuleHook] = []

    def connect(self) -> None:
        """Watch the encoder from now on."""
        for name in ("q_proj", "k_proj"):
            self._hooks.append(add_hook(getattr(self._module, name), self._keeper(name), "after"))

    def disconnect(self) -> None:
        """Watch it no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._outputs.clear()

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self._outputs[name] = output.detach()

        return keep

    def received(self, count: int) -> Tensor:
        """Weight that each image token gets: from the class token, or from all where there is none.

        Args:
            count: image tokens of the batch.

        Returns:
            (count,) float32, sums over the encoder's heads, images one after the other.

        Raises:
            UnsupportedModelError: no image went through the encoder, or its tokens do not become
                image tokens one by one.
        """
        if len(self._outputs) < 2:
            raise UnsupportedModelError(
                f"{self._name}: no image passed the image encoder in this call, so that there is no"
                " attention to read; call the model with pixel_values"
            )
        query, key = self._outputs["q_proj"], self._outputs["k_proj"]
        self._outputs = {}
        # Encoders see pictures, tiles and frames as one batch, perhaps over several leading axes.
        images, tokens, width = query.flatten(0, -3).shape
        heads = int(self._module.num_heads)
        has_class_token = images * (tokens - 1) == count
        if not has_class_token and images * tokens != count:
            raise UnsupportedModelError(
                f"{self._name}: its encoder makes {images} x {tokens} tokens, the prompt holds"
                f" {count} image tokens; attention of the encoder can be read only where its tokens"
                " become image tokens one by one. The policy divprune does without it"
            )
        # (images, heads, tokens, head width)
        query, key = (
            part.flatten(0, -3).float().view(images, tokens, heads, -1).transpose(1, 2)
            for part in (query, key)
        )
        scaling = float(getattr(self._module, "scale", (width // heads) ** -0.5))
        # The attention of the class token if there is one, else of all tokens, in the mean.
        rows = query[:, :, :1] if has_class_token else query
        weights = torch.softmax(rows @ key.transpose(-1, -2) * scaling, -1)
        received = weights.mean(2).sum(1)  # over the rows, and over heads
        return received[:, 1:].flatten() if has_class_token else received.flatten()


def _attention(model: nn.Module, family: Family) -> nn.Module:
    """The attention of the image encoder's last layer but one (the only one, if there is one)."""
    # The decoder may lie inside the module that also holds the encoder, so its parts are left out.
    decoder = set(map(id, family.decoder.modules()))
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in decoder and len(module):
            attentions = [
                [part for part in layer.modules() if _projects(part)]
                for layer in module
                if id(layer) not in decoder
            ]
            if attentions and all(len(parts) == 1 for parts in attentions):
                return attentions[max(len(attentions) - 2, 0)][0]
    raise UnsupportedModelError(
        f"{family.name}: no image encoder whose layers have an attention with q_proj and k_proj, as"
        " CLIP's and SigLIP's have; its attention cannot be read. The policy divprune does without"
    )


def _projects(module: nn.Module) -> bool:
    """Whether a module is an attention whose queries and keys can be taken."""
    names = ("q_proj", "k_proj")
    return hasattr(module, "num_heads") and all(
        isinstance(getattr(module, name, None), nn.Module) for name in names
    )
