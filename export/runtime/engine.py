"""Run an engine of TensorRT or TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaattn.errors import TargetError
from adaattn.export.artifacts.dtypes import dtype_name
from adaattn.export.engines.description import EngineTensor, profile_of
from adaattn.export.engines.load import open_engine

if TYPE_CHECKING:
    import torch

    Value = np.ndarray[Any, Any] | torch.Tensor
from adaattn.export.runtime.base import Runtime, TensorInfo


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
        self.inputs = {x.name: _tensor_info(x) for x in self._opened.info.inputs}
        self.outputs = {x.name: _tensor_info(x) for x in self._opened.info.outputs}

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
        profile = profile_of(self._opened.info.profiles, shapes)
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
        """Replay a CUDA graph of these shapes on copied inputs; the next call overwrites its outputs."""
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
        """Free the engine, its context and its CUDA graphs."""
        self._graphs = None
        del self._context, self._opened


def _tensor_info(x: EngineTensor) -> TensorInfo:
    return TensorInfo(x.name, dtype_name(x.type), tuple(x.shape))
