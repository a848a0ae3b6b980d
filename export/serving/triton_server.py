"""Write a model repository of Triton Inference Server."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.text_encoding import CEscape

from adaattn.export.engines.description import Profile, read_engine_info
from adaattn.export.engines.options import BuildOptions
from adaattn.input_spec import Dimension


def triton_repository(
    folder: Path, name: str, model: Path, dims: Mapping[str, Dimension], engine: Path | None
) -> list[Path]:
    """Write a model repository of Triton Inference Server: config.pbtxt and version 1 of the model.

    Requests are batched by the server where the first dimension of every input and output is one and the same batch,
    named B… or N…, that may be 1.

    Args:
        folder: the repository; gets a folder `name`.
        model: the ONNX file, for names, types and shapes, and to serve it where there is no engine.
        dims: sizes of the dimensions that the ONNX file names.
        engine: a TensorRT engine, to serve it.

    Returns:
        The files written.
    """
    graph = onnx.load(model, load_external_data=False).graph
    profiles: Sequence[Profile] = [] if engine is None else read_engine_info(engine).profiles
    place = folder / name
    (place / "1").mkdir(parents=True)
    sources = {model.name: model, model.name + ".data": model.with_name(model.name + ".data")}
    if engine is not None:
        sources = {"model.plan": engine}
    files = [_link(source, place / "1" / to) for to, source in sources.items() if source.exists()]
    config = place / "config.pbtxt"
    config.write_text(_config(name, graph, dims, "tensorrt" if engine else "onnxruntime", profiles))
    return [config, *files]


def triton_command(build: BuildOptions) -> str:
    """Return the command that starts the server on the repository, in the folder of the export.

    Example:
        >>> triton_command(BuildOptions())
        'tritonserver --model-repository=triton'
    """
    words = ["tritonserver", "--model-repository=triton"]
    if build.plugin_library is not None:  # the server only opens the library
        library = shlex.quote(str(build.plugin_library))
        words = ["ADAATTN_REGISTER=1", *words, f"--backend-config=tensorrt,plugins={library}"]
    if build.version_compatible:
        words.append("--backend-config=tensorrt,version-compatible=true")
    return " ".join(words)


def _link(source: Path, to: Path) -> Path:
    """Link a file, or copy it where the file system has no hard links."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)
    return to


def _config(name: str, graph: Any, dims: Mapping[str, Dimension], backend: str, profiles: Sequence[Profile]) -> str:
    batches = _batches(graph, dims, profiles)
    most = max((batch.max for batch in batches), default=0)
    lines = [f'name: "{_escape(name)}"', f'backend: "{backend}"', f"max_batch_size: {most}"]
    for kind, tensors in (("input", graph.input), ("output", graph.output)):
        lines += [_tensor(kind, tensor, batched=bool(batches)) for tensor in tensors]
    if batches:
        preferred = ", ".join(map(str, sorted({batch.opt for batch in batches} - {1})))
        lines.append(f"dynamic_batching {{ {f'preferred_batch_size: [ {preferred} ] ' if preferred else ''}}}")
    if len(profiles) > 1:
        numbers = ", ".join(f'"{number}"' for number in range(len(profiles)))
        lines.append(f"instance_group [ {{ kind: KIND_GPU profile: [ {numbers} ] }} ]")
    return "\n".join([*lines, ""])


def _batches(graph: Any, dims: Mapping[str, Dimension], profiles: Sequence[Profile]) -> list[Dimension]:
    """Return the sizes of the batch dimension for each profile; none where requests cannot be batched."""
    shapes = [x.type.tensor_type.shape.dim for x in (*graph.input, *graph.output)]
    first = {shape[0].dim_param if shape else "" for shape in shapes}
    batch = dims.get(first.pop()) if len(first) == 1 else None
    if batch is None or not batch.is_batch:
        return []
    of_inputs = [next(iter(each.values())) for each in profiles]
    batches = [Dimension(batch.name, *(shape[0] for shape in shapes)) for shapes in of_inputs] or [batch]
    return batches if min(each.min for each in batches) == 1 else []


def _tensor(kind: str, tensor: Any, batched: bool) -> str:
    sizes = [dim.dim_value or -1 for dim in tensor.type.tensor_type.shape.dim][1 if batched else 0 :]
    # The server has no tensors without dimensions.
    shape = f"dims: [ {', '.join(map(str, sizes))} ]" if sizes else "dims: [ 1 ] reshape: { shape: [ ] }"
    word = onnx.TensorProto.DataType.Name(tensor.type.tensor_type.elem_type)
    return f'{kind} [ {{ name: "{_escape(tensor.name)}" data_type: TYPE_{_TYPES.get(word, word)} {shape} }} ]'


def _escape(text: str) -> str:
    """Return a string in protobuf's text format, in which a quotation mark in a name would end the field."""
    escaped: str = CEscape(text.encode(errors="surrogateescape"), as_utf8=False)
    return escaped


_TYPES = {"FLOAT": "FP32", "FLOAT16": "FP16", "DOUBLE": "FP64", "BFLOAT16": "BF16"}
"""Triton's names of types, where they differ from ONNX's."""
