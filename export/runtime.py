"""Run what an export made, in ONNX Runtime, TensorRT or TensorRT-RTX, with one interface.

    with open_runtime("model-export") as model:
        outputs = model(query=q, key=k, value=v)

Arrays of numpy give arrays; tensors of torch give tensors on their device, and on CUDA nothing is copied. It imports
neither models nor the exporter, and torch only where tensors or engines ask for it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from adaattn.errors import ConfigError, TargetError
from adaattn.export.backends import PROVIDERS, session_of
from adaattn.export.engine import PACKAGES
from adaattn.export.engine_file import open_engine, profile_of

if TYPE_CHECKING:
    import torch

    Value = np.ndarray[Any, Any] | torch.Tensor

Self = TypeVar("Self", bound="Runtime")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class TensorInfo:
    """An input or output.

    Args:
        dtype: in numpy's words, or "bfloat16", which numpy has no word for.
        shape: sizes; a name or -1 for one that is not fixed.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Timing:
    """How long calls took, in milliseconds, after a warm-up."""

    median: float
    p99: float
    calls: int


class Runtime(ABC):
    """A model that is ready to run; a context manager, which frees it."""

    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]

    def __call__(self, **inputs: Value) -> dict[str, Any]:
        """Outputs by name.

        Raises:
            ConfigError: inputs that the model does not have, or of other types or shapes.
        """
        self._check(inputs)
        return self._run(inputs)

    def measure(self, calls: int = 100, warmup: int = 10, **inputs: Value) -> Timing:
        """Time calls, each to its end.

        Example:
            >>> model.measure(x=x).median  # doctest: +SKIP
            0.82
        """
        if calls < 1:
            raise ConfigError(f"calls is {calls}; give 1 or more")
        self._check(inputs)
        taken = []
        for number in range(warmup + calls):
            start = time.perf_counter()
            self._run(inputs)
            self._wait()
            if number >= warmup:
                taken.append(1e3 * (time.perf_counter() - start))
        return Timing(float(np.median(taken)), float(np.quantile(taken, 0.99)), calls)

    @abstractmethod
    def _run(self, inputs: Mapping[str, Value]) -> dict[str, Any]: ...

    @abstractmethod
    def _wait(self) -> None:
        """Until the device has done what it was given."""

    @abstractmethod
    def close(self) -> None:
        """Free the model."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, inputs: Mapping[str, Value]) -> None:
        takes = "; the model takes " + ", ".join(map(str, self.inputs.values()))
        for name in inputs:
            if name not in self.inputs:
                raise ConfigError(f"there is no input {name!r}{takes}")
        for name, info in self.inputs.items():
            if name not in inputs:
                raise ConfigError(f"the input {name!r} is missing{takes}")
            dtype, shape = _dtype(inputs[name]), tuple(inputs[name].shape)
            fits = len(shape) == len(info.shape) and all(
                want == got or isinstance(want, str) or want < 0 for want, got in zip(info.shape, shape, strict=True)
            )
            if dtype != info.dtype or not fits:
                raise ConfigError(f"{name} is {dtype}({', '.join(map(str, shape))}); expected {info}")


def open_runtime(
    path: str | Path,
    target: str | None = None,
    *,
    device: str = "cpu",
    cuda_graph: bool = False,
    plugin_library: str | Path | None = None,
) -> Runtime:
    """Open an artifact.

    Args:
        path: a folder that `adaattn-export` made, an ONNX file, or an engine with its `.engine.json` beside it.
        target: in a folder, what to open: "onnx", "tensorrt" or "tensorrt-rtx". [default: onnx]
        device: where ONNX Runtime computes, "cpu" or "cuda"; engines run on the GPU.
        cuda_graph: of engines: record the launches once for each set of shapes and replay them.
        plugin_library: the library of an engine that was built with plugins="native"; loading it runs its code.

    Raises:
        ConfigError: no such file, target or device.
        TargetError: the runtime is missing or refuses the file, or there is no GPU that an engine was built for.
    """
    path = Path(path)
    if device not in DEVICES:
        raise ConfigError(f"device is {device!r}; choose of {', '.join(DEVICES)}")
    if path.is_dir():
        if target not in (None, "onnx", *PACKAGES):
            raise ConfigError(f"target {target!r} is unknown; choose of onnx, {', '.join(PACKAGES)}")
        path /= "model.onnx" if target in (None, "onnx") else f"{target}.engine"
    elif target is not None:
        raise ConfigError(f"target {target!r} chooses an artifact of a folder, and {path} is not a folder")
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give a folder of adaattn-export, an ONNX file or an engine")
    if path.suffix == ".onnx":
        if cuda_graph:
            raise ConfigError("cuda_graph is for engines; ONNX Runtime has an option of its own")
        if plugin_library is not None:
            raise ConfigError("plugin_library is for engines; an ONNX file is run without it")
        return OnnxRuntime(path, device)
    return EngineRuntime(path, cuda_graph, None if plugin_library is None else Path(plugin_library))


class OnnxRuntime(Runtime):
    """ONNX Runtime's session of a file."""

    def __init__(self, path: Path, device: str) -> None:
        self._device = device
        backend = "ort-tensorrt" if path.name.endswith("epcontext.onnx") else f"ort-{device}"
        self._session = session_of(path, path.parent, PROVIDERS[backend])
        self.inputs = {x.name: _onnx_info(x) for x in self._session.get_inputs()}
        self.outputs = {x.name: _onnx_info(x) for x in self._session.get_outputs()}

    def _run(self, inputs: Mapping[str, Value]) -> dict[str, Any]:
        if all(isinstance(x, np.ndarray) for x in inputs.values()):
            try:
                found = self._session.run(list(self.outputs), dict(inputs))
            except Exception as error:  # its exceptions have no public base class
                raise TargetError(f"ONNX Runtime does not run it: {str(error).strip().splitlines()[-1]}") from error
            return dict(zip(self.outputs, found, strict=True))
        import torch

        binding = self._session.io_binding()
        kept = {name: torch.as_tensor(x).contiguous() for name, x in inputs.items()}
        for name, x in kept.items():
            element = _ONNX_TYPES[self.inputs[name].dtype]
            binding.bind_input(name, x.device.type, x.device.index or 0, element, tuple(x.shape), x.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        values = zip(self.outputs, binding.get_outputs(), strict=True)
        return {name: torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()) for name, value in values}

    def _wait(self) -> None:
        pass  # a call of ONNX Runtime returns when it is done

    def close(self) -> None:
        del self._session


