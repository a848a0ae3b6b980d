"""Versions of what a report speaks of, by what is installed; nothing is imported for it."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = (
    *("adaattn", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"),
    *("tensorrt", "tensorrt-rtx-cu13", "transformers"),
)


def versions() -> dict[str, str]:
    """Of Python and of each package that is here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
