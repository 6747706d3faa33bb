"""A stand-in for Apple's GPU, a device without float64. The CPU computes its numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

MPS, CPU = torch.device("mps"), torch.device("cpu")
LEAVES = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__array__}


class OnMps(torch.Tensor):
    """A tensor on the device. RuntimeError: an operand with dimensions from another device. TypeError: float64."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return MPS
        given, _ = tree_flatten((args, kwargs))
        named = devices(given)
        tensors = [one for one in given if isinstance(one, torch.Tensor)]
        leaves = func in LEAVES or CPU in named
        leaves |= func is torch.Tensor.to and len(tensors) == 2 and type(tensors[1]) is torch.Tensor
        moves = leaves or MPS in named or func in (torch.Tensor.to, torch.Tensor.copy_, torch.Tensor.__getitem__)
        if not moves and any(type(one) is torch.Tensor and one.ndim for one in tensors):
            raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device")
        args, kwargs = tree_map(plain, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return result if leaves else tree_map(placed, result)


def devices(given: list[Any]) -> list[torch.device]:
    return [
        torch.device(one)
        for one in given
        if isinstance(one, torch.device) or (isinstance(one, str) and one in ("cpu", "mps"))
    ]


def plain(one: Any) -> Any:
    if isinstance(one, OnMps):
        with torch._C.DisableTorchFunctionSubclass():
            return one.as_subclass(torch.Tensor)
    return CPU if devices([one]) else one


def placed(one: Any) -> Any:
    """A tensor or a module, on the device."""
    if isinstance(one, torch.nn.Module):
        for module in one.modules():
            for kept in (module._parameters, module._buffers):
                kept.update({name: placed(value.data) for name, value in kept.items() if value is not None})
        return one
    if not isinstance(one, torch.Tensor):
        return one
    if one.dtype is torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    with torch._C.DisableTorchFunctionSubclass():
        return one.as_subclass(OnMps)


class PretendMps(TorchFunctionMode):
    """While this is on, tensors can be made on the device and sent there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, _ = tree_flatten((args, kwargs or {}))
        if MPS in devices(given):
            return OnMps.__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))
