"""TensorRT's part in the life of a Python plugin, played for NVIDIA's own plugin code.

The wheel `tensorrt-cu13-bindings` carries the package `tensorrt.plugin` in Python; what it rests on is a library that
needs a GPU. Here stands what it asks of that library: types, plugin fields, symbols for sizes, a registry. A network is
then built as TensorRT builds it, and a launch resolved from real sizes.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib
import importlib.machinery
import importlib.util
import operator
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

HERE = importlib.util.find_spec("tensorrt_bindings") is not None


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


class TensorFormat(enum.Enum):
    LINEAR = 0


class DimensionOperation(enum.Enum):
    SUM, PROD, MAX, MIN, SUB, EQUAL, LESS, FLOOR_DIV, CEIL_DIV = range(9)


class PluginFieldType(enum.Enum):
    FLOAT16, FLOAT32, FLOAT64, INT8, INT16, INT32, INT64, CHAR, UNKNOWN = range(9)


class QuickPluginCreationRequest(enum.Enum):
    UNKNOWN, PREFER_JIT, PREFER_AOT, STRICT_JIT, STRICT_AOT = range(5)


class TensorRTPhase(enum.Enum):
    BUILD, RUNTIME = range(2)


class PluginArgType(enum.Enum):
    INT = 0


class PluginArgDataType(enum.Enum):
    INT8, INT16, INT32 = range(3)


_OPERATIONS: dict[DimensionOperation, Callable[[int, int], int]] = {
    DimensionOperation.SUM: operator.add,
    DimensionOperation.PROD: operator.mul,
    DimensionOperation.MAX: max,
    DimensionOperation.MIN: min,
    DimensionOperation.SUB: operator.sub,
    DimensionOperation.EQUAL: lambda a, b: int(a == b),
    DimensionOperation.LESS: lambda a, b: int(a < b),
    DimensionOperation.FLOOR_DIV: operator.floordiv,
    DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}


class IDimensionExpr:
    """A size: known, or a formula of named ones."""

    def __init__(self, formula: Callable[[Mapping[str, int]], int], known: int | None = None) -> None:
        self.formula, self._known = formula, known

    def is_constant(self) -> bool:
        return self._known is not None

    def get_constant_value(self) -> int:
        assert self._known is not None, "asked for the value of a size that is not known yet"
        return self._known


class ExprBuilder:
    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(lambda _: value, value)

    def operation(self, operation: DimensionOperation, a: IDimensionExpr, b: IDimensionExpr) -> IDimensionExpr:
        run = _OPERATIONS[operation]
        if a.is_constant() and b.is_constant():
            return self.constant(run(a.get_constant_value(), b.get_constant_value()))
        return IDimensionExpr(lambda sizes: run(a.formula(sizes), b.formula(sizes)))


class PluginField:
    def __init__(self, name: str, data: Any = None, type: PluginFieldType = PluginFieldType.UNKNOWN) -> None:
        self.name, self.data, self.type = name, data, type


class PluginTensorDesc:
    def __init__(self) -> None:
        self.type: DataType | None = None
        self.format, self.scale, self.dims = TensorFormat.LINEAR, 1.0, ()


class DynamicPluginTensorDesc:
    def __init__(self, dtype: DataType, dims: tuple[int, ...]) -> None:
        self.desc = PluginTensorDesc()
        self.desc.type, self.desc.dims = dtype, dims
        self.min = self.max = self.opt = dims


class Dims:
    MAX_DIMS = 8


class DimsExprs(list[Any]):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class ISymExpr:
    pass


class ITensor:
    pass


class Logger:
    WARNING = 2

    def log(self, severity: int, message: str) -> None:
        pass


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators[creator.name, creator.plugin_version, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


def _empty(name: str) -> type:
    return type(name, (), {})


@functools.cache
def load() -> dict[str, Any]:
    """NVIDIA's `tensorrt.plugin`, resting on what is above: the modules by name, for sys.modules while it is wanted."""
    core: Any = types.ModuleType("tensorrt")
    core.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None, is_package=True)
    interfaces = ("IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickRuntime")
    for name in (*interfaces, "IPluginV3QuickAOTBuild", "IPluginCreatorV3Quick"):
        setattr(core, name, _empty(name))
    ours = (
        *(DataType, TensorFormat, DimensionOperation, PluginFieldType, QuickPluginCreationRequest, TensorRTPhase),
        *(PluginArgType, PluginArgDataType, IDimensionExpr, PluginField, PluginTensorDesc, DynamicPluginTensorDesc),
        *(Dims, DimsExprs, ISymExpr, ITensor, Logger),
    )
    for kind in ours:
        setattr(core, kind.__name__, kind)
    core.IExprBuilder, core.PluginFieldCollection, core.int32 = ExprBuilder, list, DataType.INT32
    registry = Registry()
    core.get_plugin_registry = lambda: registry
    spec = importlib.util.find_spec("tensorrt_bindings")
    assert spec is not None
    core.__path__ = spec.submodule_search_locations
    elsewhere = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "tensorrt"}
    sys.modules["tensorrt"] = core
    try:
        core.plugin = importlib.import_module("tensorrt.plugin")
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "tensorrt"}
    finally:
        sys.modules.update(elsewhere)


