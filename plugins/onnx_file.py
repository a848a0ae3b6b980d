"""Read an ONNX file of a user, or of a folder that may have been changed since its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adaattn.errors import ConfigError

TYPED = "adaattn.types"
"""The key of an ONNX file's metadata that says that its operators have types of a compile-time plan."""


def is_typed(model: Any) -> bool:
    """Return whether the operators of a model have the types of a compile-time plan."""
    return any(entry.key == TYPED for entry in model.metadata_props)


def load(path: Path) -> Any:
    """Return the model of an ONNX file, without its external data.

    Raises:
        ConfigError: there is no such file, or it is not an ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():  # a pipe or a device could be read without an end
        raise ConfigError(f"{path} is not a file; give an ONNX file")
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise ConfigError(f"{path} is no ONNX file, or cut off: {error}") from error
    if not model.graph.node:
        raise ConfigError(f"{path} is no ONNX file, or empty: it has no nodes")
    return model
