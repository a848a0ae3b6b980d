"""Check tensors: class, layout, type and device. The checks run in every call, in a trace too, and read no data."""

from __future__ import annotations

from collections.abc import Mapping

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


def check_mask(
    name: str,
    mask: Tensor,
    *shapes: Mapping[str, int],
    device: torch.device | None = None,
    true: str = "attends",
    additive: bool = True,
    broadcasts: bool = True,
) -> None:
    """Raise an error where a mask has another type, shape or device than attention takes.

    Args:
        shapes: that it may have, one for each number of dimensions, as sizes by the names of the dimensions.
        device: where it must be; None where that is checked elsewhere.
        true: what True means, for the message.
        additive: whether a floating-point mask, added to the scores, is accepted too.
        broadcasts: whether a size of 1 is accepted for any size.

    Raises:
        ShapeError, DtypeError, DeviceError: the mask does not fit.
    """
    check_tensor(name, mask)
    if mask.dtype != torch.bool and not (additive and mask.dtype in FLOATS):
        other = ", or float32, float16, bfloat16 or float64 to add to the scores" if additive else ""
        raise DtypeError(
            f"{name} is {mask.dtype}; give bool, True where a token {true} "
            f"(mask.bool() for a mask of ones and zeros){other}"
        )
    want = next((tuple(shape.values()) for shape in shapes if len(shape) == mask.dim()), None)
    if want is None or any(n != size and not (broadcasts and n == 1) for n, size in zip(mask.shape, want, strict=True)):
        expected = " or ".join(f"({', '.join(shape)}) = {tuple(shape.values())}" for shape in shapes)
        one = ", or 1 for any size" if broadcasts else ""
        raise ShapeError(f"{name} has shape {tuple(mask.shape)}; expected {expected}{one}")
    if device is not None:
        check_device(name, mask, device)
