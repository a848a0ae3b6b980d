"""Name types as numpy does, and bfloat16 "bfloat16", whatever a package calls them. Nothing here is imported."""

from __future__ import annotations

ONNX_TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "bfloat16": 16,
}
"""For each type its number in `onnx.TensorProto.DataType`."""
_OTHER_NAMES = {"float": "float32", "double": "float64", "half": "float16", "bf16": "bfloat16"}


def dtype_name(dtype: object) -> str:
    """Return the name of a type of torch, numpy, ONNX Runtime or TensorRT.

    Example:
        >>> [dtype_name(x) for x in ("torch.int8", "tensor(float)", "HALF", "bool")]
        ['int8', 'float32', 'float16', 'bool']
    """
    name = str(dtype).removeprefix("torch.").removeprefix("tensor(").removesuffix(")").lower()
    return _OTHER_NAMES.get(name, name)