class EngineRuntime(Runtime):
    """An engine of TensorRT or TensorRT-RTX, with torch's memory and stream."""

    def __init__(self, path: Path, cuda_graph: bool, plugin_library: Path | None = None) -> None:
        self._opened = open_engine(path, plugin_library)
        import torch

        if not torch.cuda.is_available():
            raise TargetError(f"{path.name} runs with torch's memory, and torch {torch.__version__} sees no GPU")
        self._torch = torch
        self._context = self._opened.engine.create_execution_context()
        self._graphs: dict[Any, Any] | None = {} if cuda_graph else None
        self._profile = 0
        self.inputs = {x["name"]: _engine_info(x) for x in self._opened.about["inputs"]}
        self.outputs = {x["name"]: _engine_info(x) for x in self._opened.about["outputs"]}

    def _run(self, inputs: Mapping[str, Value]) -> dict[str, Any]:
        torch = self._torch
        given = {name: torch.as_tensor(x, device="cuda").contiguous() for name, x in inputs.items()}
        if self._graphs is None:
            outputs = self._prepare(given)
            self._enqueue()
        else:
            outputs = self._replay(self._graphs, given)
        if all(isinstance(x, np.ndarray) for x in inputs.values()):
            return {name: x.cpu().numpy() for name, x in outputs.items()}
        return outputs

    def _prepare(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Give the engine shapes and addresses; the outputs that it will write."""
        torch = self._torch
        shapes = {name: tuple(x.shape) for name, x in given.items()}
        profile = profile_of(self._opened.about["profiles"], shapes)
        if profile != self._profile:
            stream = torch.cuda.current_stream()
            self._context.set_optimization_profile_async(profile, stream.cuda_stream)
            stream.synchronize()
            self._profile = profile
        for name, x in given.items():
            self._context.set_input_shape(name, shapes[name])
            self._context.set_tensor_address(name, x.data_ptr())
        outputs = {}
        for name, info in self.outputs.items():
            shape = tuple(self._context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=getattr(torch, info.dtype), device="cuda")
            self._context.set_tensor_address(name, outputs[name].data_ptr())
        return outputs

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._torch.cuda.current_stream().cuda_stream):
            raise TargetError("the engine did not run; its runtime has logged why")

    def _replay(self, graphs: dict[Any, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Copies into the inputs of a graph of these shapes; its outputs are overwritten by the next call."""
        torch = self._torch
        key = tuple(tuple(x.shape) for x in given.values())
        if key not in graphs:
            inputs = {name: x.clone() for name, x in given.items()}
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                outputs = self._prepare(inputs)
                self._enqueue()  # once outside: the first call of a shape may allocate
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                self._enqueue()
            graphs[key] = (graph, inputs, outputs)
        graph, inputs, outputs = graphs[key]
        for name, x in given.items():
            inputs[name].copy_(x)
        graph.replay()
        return dict(outputs)

    def _wait(self) -> None:
        self._torch.cuda.synchronize()

    def close(self) -> None:
        self._graphs = None
        del self._context, self._opened


_ONNX_TYPES = {
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
"""Numbers of onnx.TensorProto.DataType."""
_WORDS = {"float": "float32", "double": "float64", "half": "float16", "bf16": "bfloat16"}


def _onnx_info(x: Any) -> TensorInfo:
    if not x.type.startswith("tensor("):
        raise ConfigError(f"{x.name} of the model is a {x.type}; only tensors can be run")
    word = x.type.removeprefix("tensor(").removesuffix(")")
    return TensorInfo(x.name, _WORDS.get(word, word), tuple(-1 if size is None else size for size in x.shape))


def _engine_info(x: Mapping[str, Any]) -> TensorInfo:
    word = x["type"].lower()
    return TensorInfo(x["name"], _WORDS.get(word, word), tuple(x["shape"]))


def _dtype(x: Value) -> str:
    return str(x.dtype).removeprefix("torch.")
