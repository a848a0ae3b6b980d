"""Write an ONNX model and check it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from adaattn.errors import ExportError, first_line
from adaattn.export.artifacts.files import utf8
from adaattn.export.onnx.inline_weights import inline_weights
from adaattn.export.onnx.lower import innermost_cause

EXTERNAL_ABOVE = 1 << 30  # bytes of weights in all: protobuf files end at 2 GiB
SMALL_TENSOR = 1 << 10  # bytes: what is smaller stays in the file
SHAPE = 64  # bytes of a tensor that may be a shape or axes, which shape inference reads from the file alone


def save(model: ir.Model, path: Path, external_above: int | None = None) -> list[Path]:
    """Write the model and check it; weights go to one external file where they are more than protobuf bears.

    Args:
        path: of the ONNX file; the external file is beside it and ends in `.data`.
        external_above: every tensor of more bytes goes to the external file, whatever the total; not those of SHAPE
            bytes or fewer.

    Returns:
        The files written.

    Raises:
        ExportError: `onnx.checker` (full_check) refuses the model.
    """
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data = path.with_suffix(path.suffix + ".data")
    threshold = SMALL_TENSOR if external_above is None else max(external_above, SHAPE)
    ir.save(model, path, external_data=data.name, size_threshold_bytes=threshold)
    try:
        onnx.checker.check_model(utf8(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses {path.name}: {first_line(innermost_cause(error))}") from error
    if external_above is None and weights <= EXTERNAL_ABOVE and data.exists():
        inline_weights(path, data)
    return [file for file in (path, data) if file.exists()]