@dataclass(frozen=True)
class Resolved:
    """What TensorRT would pass to cuLaunchKernel."""

    kernel: str
    ptx: bytes
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    integers: tuple[int, ...]
    output_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Engine:
    """A network of one plugin, built."""

    output_types: Sequence[DataType]
    tactics: Sequence[int]
    resolve: Callable[[Mapping[str, int], int], Resolved]
    """The launch for real sizes, by the names of dynamic ones, and a tactic."""


def build(
    name: str,
    inputs: Mapping[str, tuple[DataType, tuple[int | str, ...]]],
    attributes: Mapping[str, float],
) -> Engine:
    """Build a network of one plugin as TensorRT does; sizes given by name are dynamic."""
    trtp = load()["tensorrt.plugin"]
    builder = ExprBuilder()

    def symbol(size: int | str) -> IDimensionExpr:
        return builder.constant(size) if isinstance(size, int) else IDimensionExpr(lambda sizes: sizes[size])

    definition = getattr(trtp.op.adaattn, name)
    kinds = {float: np.float32, int: np.int32}
    fields = {key: np.array([value], kinds[type(value)]) for key, value in attributes.items()}
    plugin = definition(*(ITensor() for _ in inputs), **fields)(QuickPluginCreationRequest.PREFER_AOT)[2]
    given = [dtype for dtype, _ in inputs.values()]
    shapes = [[symbol(size) for size in shape] for _, shape in inputs.values()]
    output_types = plugin.get_output_data_types(given, [len(shape) for shape in shapes])
    output_shapes = plugin.get_output_shapes(shapes, [], builder)

    def described(sizes: Mapping[str, int]) -> list[DynamicPluginTensorDesc]:
        every = zip([*given, *output_types], [*shapes, *output_shapes], strict=True)
        return [DynamicPluginTensorDesc(dtype, tuple(x.formula(sizes) for x in shape)) for dtype, shape in every]

    usual = {size: 2 for _, shape in inputs.values() for size in shape if isinstance(size, str)}
    in_out = described(usual)
    found = plugin.get_supported_format_combinations(in_out, len(inputs))
    assert [desc.type for desc in found] == [desc.desc.type for desc in in_out]
    plugin.configure_plugin(in_out[: len(inputs)], in_out[len(inputs) :])

    def resolve(sizes: Mapping[str, int], tactic: int) -> Resolved:
        plugin.set_tactic(tactic)
        parameters, integers = types.SimpleNamespace(), _Integers()
        in_out = described(sizes)
        plugin.get_launch_params(shapes, in_out, len(inputs), parameters, integers, builder)
        descs = [x.desc for x in in_out]
        kernel, ptx = plugin.get_kernel(descs[: len(inputs)], descs[len(inputs) :])

        def number(name: str) -> int:
            return int(getattr(parameters, name).expr.formula(sizes))

        assert all(x.dtype is PluginArgDataType.INT32 for x in integers.found.values())
        return Resolved(
            kernel,
            ptx,
            (number("grid_x"), number("grid_y"), number("grid_z")),
            (number("block_x"), number("block_y"), number("block_z")),
            number("shared_mem"),
            tuple(integers.found[i].expr.formula(sizes) for i in range(integers.nbSymExprs)),
            tuple(tuple(x.formula(sizes) for x in shape) for shape in output_shapes),
        )

    return Engine(output_types, plugin.get_valid_tactics(), resolve)


class _Integers:
    def __init__(self) -> None:
        self.nbSymExprs, self.found = 0, dict[int, Any]()

    def __setitem__(self, place: int, expression: Any) -> None:
        self.found[place] = expression


def enqueue(launch: Resolved, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    """Launch on the GPU of torch's current stream, through the CUDA driver."""
    cuda = ctypes.CDLL("libcuda.so.1")

    def checked(code: int) -> None:
        assert code == 0, f"the CUDA driver returned {code}"

    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    checked(cuda.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(launch.ptx)))
    checked(cuda.cuModuleGetFunction(ctypes.byref(function), module, launch.kernel.encode()))
    most_shared = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(cuda.cuFuncSetAttribute(function, most_shared, launch.shared_bytes))
    arguments: list[Any] = [ctypes.c_void_p(x.data_ptr()) for x in inputs]
    arguments += [ctypes.c_int32(x) for x in launch.integers]
    arguments += [ctypes.c_void_p(x.data_ptr()) for x in outputs]
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(x) for x in arguments))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    checked(cuda.cuLaunchKernel(function, *launch.grid, *launch.block, launch.shared_bytes, stream, pointers, None))
    torch.cuda.synchronize()
    checked(cuda.cuModuleUnload(module))
