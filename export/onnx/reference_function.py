"""Write the ONNX function of an op by running its reference over values of ONNX.

The reference is torch code. Its functions run here with `torch` replaced by a stand-in, on values that record an ONNX
node for each operation, so that the arithmetic has one text. What the references use of torch is here, and no more.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnx import helper

from adaattn.ops.signatures import Signature

_FLOAT, _INT = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
_TYPES = {torch.float32: _FLOAT, torch.int32: onnx.TensorProto.INT32, torch.int64: _INT}


class Recorder:
    """The nodes of a function; an operation of the same operands and attributes is recorded once."""

    def __init__(self) -> None:
        self.nodes: dict[Any, onnx.NodeProto] = {}

    def __call__(self, op: str, *inputs: Value, **attributes: Any) -> Value:
        """Record an operation, and return its value."""
        key = (op, *(x.name for x in inputs), *((name, repr(value)) for name, value in attributes.items()))
        if key not in self.nodes:
            name = f"{op.lower()}_{len(self.nodes)}"
            self.nodes[key] = helper.make_node(op, [x.name for x in inputs], [name], **attributes)
        return Value(self, self.nodes[key].output[0])

    def attribute(self, name: str, default: float | bool) -> Value:
        """Return the value of an attribute of the node that calls the function: float32, or a boolean."""
        node = self.nodes[name] = helper.make_node("Constant", [], [f"{name}_value"])
        proto = helper.make_attribute("value_int" if isinstance(default, bool) else "value_float", default)
        node.attribute.add(name=proto.name, type=proto.type, ref_attr_name=name)
        value = Value(self, node.output[0])
        return self("Cast", value, to=onnx.TensorProto.BOOL) if isinstance(default, bool) else value

    def numbers(self, *values: float) -> Value:
        """Return a constant: integers make a vector, a float makes a scalar."""
        if all(isinstance(x, int) for x in values):
            return Value(self, self("Constant", value_ints=values).name, integer=True)
        return self("Constant", value_float=float(*values))

    def vector(self, sizes: Sequence[Value | int]) -> Value:
        """Return sizes as one vector, a shape."""
        return self("Concat", *(x if isinstance(x, Value) else self.numbers(x) for x in sizes), axis=0)


class Value:
    """A value of an ONNX function with the methods of a tensor. A size is a vector of one integer."""

    device, dtype = None, torch.float32  # of what is computed

    def __init__(self, record: Recorder, name: str, axes: Sequence[Value] = (), integer: bool = False) -> None:
        self.record, self.name, self.axes, self.integer = record, name, axes, integer

    def _operand(self, x: Value | float) -> Value:
        """Return a number as a constant of this value's type, and an integer as a float where this is none."""
        if not isinstance(x, Value):
            return self.record.numbers(int(x) if self.integer else float(x))
        return x

    def _binary(self, op: str, left: Value | float, right: Value | float) -> Value:
        made = self.record(op, self._operand(left), self._operand(right))
        return Value(self.record, made.name, integer=self.integer)

    def __add__(self, x: Value | float) -> Value:
        return self._binary("Add", self, x)

    def __radd__(self, x: float) -> Value:
        return self._binary("Add", x, self)

    def __sub__(self, x: Value | float) -> Value:
        return self._binary("Sub", self, x)

    def __mul__(self, x: Value | float) -> Value:
        return self._binary("Mul", self, x)

    def __rmul__(self, x: float) -> Value:
        return self._binary("Mul", x, self)

    def __truediv__(self, x: Value | float) -> Value:
        return self._binary("Div", self, x)

    def __rtruediv__(self, x: float) -> Value:
        return self._binary("Div", x, self)

    def __neg__(self) -> Value:
        return self.record("Neg", self)

    def __floordiv__(self, x: Value | int) -> Value:
        return self._binary("Div", self, x)

    def __le__(self, x: Value | float) -> Value:
        return self._binary("LessOrEqual", self, x)

    def __ge__(self, x: Value | float) -> Value:
        return self._binary("GreaterOrEqual", self, x)

    def __eq__(self, other: object) -> bool:
        """Return whether two values are known to be the same, as sizes may be."""
        return isinstance(other, Value) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def shape(self) -> _Shape:
        """The sizes."""
        return _Shape(self)

    def __getitem__(self, index: Value) -> Value:
        return self.record("Gather", self, index, axis=0)

    def index_select(self, dim: int, index: Value) -> Value:
        """Return rows along a dimension."""
        return self.record("Gather", self, index, axis=dim)

    def gather(self, dim: int, index: Value) -> Value:
        """Return one number along a dimension for each place of an index."""
        return self.record("GatherElements", self, index, axis=dim)

    def unbind(self, dim: int) -> list[Value]:
        """Return two parts, codes and ranks: they are integers."""
        parts = (self.record("Gather", self, self.record.numbers(i), axis=dim).squeeze(dim) for i in (0, 1))
        return [Value(self.record, part.name, integer=True) for part in parts]

    def unsqueeze(self, dim: int) -> Value:
        """Insert a dimension of size 1."""
        return Value(self.record, self.record("Unsqueeze", self, self.record.numbers(dim)).name, integer=self.integer)

    def squeeze(self, dim: int) -> Value:
        """Remove a dimension of size 1."""
        return self.record("Squeeze", self, self.record.numbers(dim))

    def expand(self, *sizes: Value | int) -> Value:
        """Repeat dimensions of size 1 to sizes."""
        return self.record("Expand", self, self.record.vector(sizes))

    def repeat_interleave(self, repeats: Value, dim: int) -> Value:
        """Repeat each row of dimension 1 of an input of the function."""
        assert dim == 1
        assert len(self.axes) > dim
        before, rows, rest = self.axes[:dim], self.axes[dim], self.axes[dim + 1 :]
        grouped = self.unsqueeze(dim + 1).expand(*before, rows, repeats, *rest)
        return self.record("Reshape", grouped, self.record.vector([*before, rows * repeats, *rest]))

    def new_full(self, shape: Sequence[int], number: Value) -> Value:
        """Return a size as a float32 tensor of a shape of ones."""
        return self.record("Reshape", number.to(torch.float32), self.record.numbers(*shape))

    def to(self, dtype: torch.dtype) -> Value:
        """Cast to a type."""
        return self.record("Cast", self, to=_TYPES[dtype])

    def sum(self, dim: int) -> Value:
        """Sum over a dimension."""
        return self._reduced("ReduceSum", dim)

    def mean(self, dim: int) -> Value:
        """Average over a dimension."""
        return self._reduced("ReduceMean", dim)

    def amax(self, dim: int) -> Value:
        """Return the maximum over a dimension."""
        return self._reduced("ReduceMax", dim)

    def amin(self, dim: int) -> Value:
        """Return the minimum over a dimension."""
        return self._reduced("ReduceMin", dim)

    def _reduced(self, op: str, dim: int) -> Value:
        return self.record(op, self, self.record.numbers(dim), keepdims=0)

    def abs(self) -> Value:
        """Return the magnitudes."""
        return self.record("Abs", self)

    def exp(self) -> Value:
        """Return the exponentials."""
        return self.record("Exp", self)

    def sqrt(self) -> Value:
        """Return the square roots."""
        return self.record("Sqrt", self)

    def square(self) -> Value:
        """Return the squares."""
        return self * self

    def clamp_min(self, least: float) -> Value:
        """Return the numbers, or a least one."""
        return self.record("Max", self, self._operand(least))


