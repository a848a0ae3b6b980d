"""Register the ops as Python plugins of TensorRT: a builder embeds their kernels, and the engine needs no Python.

    import adaattn.plugins.python
    adaattn.plugins.python.register()  # then parse the ONNX file and build

TensorRT embeds the kernel that `aot_impl` returns. There is no `impl`, which TensorRT would call at run time: an engine
must run without Python.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from adaattn.errors import ConfigError, TargetError
from adaattn.ops.dispatch import OLDEST_ARCHITECTURE
from adaattn.plugins import NAMESPACE
from adaattn.plugins.op_variants import VARIANTS, Launch, Node, Variant
from adaattn.plugins.ptx import Entry, entry
from adaattn.system import cuda_driver

TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
"""TensorRT's names of types."""
_NAMES = {dtype: name for name, dtype in TYPES.items()}


def register(capability: int | None = None, ptx_version: int | None = None) -> None:
    """Register all ops with `tensorrt.plugin`, under the namespace that exported nodes carry.

    Args:
        capability: architecture that the engine runs on, 90 for sm_90; by default that of the first GPU.
        ptx_version: newest PTX version that the engine's driver accepts, 84 for 8.4; by default that of this driver.

    Raises:
        TargetError: TensorRT is missing or too old for plugins that are compiled ahead, or there is no GPU to ask, or
            one too old for the kernels.
    """
    try:
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise TargetError(f"tensorrt.plugin does not import ({error}): pip install 'adaattn[tensorrt]'") from error
    if not hasattr(trtp, "aot_impl"):
        raise TargetError("this TensorRT is too old for Python plugins that are compiled ahead: upgrade it")
    capability = capability or cuda_driver.capability()
    if capability is None:
        raise TargetError("no GPU to compile the plugins for: the CUDA driver shows none; name its architecture")
    if capability < OLDEST_ARCHITECTURE:
        least, here = OLDEST_ARCHITECTURE / 10, capability / 10
        raise TargetError(f"the plugins need compute capability {least}; this GPU has {here}: take plugins='none'")
    ptx_version = ptx_version or cuda_driver.ptx_version()
    for variant in VARIANTS.values():
        if not hasattr(getattr(trtp.op, NAMESPACE, None), variant.name):
            _register(trtp, variant, capability, ptx_version)


def _register(trtp: Any, variant: Variant, capability: int, ptx_version: int | None) -> None:
    import tensorrt as trt

    name, desc = f"{NAMESPACE}::{variant.name}", trtp.TensorDesc
    arrays = {float: np.typing.NDArray[np.float32], int: np.typing.NDArray[np.int32]}
    attributes = {key: arrays[kind] for key, kind in variant.attributes.items()}
    count, outputs = len(variant.inputs), tuple[(desc,) * len(variant.outputs)]  # type: ignore[misc]

    def tensors(kind: Any) -> dict[str, Any]:
        return dict.fromkeys(variant.inputs, kind)

    def described(*inputs: Any, **_: Any) -> tuple[Any, ...]:
        types = {key: _dtype(variant, key, x.dtype) for key, x in zip(variant.inputs, inputs, strict=True)}
        first = next(iter(types.values()))
        shapes = variant.output_shapes({key: x.shape_expr for key, x in zip(variant.inputs, inputs, strict=True)})
        wanted = (getattr(trt.DataType, _NAMES[dtype or first]) for dtype in variant.outputs.values())
        return tuple(trtp.from_shape_expr(tuple(s), dtype) for s, dtype in zip(shapes, wanted, strict=True))

    def choices(*given: Any) -> list[Any]:
        """Return the types that the network has and the tactics, which TensorRT times."""
        combination = trtp.AutoTuneCombination()
        for place, x in enumerate((*given[:count], *given[-1])):
            combination.pos([place], x.dtype.name)
        combination.tactics(list(variant.tactics))
        return [combination]

    def ahead(*given: Any) -> tuple[str, str, Any, Any]:
        *operands, _, tactic = given
        launch = _launch(variant, operands[:count], operands[count:], capability, tactic)
        kernel = compiled(launch, capability, ptx_version)
        parameters = trtp.KernelLaunchParams(
            grid_x=launch.programs, block_x=kernel.threads, shared_mem=kernel.shared_bytes
        )
        integers = tuple(trtp.SymInt32(size) for size in launch.integers)
        return kernel.name, kernel.ptx, parameters, trtp.SymIntExprs.from_tuple(integers)

    trtp.register(name)(_signed(described, {**tensors(desc), **attributes}, outputs))
    trtp.autotune(name)(_signed(choices, {**tensors(desc), "outputs": outputs}, list[trtp.AutoTuneCombination]))
    returned = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    ahead_takes = {**tensors(desc), **attributes, "outputs": outputs, "tactic": int}
    trtp.aot_impl(name)(_signed(ahead, ahead_takes, returned))


def _signed(function: Callable[..., Any], parameters: Mapping[str, Any], returns: Any) -> Callable[..., Any]:
    """Give a function the signature from the table: TensorRT reads names and types of its arguments."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(named, return_annotation=returns)  # type: ignore[attr-defined]
    return function


def _dtype(variant: Variant, name: str, given: Any) -> torch.dtype:
    dtype = TYPES.get(given.name)
    if dtype not in variant.inputs[name]:
        takes = ", ".join(_NAMES[x] for x in variant.inputs[name])
        raise ConfigError(f"{name} of {variant.name} is {given.name}; the plugin takes {takes}")
    return dtype


def _launch(variant: Variant, inputs: Sequence[Any], attributes: Sequence[Any], capability: int, tactic: int) -> Launch:
    named = dict(zip(variant.inputs, inputs, strict=True))
    values = zip(variant.attributes.items(), attributes, strict=True)
    return variant.launch(
        Node(
            {name: _dtype(variant, name, x.dtype) for name, x in named.items()},
            {name: tuple(x.shape_expr) for name, x in named.items()},
            {name: kind(value[0]) for (name, kind), value in values},
            capability,
            tactic,
        )
    )


_compiled: dict[Any, Entry] = {}


def compiled(launch: Launch, capability: int, ptx_version: int | None) -> Entry:
    """Compile the kernel of a launch, once: a builder asks for it several times."""
    spec = launch.spec
    key = (spec.kernel, *map(_frozen, (spec.arguments, spec.constants, spec.known)), capability, ptx_version)
    if key not in _compiled:
        _compiled[key] = entry(spec, capability, ptx_version)
    return _compiled[key]


def _frozen(x: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(x.items())
