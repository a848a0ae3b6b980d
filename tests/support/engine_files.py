"""What stands beside an engine in its `.engine.json`, for tests that build none."""

from __future__ import annotations

from typing import Any

from adaattn.export.engines import options as engine_options


def described(target: str = "tensorrt", **changes: object) -> dict[str, Any]:
    """Return a whole description."""
    return {
        "target": target,
        "package": engine_options.PACKAGES[target],
        "versions": {engine_options.PACKAGES[target]: "10.14"},
        "compute_capabilities": ["9.0"],
        "options": {
            name: None for name in engine_options.BuildOptions.__dataclass_fields__ if name != "compute_capabilities"
        },
        "model": "model.onnx",
        "inputs": [{"name": "x", "type": "FLOAT", "shape": [-1, 8]}],
        "outputs": [{"name": "y", "type": "FLOAT", "shape": [-1, 8]}],
        "profiles": [{"x": [[1, 8], [4, 8], [9, 8]]}],
        "ops": {},
        **changes,
    }