class _Shape:
    """The sizes of a value: those of an input that has the axis, else read from the value itself."""

    def __init__(self, value: Value) -> None:
        self._value = value

    def __getitem__(self, dim: int) -> Value:
        if self._value.axes:
            return self._value.axes[dim]
        return _size(self._value, dim)


def _size(value: Value, dim: int) -> Value:
    end = {} if dim == -1 else {"end": dim + 1}
    return Value(value.record, value.record("Shape", value, start=dim, **end).name, integer=True)


class _Torch:
    """What the references take from `torch`."""

    Tensor, inf = torch.Tensor, float("inf")
    float32, int32, promote_types = torch.float32, torch.int32, torch.promote_types

    @staticmethod
    def where(condition: Value, yes: Value, no: Value | float) -> Value:
        made = condition.record("Where", condition, yes, yes._operand(no))
        return Value(condition.record, made.name, integer=yes.integer)

    @staticmethod
    def maximum(first: Value, second: Value) -> Value:
        return first.record("Max", first, second)

    @staticmethod
    def stack(values: Sequence[Value], dim: int) -> Value:
        return values[0].record("Concat", *(x.unsqueeze(dim) for x in values), axis=dim)

    @staticmethod
    def arange(size: Value, device: None) -> Value:
        record = size.record
        zero, one = (record("Constant", value_int=x) for x in (0, 1))
        return Value(record, record("Range", zero, size.squeeze(0), one).name, integer=True)

    @staticmethod
    def full(shape: tuple[int], number: Value, device: None) -> Value:
        return number


def reference_function(
    signature: Signature, reference: Callable[[dict[str, Any]], Sequence[Value]], domain: str, opset: int
) -> onnx.FunctionProto:
    """Return the function of a variant.

    Args:
        reference: calls the reference with arguments by their names, and returns its results in order.
        domain: of the function.
        opset: of the nodes, 18 or newer.
    """
    record = Recorder()
    inputs = {x.name: Value(record, x.name) for x in signature.inputs}
    sizes = {axis: _size(inputs[signature.inputs[at].name], dim) for axis, (at, dim) in signature.sources().items()}
    for argument in signature.inputs:
        if not argument.broadcasts:
            inputs[argument.name].axes = [sizes[axis] for axis in argument.axes]
    attributes = {name: record.attribute(name, default) for name, default in signature.attributes.items()}
    results = reference({**inputs, **attributes})
    names = {value.name: x.name for value, x in zip(results, signature.outputs, strict=True)}
    nodes = _needed(record.nodes.values(), set(names))
    for node in nodes:
        node.input[:] = [names.get(x, x) for x in node.input]
        node.output[:] = [names.get(x, x) for x in node.output]
    return helper.make_function(
        domain, signature.name, list(inputs), list(names.values()), nodes, [helper.make_opsetid("", opset)]
    )


def _needed(nodes: Any, wanted: set[str]) -> list[onnx.NodeProto]:
    """Return the nodes that some values are made from, in order."""
    kept: list[onnx.NodeProto] = []
    for node in reversed(list(nodes)):
        if node.output[0] in wanted:
            kept.insert(0, node)
            wanted |= set(node.input)
    return kept


def over_onnx(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes on values of ONNX: the same code, which finds the stand-in as `torch`."""
    assert isinstance(function, types.FunctionType)
    scope = dict(function.__globals__)
    for name in _names(function.__code__):
        used = scope.get(name)
        if used is torch:
            scope[name] = _Torch
        elif isinstance(used, types.FunctionType) and used.__module__.startswith("adaattn."):
            scope[name] = over_onnx(used)
    return types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)


def _names(code: types.CodeType) -> set[str]:
    """Return the global names in a function and in those inside it."""
    inside = (x for x in code.co_consts if isinstance(x, types.CodeType))
    return set(code.co_names).union(*(_names(x) for x in inside))
