"""Export a model to verified ONNX and TensorRT artifacts.

`export` loads on first use: the command line must answer before torch has been imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaattn.export.allocation.allocation import Allocation
    from adaattn.export.allocation.apply import allocate
    from adaattn.export.options import Options
    from adaattn.export.pipeline import Result, export

__all__ = ["Allocation", "Options", "Result", "allocate", "export"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'adaattn.export' has no attribute {name!r}")
    from adaattn.export import pipeline
    from adaattn.export.allocation import apply

    return getattr(apply if name == "allocate" else pipeline, name)
