"""Open an artifact with the runtime that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaattn.errors import ConfigError
from adaattn.export.engines.options import PACKAGES

if TYPE_CHECKING:
    import torch

    Value = np.ndarray[Any, Any] | torch.Tensor
from adaattn.export.runtime.base import Runtime
from adaattn.export.runtime.engine import EngineRuntime
from adaattn.export.runtime.onnxruntime import OnnxRuntime

DEVICES = ("cpu", "cuda")


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
        raise ConfigError(f"device is {device!r}; choose one of {', '.join(DEVICES)}")
    if path.is_dir():
        if target not in (None, "onnx", *PACKAGES):
            raise ConfigError(f"target {target!r} is unknown; choose one of onnx, {', '.join(PACKAGES)}")
        path /= "model.onnx" if target in (None, "onnx") else f"{target}.engine"
    elif target is not None:
        raise ConfigError(f"target {target!r} chooses an artifact of a folder, and {path} is not a folder")
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give a folder of adaattn-export, an ONNX file or an engine")
    if path.suffix == ".onnx":
        if cuda_graph:
            raise ConfigError("cuda_graph is for engines; ONNX Runtime has its own option")
        if plugin_library is not None:
            raise ConfigError("plugin_library is for engines; an ONNX file is run without it")
        return OnnxRuntime(path, device)
    return EngineRuntime(path, cuda_graph, None if plugin_library is None else Path(plugin_library))
