"""List what each target takes; what one of the targets does not take is lowered otherwise."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from adaattn.export.formats import BF16, FP8, FP16, FP32

HeadDims = tuple[int, int]
"""The least and the largest head size."""


@dataclass(frozen=True)
class Target:
    """What a target takes.

    Args:
        opset: the newest ONNX opset.
        attention: the head sizes of ONNX's `Attention` for each format that it may have. It never gets a causal mask
            and another one together, which TensorRT refuses: both are in the mask.
        quantized_attention: the head sizes of attention whose products have fp8 operands, written as operators.
        one_tensor: whether query, key and value of an `Attention` may be the same tensor.
        value_head_dim: whether the values of an `Attention` may have another head size.
        merged: whether it takes operators that torch.onnx merges others into from opset 23 on: RMSNormalization, and
            RotaryEmbedding whose angles are broadcast over a batch.
    """

    opset: int
    attention: Mapping[str, HeadDims]
    quantized_attention: HeadDims
    one_tensor: bool
    value_head_dim: bool
    merged: bool


_ANY = (1, 1 << 30)
# TensorRT-RTX 1.7 builds `Attention` of 16 bits, and attention in fp8, at head sizes 9 to 256. Where query, key and
# value are one tensor, its builder crashes. A file for ONNX Runtime has fp8 for a compiler that may take it later.
_TENSORRT = Target(23, {FP16: (9, 256), BF16: (9, 256)}, (9, 256), one_tensor=False, value_head_dim=False, merged=False)
_ONNX = Target(24, dict.fromkeys((FP32, FP16, BF16), _ANY), (9, 256), one_tensor=True, value_head_dim=True, merged=True)
TARGETS = {
    "onnx": _ONNX,
    "tensorrt-rtx": _TENSORRT,
    "tensorrt": _TENSORRT,
}


def newest_opset(targets: Collection[str]) -> int:
    """Return the newest opset that all targets take.

    Example:
        >>> newest_opset(["onnx", "tensorrt-rtx"])
        23
    """
    return min(TARGETS[name].opset for name in targets)


def take_attention(targets: Collection[str], form: str, head_dims: Collection[Any], one_tensor: bool = False) -> bool:
    """Return whether all targets take attention in a format: in fp8 as operators, in others as one `Attention`.

    Args:
        head_dims: of query, key and value; a dynamic one is no int.
        one_tensor: whether these three are the same tensor.

    Example:
        >>> take_attention(["onnx"], "fp32", [64]), take_attention(["onnx", "tensorrt-rtx"], "fp32", [64])
        (True, False)
    """
    known = all(isinstance(size, int) for size in head_dims)
    return known and all(_takes(TARGETS[name], form, head_dims, one_tensor) for name in targets)


def _takes(target: Target, form: str, head_dims: Collection[int], one_tensor: bool) -> bool:
    least, largest = target.quantized_attention if form == FP8 else target.attention.get(form, (1, 0))
    fits = least <= min(head_dims) and max(head_dims) <= largest
    if form == FP8:
        return fits
    return fits and (target.one_tensor or not one_tensor) and (target.value_head_dim or len(set(head_dims)) == 1)
