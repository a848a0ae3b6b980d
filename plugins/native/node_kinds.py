"""Sort the nodes of a model into kinds: nodes of one kind share a launch program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaattn.errors import ConfigError
from adaattn.plugins import NAMESPACE, onnx_file, op_variants
from adaattn.plugins.op_variants import VARIANTS, Variant


class Symbol:
    """A size that C++ will know, as C++ text."""

    is_constant = False

    def __init__(self, text: str) -> None:
        self.text = text

    def _operation(self, operator: str, other: Any) -> Symbol:
        return Symbol(f"({self.text} {operator} {text_of(other)})")

    def __add__(self, other: Any) -> Symbol:
        return self._operation("+", other)

    def __sub__(self, other: Any) -> Symbol:
        return self._operation("-", other)

    def __mul__(self, other: Any) -> Symbol:
        return self._operation("*", other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Symbol:
        return self._operation("/", other)


def text_of(size: Any) -> str:
    """Return a size as C++."""
    return size.text if isinstance(size, Symbol) else str(size)


@dataclass(frozen=True)
class Kind:
    """What distinguishes the programs of an op: nodes of one kind share one, whatever their sizes and scales."""

    op: str
    types: tuple[torch.dtype, ...]
    """Of the inputs."""
    head_dim: int
    flag: int
    """`center` or `is_causal`; 0 for an op that has neither."""
    ones: tuple[bool, ...] = ()
    """Which dimensions of the mask are 1, to be repeated."""

    @property
    def variant(self) -> Variant:
        """The variant of the op."""
        return VARIANTS[self.op]


def kinds(model: Path) -> list[Kind]:
    """Return the kinds of AdaAttn's nodes in an ONNX file.

    Raises:
        ConfigError: it is not an ONNX file, has none, or a node whose types and shapes it does not tell.
    """
    import onnx
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import to_torch_dtype

    graph = onnx_file.load(model).graph
    values = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input, *graph.output)}
    values |= {x.name: onnx.helper.make_tensor_type_proto(x.data_type, x.dims).tensor_type for x in graph.initializer}
    found: dict[Kind, None] = {}
    for node in graph.node:
        if node.domain != NAMESPACE:
            continue
        unknown = [name for name in node.input if name not in values]
        if unknown:
            raise ConfigError(f"{model}: nothing says what type and shape {unknown[0]} of {node.op_type} has")
        tensors = [values[name] for name in node.input]
        dims = [[d.dim_value for d in x.shape.dim] for x in tensors]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        found[_kind(node.op_type, [to_torch_dtype(ir.DataType(x.elem_type)) for x in tensors], dims, attributes)] = None
    if not found:
        raise ConfigError(f"{model} has no AdaAttn ops: no node of domain {NAMESPACE!r}")
    return list(found)


def common_kinds() -> list[Kind]:
    """Return kinds for any model: fp16, head_dim 64 and 128, causal or not, without a mask or with one of padding."""
    padding = {"token_moments_masked": (False, True, False), "adaptive_attention_masked": (False, True, True, False)}
    found = []
    for head_dim in (64, 128):
        for name in ("plan", "token_moments", "adaptive_attention", *padding):
            variant = VARIANTS[name]
            types = tuple(torch.float16 if len(types) > 1 else types[0] for types in variant.inputs.values())
            flags = (0,) if variant.flag is None else (0, 1)
            found += [Kind(name, types, head_dim, flag, padding.get(name, ())) for flag in flags]
    return found


def _kind(op: str, types: Sequence[torch.dtype], dims: Sequence[Sequence[int]], attributes: Mapping[str, Any]) -> Kind:
    variant = VARIANTS[op]
    for (name, takes), dtype in zip(variant.inputs.items(), types, strict=True):
        if dtype not in takes:
            raise ConfigError(f"{name} of {op} is {dtype}; the plugins take {', '.join(map(str, takes))}")
    head_dim = op_variants.head_dim([width or Symbol("dynamic") for width in dims[0]])
    flag = 0 if variant.flag is None else int(attributes[variant.flag])
    mask = variant.signature.mask
    ones = () if mask is None else tuple(size == 1 for size in dims[variant.signature.place(mask.name)])
    return Kind(op, tuple(types), head_dim, flag, ones)
