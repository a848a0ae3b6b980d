"""Copy a model for ONNX Runtime's TensorRT provider."""

from __future__ import annotations

from pathlib import Path

from adaattn.errors import ConfigError
from adaattn.plugins import NAMESPACE, onnx_file
from adaattn.system.atomic_file import write


def for_onnxruntime(model: Path) -> Path:
    """Write a copy of a model whose ops ONNX Runtime's TensorRT provider takes for plugins: of domain `trt.plugins`.

    The copy, `<model>.trt.onnx`, lies beside the model, where its external data is, and runs with that provider alone.

    Raises:
        ConfigError: it is not an ONNX file, or has no AdaAttn ops.
    """
    import onnx

    copy = onnx_file.load(model)
    nodes = [node for node in copy.graph.node if node.domain == NAMESPACE]
    if not nodes:
        raise ConfigError(f"{model} has no AdaAttn ops: no node of domain {NAMESPACE!r}")
    for node in nodes:
        node.domain = "trt.plugins"
    others = [function for function in copy.functions if function.domain != NAMESPACE]
    opsets = [opset for opset in copy.opset_import if opset.domain != NAMESPACE]
    for field, kept in ((copy.functions, others), (copy.opset_import, opsets)):
        del field[:]
        field.extend(kept)
    copy.opset_import.append(onnx.helper.make_opsetid("trt.plugins", 1))
    out = model.with_suffix(".trt.onnx")
    write(out, copy.SerializeToString())
    return out
