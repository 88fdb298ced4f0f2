"""Our attention functions in transformers' registries, one per backend.

transformers 5 looks up the attention function and the mask function of a decoder under one name,
the config's `_attn_implementation`. This module registers, under a name of its own per backend
("avl_sdpa", ...), a function that asks who owns the calling module and otherwise just delegates,
together with the backend's own mask function. `rename` points a config at our function, `restore`
takes that back. What owners do with a call is not known here.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from avl.attention import Attend, AttentionCall, Forward, newest_positions
from avl.families import UnsupportedModelError

_PREFIX = "avl_"


class Owner(Protocol):
    """What gets the attention calls of a module."""

    forward: Forward | None

    def call(self, inner: Attend, call: AttentionCall) -> Tensor:
        """The output of one call; `inner` is the backend's own attention."""


OWNERS: dict[nn.Module, Owner] = {}
"""Attention module -> who gets its calls. An owner holds its modules as long as it is here."""

_RENAMED: dict[int, list[Any]] = {}
"""Id of a config -> the config, its original name, how many use our name in it: two models may
share one config, so the last one restores it.
"""


class _Name(str):
    """The name of our function for a backend, which equals the backend's own name, too.

    DeepSeek-style sparse attention, Gemma 4 and others ask `config._attn_implementation == "sdpa"`
    to decide what they pass on; with a name of another make they would compute something else. The
    hash is that of the full text, so registries (dictionaries) find our function and never the
    backend's.
    """

    __slots__ = ("_names",)
    _names: frozenset[str]

    def __new__(cls, backend: str) -> _Name:
        self = super().__new__(cls, _PREFIX + backend)
        self._names = frozenset((backend, _PREFIX + backend))
        return self

    def __eq__(self, other: object) -> bool:
        # A decoder asks some twenty times a token.
        return isinstance(other, str) and other in self._names

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and files of a config name the backend itself.
        return str, (backend_name(str(self)),)


def backend_name(name: str | None) -> str:
    """The backend behind a name that may be ours; None means eager attention."""
    return str.removeprefix(name or "eager", _PREFIX)


def rename(config: Any) -> None:
    """Point a config at our function for its backend.

    Raises:
        UnsupportedModelError: transformers has no mask function for the backend.
    """
    # By identity: configs compare by content, and two models with equal configs are renamed apart.
    entry = _RENAMED.get(id(config))
    if entry is not None:
        entry[2] += 1
        return
    original = config._attn_implementation_internal
    backend = backend_name(original)
    if backend not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(
            f"attention backend {backend!r} has no mask function in transformers; load the model"
            " with attn_implementation='sdpa' or 'eager'"
        )
    _register(backend)
    _RENAMED[id(config)] = [config, original, 1]
    config._attn_implementation_internal = _Name(backend)


def restore(config: Any) -> None:
    """Give a config its own name back, once ours is not in use any more.

    A name that somebody else put there meanwhile is left alone.
    """
    entry = _RENAMED.get(id(config))
    if entry is None:
        return
    entry[2] -= 1
    if entry[2] == 0:
        if is_ours(config):
            config._attn_implementation_internal = entry[1]
        del _RENAMED[id(config)]


def is_ours(config: Any) -> bool:
    """Whether a config points at our function."""
    return isinstance(config._attn_implementation_internal, _Name)


def _register(backend: str) -> None:
    """Register attention and mask function under one name; inert until a config names them."""
    name = _PREFIX + backend
    if name in ALL_ATTENTION_FUNCTIONS:
        return

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention as transformers asks a backend for it.

        Args:
            module: the attention layer.
            query: (batch, query heads, rows, head dim).
            key: (batch, key/value heads, keys, head dim).
            value: (batch, key/value heads, keys, head dim).
            attention_mask: as the backend's mask function made it.
            options: further keyword arguments of the backend.

        Returns:
            Output (batch, rows, query heads, head dim), and weights where the backend has them.
        """
        # A compiled model leaves its graph here and comes back behind it: what owners do depends on
        # where in a sequence a pass stands, which must not be compiled in.
        if torch.compiler.is_compiling():
            return outside(module, query, key, value, attention_mask, **options)
        # The backend's function is looked up at each call: somebody may register another one under
        # its name.
        owner = OWNERS.get(module)
        if owner is None or owner.forward is None:
            function = _function(backend, module)
            return function(module, query, key, value, attention_mask, **options)
        # Eager attention also returns weights, which the model may hand on (`output_attentions`).
        weights: list[Tensor | None] = [None]

        def inner(call: AttentionCall) -> Tensor:
            output, weights[0] = _function(backend, module)(
                call.module, call.query, call.key, call.value, call.mask, **call.options
            )
            return output

        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        call = AttentionCall(
            owner.forward,
            int(module.layer_idx),
            module,
            query,
            key,
            value,
            attention_mask,
            scaling,
            options,
            partial(newest_positions, owner.forward, key),
        )
        return owner.call(inner, call), weights[0]

    outside = torch.compiler.disable(attention)
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    # a name without a mask function silently loses the padding mask
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[backend])


def _function(backend: str, module: nn.Module) -> Any:
    """The backend's attention function; eager is each modeling file's own."""
    if backend == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[backend]
