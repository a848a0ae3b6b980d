"""Checks of tensors: class, layout, type and device. They run in every call, in a trace too, and read no data."""

from __future__ import annotations

import torch
from torch import Tensor

from adaattn.checks import described
from adaattn.errors import DeviceError, DtypeError, ShapeError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The types that attention computes in."""


def check_tensor(name: str, x: object) -> None:
    """Raise DtypeError where an argument is not a dense tensor."""
    if not isinstance(x, Tensor):
        raise DtypeError(f"{name} is {described(x)}; give a torch.Tensor")
    if x.is_nested:
        raise ShapeError(f"{name} is a nested tensor, which is not supported; give padded tensors and a mask")
    if x.layout is not torch.strided:
        raise DtypeError(f"{name} is a tensor of layout {x.layout}; give a dense one, such as {name}.to_dense()")


def check_float(name: str, x: Tensor) -> None:
    """Raise DtypeError where a tensor is not of one of `FLOATS`."""
    if x.dtype not in FLOATS:
        raise DtypeError(
            f"{name} is {x.dtype}; expected a floating-point tensor: float32, float16, bfloat16 or float64"
        )


def check_device(name: str, x: Tensor, device: torch.device, other: str = "query") -> None:
    """Raise DeviceError where a tensor is not where another one is."""
    if x.device != device:
        raise DeviceError(f"{name} is on {x.device} and {other} on {device}; move them to one device")


def check_mask_dtype(name: str, mask: Tensor) -> None:
    """Raise DtypeError where a mask is neither boolean nor of one of `FLOATS`."""
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        raise DtypeError(
            f"{name} is {mask.dtype}; give bool, True where a query attends (mask.bool() for a mask of ones and "
            "zeros), or float32, float16, bfloat16 or float64 to be added to the scores"
        )
