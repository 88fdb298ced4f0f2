"""Arguments of a model's calls by name, and which of them is the KV cache.

transformers renames things: the cache of a decoder was `past_key_values` up to 5.23 and is `cache`
from 5.24 on. Everything that reads or passes a cache asks here, so that no other module knows a
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from itertools import chain
from typing import Any

from torch import nn

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names under which decoders of transformers take their KV cache, the newest first."""


def named_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of a forward call by name.

    Args:
        module: whose `forward` is called.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    if not args:
        return dict(kwargs)
    return {**dict(zip(signature(module.forward).parameters, args, strict=False)), **kwargs}


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a decoder's call, whatever its name; None without one."""
    # Known names first; anything else that counts its tokens like a cache is one. Others are not
    # looked at where a name is known: asking every argument takes a while at every step.
    named = (arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None)
    others = (value for value in arguments.values() if hasattr(value, "get_seq_length"))
    return next(chain(named, others), None)


def uses_cache(decoder: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether a decoder's call is meant to fill a KV cache."""
    use = arguments.get("use_cache")
    return bool(getattr(decoder.config, "use_cache", True) if use is None else use)


def cache_parameter(decoder: nn.Module) -> str:
    """The name under which a decoder takes its cache.

    Raises:
        LookupError: it has no parameter of a name known for this.
    """
    parameters = signature(decoder.forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise LookupError(
        f"{type(decoder).__name__} takes no KV cache under a name that is known here"
        f" ({', '.join(CACHE_NAMES)}); it takes {', '.join(parameters)}"
    )
