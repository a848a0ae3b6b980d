"""Wrap a TensorRT engine in an ONNX file for ONNX Runtime's TensorRT provider."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from adaattn.export.engines.description import read_engine_info

EPCONTEXT = "model_epcontext.onnx"
COMMAND = f'onnxruntime.InferenceSession("{EPCONTEXT}", providers=["TensorrtExecutionProvider"])'
"""How ONNX Runtime opens the file."""


def ep_context(model: Path, engine: Path) -> Path:
    """Wrap a TensorRT engine in an ONNX file, which ONNX Runtime's TensorRT provider opens without building anything.

    Its one node, `com.microsoft.EPContext`, names the engine; the two files stay in one folder.

    Args:
        model: the ONNX file that the engine was built from; its inputs and outputs are those of the new file.
        engine: in the same folder, with its sidecar.

    Returns:
        The file, `model_epcontext.onnx`.

    Example:
        >>> ep_context(Path("out/model.onnx"), Path("out/tensorrt.engine"))  # doctest: +SKIP
        PosixPath('out/model_epcontext.onnx')
    """
    source, info = onnx.load(model, load_external_data=False), read_engine_info(engine)
    (capability,) = info.compute_capabilities
    node = helper.make_node(
        "EPContext",
        [x.name for x in source.graph.input],
        [x.name for x in source.graph.output],
        name=engine.stem,
        domain="com.microsoft",
        main_context=1,
        embed_mode=0,  # a path relative to this file; one that leaves its folder is refused
        ep_cache_context=engine.name,
        ep_sdk_version=info.versions["tensorrt"],
        hardware_architecture="80+" if info.options.hardware_compatible else capability.replace(".", ""),
        onnx_model_filename=model.name,
        partition_name=engine.stem,
        source="TensorrtExecutionProvider",
    )
    graph = helper.make_graph([node], source.graph.name, source.graph.input, source.graph.output)
    opsets = [x for x in source.opset_import if x.domain == ""] + [helper.make_opsetid("com.microsoft", 1)]
    wrapped = helper.make_model(graph, opset_imports=opsets, ir_version=source.ir_version, producer_name="adaattn")
    onnx.checker.check_model(wrapped)
    out = model.with_name(EPCONTEXT)
    onnx.save(wrapped, out)
    return out
