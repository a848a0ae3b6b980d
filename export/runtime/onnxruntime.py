"""Run an ONNX file in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaattn.errors import ConfigError, TargetError, last_line
from adaattn.export.runtime.session import PROVIDERS, session_of

if TYPE_CHECKING:
    import torch

    Value = np.ndarray[Any, Any] | torch.Tensor
from adaattn.export.artifacts.dtypes import ONNX_TYPES, dtype_name
from adaattn.export.runtime.base import Runtime, TensorInfo


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
                raise TargetError(f"ONNX Runtime does not run it: {last_line(error)}") from error
            return dict(zip(self.outputs, found, strict=True))
        import torch

        binding = self._session.io_binding()
        kept = {name: torch.as_tensor(x).contiguous() for name, x in inputs.items()}
        for name, x in kept.items():
            element = ONNX_TYPES[self.inputs[name].dtype]
            binding.bind_input(name, x.device.type, x.device.index or 0, element, tuple(x.shape), x.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        values = zip(self.outputs, binding.get_outputs(), strict=True)
        return {name: torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()) for name, value in values}

    def _wait(self) -> None:
        pass  # a call of ONNX Runtime returns when it is done

    def close(self) -> None:
        """Free the session."""
        del self._session


def _onnx_info(x: Any) -> TensorInfo:
    if not x.type.startswith("tensor("):
        raise ConfigError(f"{x.name} of the model is a {x.type}; only tensors can be run")
    return TensorInfo(x.name, dtype_name(x.type), tuple(-1 if size is None else size for size in x.shape))
