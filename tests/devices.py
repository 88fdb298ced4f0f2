"""Devices that do not exist: tensors that say they are on "lazy:1" and keep numbers on the CPU.

    with pretended_devices():
        there = pretend(tensor, "lazy:1")

`there` computes like `tensor`. An operation over tensors of two devices raises, as PyTorch's own
would, unless one of them is a number without dimensions; so does `numpy` before `.cpu()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")


class Pretended(torch.Tensor):
    """A tensor on a device that does not exist."""

    @staticmethod
    def __new__(cls, numbers, device):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device(device),
        )

    def __init__(self, numbers, device):
        self.numbers = numbers

    def __repr__(self):
        return f"Pretended({self.numbers}, {self.device})"

    def tolist(self):
        """As of any tensor; PyTorch leaves it out for subclasses."""
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def pretend(tensor, device):
    """The same numbers on a device that does not exist; None stays None."""
    return None if tensor is None else Pretended(tensor.detach(), device)


class _Factories(TorchDispatchMode):
    """Lets `torch.zeros(..., device="lazy:1")` and the like make pretended tensors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """Tensors that PyTorch makes of Python's numbers out of reach of dispatch modes, here made on
    the CPU and moved: `torch.tensor`, `new_tensor`, and lists as indices.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.new_tensor:
            like, *args = args
            function, kwargs = torch.tensor, {"dtype": like.dtype, "device": like.device, **kwargs}
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            of, index, *value = args
            args = (of, tree_map(_on(of.device), index, is_leaf=_is_list), *value)
        if function is not torch.tensor or kwargs.get("device") is None:
            return function(*args, **kwargs)
        device = kwargs.pop("device")
        return function(*args, **kwargs).to(device)


def _is_list(index):
    return isinstance(index, list)


def _on(device):
    return lambda index: torch.tensor(index).to(device) if _is_list(index) else index


@contextmanager
def pretended_devices() -> Iterator[None]:
    """Tensors can be made on, and moved to, devices that do not exist."""
    with _Factories(), _FromData():
        yield


def _run(function, args, kwargs):
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    wanted = kwargs.get("device")
    moves = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    devices = {t.device for t in tensors if t.dim()} or {t.device for t in tensors}
    if len(devices) > 1 and not moves:
        raise RuntimeError(f"{function}: tensors are on different devices {devices}")
    device = torch.device(wanted) if wanted is not None else next(iter(devices), CPU)
    if function.overloadpacket is torch.ops.aten.copy_:
        device = args[0].device
    if "device" in kwargs:
        kwargs = {**kwargs, "device": CPU}
    real = tree_map(lambda t: t.numbers if isinstance(t, Pretended) else t, (args, kwargs))
    found = function(*real[0], **real[1])
    if device.type == "cpu":
        return found
    known = {id(t.numbers): t for t in tensors if isinstance(t, Pretended)}

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in known:  # changed in place: the same object again
            return known[id(value)]
        return Pretended(value, device)

    return tree_map(wrap, found)
