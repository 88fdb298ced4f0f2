"""Hooks on modules of a model that neither its copies nor its files take over.

A hook in the manner of `register_forward_hook` lies in the module and is copied and pickled with
it. Those made here act on the module they were put on and on no copy of it, and a model that has
some cannot be pickled by mistake. This module does not know what the hooks do.
"""

from __future__ import annotations

from collections.abc import Callable
from pickle import PicklingError
from typing import Any, Literal
from weakref import ref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Moment = Literal["before", "after"]


class ModuleHook:
    """A function that is called before or after each pass through one module, until removed."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self._module = ref(module)
        self._function: Callable[..., Any] | None = function
        self._handle: RemovableHandle | None = None

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        # A pass stands somewhere in a sequence, which must not be compiled in.
        if torch.compiler.is_compiling():
            return self._outside(module, *arguments)
        if self._function is None or module is not self._module():
            return None
        return self._function(module, *arguments)

    @torch.compiler.disable
    def _outside(self, module: nn.Module, *arguments: Any) -> Any:
        """The same, outside a compiled graph."""
        return self(module, *arguments)

    def remove(self) -> None:
        """Take the hook off; copies of the module, which still have it, keep nothing alive."""
        if self._handle is not None:
            self._handle.remove()
        self._function = self._handle = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleHook:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PicklingError(
            "a model cannot be pickled (torch.save of the whole model, or sending it to another"
            " process) while it is recorded or adapted; leave the `with` block first, or save it"
            " with model.save_pretrained(folder) or torch.save(model.state_dict(), file)"
        )


def add_hook(
    module: nn.Module,
    function: Callable[..., Any],
    moment: Moment,
    *,
    with_kwargs: bool = False,
    always_call: bool = False,
    prepend: bool = False,
) -> ModuleHook:
    """Call `function` before or after each pass through `module`.

    Args:
        module: the module; copies of it are left alone.
        function: as `register_forward_pre_hook` or `register_forward_hook` take it.
        moment: "before" or "after".
        with_kwargs: whether it is called with keyword arguments, too.
        always_call: whether it is called after a pass that raised; "after" only.
        prepend: whether it is called before the hooks there are already.

    Returns:
        The hook, for `remove`.
    """
    hook = ModuleHook(module, function)
    if moment == "before":
        handle = module.register_forward_pre_hook(hook, with_kwargs=with_kwargs, prepend=prepend)
    else:
        handle = module.register_forward_hook(
            hook, with_kwargs=with_kwargs, always_call=always_call, prepend=prepend
        )
    hook._handle = handle
    return hook
