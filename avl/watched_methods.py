"""Methods of a model that are watched for their arguments while something is attached to it.

`generate` says what kind of generation follows, and when it begins and ends. The methods that
encode images and videos see their grids and sizes, which from transformers 5.23 on never reach the
model's own call under `generate`. Each is replaced on the one model by a method that tells a
`Watcher` and then does the same, with the same arguments; `unwatch` takes that back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn


class Watcher(Protocol):
    """What is told about calls of watched methods."""

    def generation(
        self, model: nn.Module, arguments: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """`generate` of a module of the model runs while the block does."""

    def remember_shown(self, arguments: dict[str, Any]) -> None:
        """Images or videos are encoded from these arguments."""


_WATCHERS: WeakKeyDictionary[nn.Module, Watcher] = WeakKeyDictionary()
"""Module with watched methods -> who watches them.

The methods find their watcher here when they are called and keep neither watcher nor module, so
those of a copy of the model work on the copy.
"""


def watch(model: nn.Module, watcher: Watcher) -> list[tuple[nn.Module, str]]:
    """Watch the methods of all modules of a model; returns which, for `unwatch`.

    A method that somebody else has replaced on the module itself is left alone.
    """
    watched = []
    for module in model.modules():
        for name, replace in WATCHED.items():
            function = getattr(type(module), name, None)
            if callable(function) and name not in vars(module):
                # On the instance, never on the class: other models of the class stay as they are.
                setattr(module, name, MethodType(replace(function), module))
                watched.append((module, name))
                _WATCHERS[module] = watcher
    return watched


def unwatch(watched: list[tuple[nn.Module, str]]) -> None:
    """Give modules their own methods back."""
    for module, name in watched:
        vars(module).pop(name, None)
        _WATCHERS.pop(module, None)


def _watch_encoding(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method that encodes images and tells from what."""

    @wraps(function)  # transformers reads the signature
    def encode(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _tell_shown(function, module, args, kwargs)
        return function(module, *args, **kwargs)

    return encode


@torch.compiler.disable
def _tell_shown(
    function: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if (watcher := _WATCHERS.get(module)) is not None:
        watcher.remember_shown(_bound(function, args, kwargs))


def _watch_generate(function: Callable[..., Any]) -> Callable[..., Any]:
    """A `generate` that tells when it begins and ends."""

    @wraps(function)
    def generate(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (watcher := _WATCHERS.get(module)) is None:
            return function(module, *args, **kwargs)
        with watcher.generation(module, _bound(function, args, kwargs)):
            return function(module, *args, **kwargs)

    return generate


WATCHED: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "generate": _watch_generate,
    "get_image_features": _watch_encoding,
    "get_video_features": _watch_encoding,
}
"""Name of a method -> what makes the watched one of it."""


def _bound(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of a method by name, the module itself left out."""
    names = list(signature(function).parameters)[1:] if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}
