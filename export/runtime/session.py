"""Open sessions of ONNX Runtime, and feed them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaattn.errors import TargetError, last_line
from adaattn.export.artifacts.arrays import Array
from adaattn.export.artifacts.files import utf8
from adaattn.system import cuda_driver

PROVIDERS = {
    "ort-cpu": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
}


class CannotRun(TargetError):
    """This machine cannot run the artifact: a fact to report, no fault of it."""


def session_of(model: Path | bytes, folder: Path, provider: str) -> Any:
    """Open an ONNX Runtime session of a file, or of a model in memory with external data in a folder.

    Raises:
        CannotRun: ONNX Runtime has no such provider here, or its provider has no kernel for a type of the model.
        TargetError: ONNX Runtime refuses the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise CannotRun("onnxruntime is not installed: pip install 'adaattn[cpu]' or 'adaattn[gpu]'") from error
    if provider not in onnxruntime.get_available_providers():
        raise CannotRun(
            f"onnxruntime {onnxruntime.__version__} has no {provider} here: pip install onnxruntime-gpu, and CUDA"
        )
    if provider != "CPUExecutionProvider" and cuda_driver.capability() is None:
        raise CannotRun(f"{provider} needs a GPU, and a CUDA driver finds none on this machine")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the error itself has what it would log
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", utf8(folder))
    if isinstance(model, Path) and not model.is_file():  # a pipe or a device could be read without an end
        raise TargetError(f"{model} is not a file")
    source = utf8(model) if isinstance(model, Path) else model
    try:
        session = onnxruntime.InferenceSession(source, options, providers=[provider])
    except Exception as error:  # its exceptions have no public base class
        reason = last_line(error)
        if "NOT_IMPLEMENTED" in reason or "Could not find an implementation" in reason:
            raise CannotRun(f"{provider} cannot run it: {reason.split(' : ')[-1]}") from error
        file = model if isinstance(model, Path) else "the file"
        raise TargetError(f"ONNX Runtime refuses {file}: {reason}") from error
    if provider not in session.get_providers():
        raise CannotRun(f"{provider} does not load here (its libraries of CUDA?), and ONNX Runtime would use the CPU")
    return session


def feed_of(session: Any, values: Mapping[str, Array]) -> dict[str, Array]:
    """Return the values that a session takes, in its types.

    Raises:
        TargetError: it takes something else.
    """
    wanted = {x.name: x.type for x in session.get_inputs()}
    unknown = [name for name in wanted if name not in values]
    if unknown:
        raise TargetError(f"model.onnx has an input {unknown[0]!r}, of which the golden results know nothing")
    return {name: as_type(kind, values[name]) for name, kind in wanted.items()}


def as_type(kind: str, x: Array) -> Array:
    """Return an input in the type that the model takes: golden results hold bfloat16 as float32."""
    if kind == "tensor(bfloat16)":
        import ml_dtypes

        return x.astype(ml_dtypes.bfloat16)
    return x


def wide(x: Array) -> Array:
    """Return an output as reports compare it."""
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x
