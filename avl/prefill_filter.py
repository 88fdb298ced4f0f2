"""Dropping image tokens on the way through a prompt: hooks on decoder layers.

After the filter layer (or before the first layer) a prompt's hidden states lose some rows, and
everything the later layers are handed with them (mask, positions, rotary tables) loses the same
rows. What is left stays in its order and keeps its positions. The last layer's output gets its full
length back, with NaN in the rows that were not computed: the last row, which `generate` reads, is
there, every row stands at its position, and a row that is missing cannot be mistaken for a result.

Rows of a batch that lose different numbers of tokens get fillers in front (row index -1), which the
mask hides from all tokens. The filter acts on prompts only; a later turn's images pass in full.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from avl.attention import Forward
from avl.families import Family, UnsupportedModelError
from avl.module_hooks import ModuleHook, add_hook
from avl.selection import members

ChooseInput = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Hidden states -> positions that go on, and hidden states."""

_PER_TOKEN = ("position_ids", "cache_position")
_TABLES = "position_embeddings"


class PrefillFilter:
    """The hooks of one session; `drop` is called during the filter layer's attention.

    With `layer` 0, tokens leave before the first layer, by what the function that was passed to
    `begin` says about the hidden states that enter it.
    """

    def __init__(self, family: Family, layer: int) -> None:
        layers = decoder_layers(family)
        if layer >= len(layers):
            raise ValueError(
                f"prefill_layer={layer}, but {family.name} has {len(layers)} layers; pass 1 to"
                f" {len(layers) - 1}"
            )
        # From a number of layers to the index of the last layer that sees all tokens; -1: none
        # does.
        self.layer = layer - 1
        self._layers = layers
        self._forward: Forward | None = None
        self._next: Tensor | None = None
        self._rows: Tensor | None = None
        self._hooks: list[ModuleHook] = []
        self._decoder = family.decoder
        self._name = family.name
        self._choose: ChooseInput | None = None

    def connect(self) -> None:
        hooks = [add_hook(self._decoder, self._check_decoder, "before", with_kwargs=True)]
        if self.layer < 0:
            hooks.append(add_hook(self._layers[0], self._cut_input, "before"))
        else:
            hooks.append(add_hook(self._layers[self.layer], self._cut, "after"))
        for module in self._layers[self.layer + 1 :]:
            hooks.append(add_hook(module, self._select, "before", with_kwargs=True))
        self._hooks = [*hooks, add_hook(self._layers[-1], self._restore, "after")]

    def disconnect(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.begin(None)

    def begin(self, forward: Forward | None, choose: ChooseInput | None = None) -> None:
        """A pass starts (or, with None, is over).

        Args:
            forward: the pass, if tokens may leave it.
            choose: given the hidden states that enter the first layer, says which positions go on,
                (batch, tokens) bool, and with which hidden states.
        """
        self._forward, self._next, self._rows, self._choose = forward, None, None, choose

    def drop(self, keep: Tensor) -> None:
        """Say which positions go on, (batch, tokens) bool.

        Takes effect when the filter layer is through.
        """
        # Nothing to drop in any row: the pass stays untouched, bit for bit.
        if not bool(keep.all()):
            self._next = members(keep[:, None], int(keep.sum(1).amax()))[:, 0]

    # -- hooks -------------------------------------------------------------------------------------

    def _check_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Refuse decoders that add image features to layers behind the filter (Qwen3-VL)."""
        added = kwargs.get("deepstack_visual_embeds")
        if self._forward is not None and added is not None and self.layer < len(added):
            raise UnsupportedModelError(
                f"{self._name} adds image features to the output of its first {len(added)} decoder"
                f" layers; image tokens can leave its prompt after layer {len(added) + 1} at the"
                " earliest. Pass prefill_layer of at least that, or use a policy that drops keys"
                " only"
            )

    def _cut_input(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._forward is None or self._choose is None:
            return None
        keep, hidden = self._choose(args[0])
        self.drop(keep)
        if self._next is None:
            return (hidden, *args[1:])
        self._rows, self._next = self._next, None
        self._forward.rows = self._rows
        return (_take(hidden, self._rows, -2), *args[1:])

    def _cut(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._forward is None or self._next is None:
            return None
        # The attention of this very layer was still over all tokens, so the rows change only now,
        # for the layers behind it.
        self._rows, self._next = self._next, None
        self._forward.rows = self._rows
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = _take(hidden, self._rows, -2)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _select(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._rows is None or self._forward is None:
            return None
        names = list(signature(module.forward).parameters)
        length = self._forward.tokens
        changed = [
            self._part(name, value, length)
            for name, value in zip(names[1:], args[1:], strict=False)
        ]
        return (args[0], *changed), {
            name: self._part(name, value, length) for name, value in kwargs.items()
        }

    def _restore(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._rows is None or self._forward is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        # (batch, tokens + 1, width)
        full = hidden.new_full(
            (hidden.shape[0], self._forward.tokens + 1, hidden.shape[2]), torch.nan
        )
        # Fillers go to one more row, which is cut off.
        index = torch.where(self._rows < 0, self._forward.tokens, self._rows)
        full.scatter_(1, index[..., None].expand_as(hidden), hidden)
        full = full[:, :-1]
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _part(self, name: str, value: Any, length: int) -> Any:
        """What a later layer gets in place of one of its arguments."""
        assert self._rows is not None
        if name == "attention_mask":
            return _take_mask(value, self._rows)
        # A one-dimensional cache_position counts positions of the cache, which are not shortened.
        if name in _PER_TOKEN and isinstance(value, Tensor):
            return _take(value, self._rows, -1) if value.dim() > 1 else value
        if name.startswith(_TABLES) and isinstance(value, (tuple, list)):
            return type(value)(_take(table, self._rows, -2) for table in value)
        # Anything else that is as long as the prompt along one axis is probably per token; guessing
        # how to cut it would be silently wrong.
        if (
            name != "hidden_states"
            and isinstance(value, Tensor)
            and value.dim() > 1
            and length in value.shape[:-1]
        ):
            raise UnsupportedModelError(
                f"decoder layers of this model are handed {name!r} of shape {tuple(value.shape)}"
                " per token, which the prefill filter does not know how to shorten; use a policy"
                " without prefill filter (prefill=None)"
            )
        return (
            _take(value, self._rows, -2)
            if name == "hidden_states" and value.shape[-2] == length
            else value
        )


def decoder_layers(family: Family) -> nn.ModuleList:
    """The decoder's stack of layers.

    Raises:
        UnsupportedModelError: there is no list of modules with one attention each.
    """
    for module in family.decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == family.layers:
            indices = [
                {
                    m.layer_idx
                    for m in layer.modules()
                    if isinstance(getattr(m, "layer_idx", None), int)
                }
                for layer in module
            ]
            if indices == [{index} for index in range(len(module))]:
                return module
    raise UnsupportedModelError(
        f"{family.name}: no stack of {family.layers} decoder layers found, which the prefill filter"
        " hooks into; use a policy without prefill filter (prefill=None)"
    )


def _take(tensor: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Rows of a per-token tensor.

    Its token axis is `dim` (-1 or -2), its batch axis (1 or batch) left of that.
    """
    # A tensor of batch size 1 serves all rows and is repeated before rows take different tokens.
    shape = list(tensor.shape)
    shape[dim - 1] = rows.shape[0]
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None]
    index = (..., batch, rows.clamp_min(0)) + ((slice(None),) if dim == -2 else ())
    return tensor.expand(shape)[index]


def _take_mask(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """The mask among the rows that are left; fillers are hidden from all."""
    hidden = rows < 0
    index = rows.clamp_min(0)
    if mask is None:
        if not bool(hidden.any()):
            return None
        count = rows.shape[1]
        # What is left stands in the order of the prompt, so the triangle is still the causal mask.
        causal = torch.ones(count, count, dtype=torch.bool, device=rows.device).tril()
        return causal & ~hidden[:, None, None, :]
    if mask.dim() == 2:
        return mask.gather(1, index).masked_fill(hidden, 0)
    mask = mask.expand(rows.shape[0], -1, -1, -1)
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None, None, None]
    head = torch.arange(mask.shape[1], device=rows.device)[None, :, None, None]
    # (batch, heads, rows left, rows left): the same rows are taken on both axes.
    mask = mask[batch, head, index[:, None, :, None], index[:, None, None, :]]
    nothing = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(hidden[:, None, None, :], nothing)
