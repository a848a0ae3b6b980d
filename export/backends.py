"""Runtimes as the parity rule sees them: a golden case in, named outputs and plans out. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaattn.errors import TargetError
from adaattn.export import engine
from adaattn.export.engine_file import check_plugin_library, read_description
from adaattn.export.folder import utf8
from adaattn.export.golden import Array, Golden
from adaattn.export.parity import Backend, Ran
from adaattn.plugins import NAMESPACE, driver

PROVIDERS = {
    "ort-cpu": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
}
BACKENDS = (*PROVIDERS, *engine.PACKAGES)
"""By the names of commands and reports."""


class CannotRun(TargetError):
    """This machine cannot run the artifact: a fact to report, no fault of it."""


def open_backend(name: str, folder: Path, log: Path, plugin_library: Path | None = None) -> Backend:
    """A backend of BACKENDS on the artifacts of an export.

    Args:
        folder: of the export.
        log: of the runs of an engine; it is written only for engines.
        plugin_library: for an engine that was built with plugins="native".

    Raises:
        CannotRun: the artifact or something that it needs is not here.
        TargetError: ONNX Runtime refuses the file.
    """
    if name in PROVIDERS:
        return onnxruntime_backend(folder / "model.onnx", PROVIDERS[name])
    return engine_backend(folder / f"{name}.engine", log, plugin_library)


def onnxruntime_backend(path: Path, provider: str = "CPUExecutionProvider") -> Backend:
    """ONNX Runtime, with nothing of ours installed.

    Outputs come from the file as it is. Plans and heads come from a copy that shows them: its graph has them inside.

    Raises:
        CannotRun: ONNX Runtime has no such provider here, or no kernel of it for a type of the model.
        TargetError: ONNX Runtime refuses the file.
    """
    plain = session_of(path, path.parent, provider)
    names = [output.name for output in plain.get_outputs()]
    layers = planned_layers(path)
    shown = None
    if layers:
        every = showing(path, [name for values in layers.values() for name in values])
        shown = session_of(every, path.parent, provider)

    def call(of: Any, wanted: list[str], golden: Golden) -> dict[str, Array]:
        feed = feed_of(plain, golden.inputs)
        try:
            return {name: wide(x) for name, x in zip(wanted, of.run(wanted, feed), strict=True)}
        except Exception as error:  # as above
            said = str(error).strip().splitlines()[-1]
            raise TargetError(f"ONNX Runtime fails on {golden.name}: {said}") from error

    def backend(golden: Golden) -> Ran:
        outputs = call(plain, names, golden)
        # Heads only where there is something to hold them against: they can be large.
        wanted = {
            name: layers[name] if layer.exact is not None else layers[name][:2]
            for name, layer in golden.layers.items()
            if name in layers
        }
        if not wanted:
            return Ran(outputs, {}, {})
        found = call(shown, list(dict.fromkeys(name for values in wanted.values() for name in values)), golden)
        return Ran(
            outputs,
            {layer: (found[values[0]], found[values[1]]) for layer, values in wanted.items()},
            {layer: found[values[2]] for layer, values in wanted.items() if len(values) > 2},
        )

    return backend


def engine_backend(path: Path, log: Path, plugin_library: Path | None = None) -> Backend:
    """An engine on the GPU of this machine.

    Args:
        log: of the runs.
        plugin_library: for an engine that was built with plugins="native"; others do without.

    Raises:
        CannotRun: there is no engine, or no GPU that it was built for.
        ConfigError: the engine needs a plugin library and none is given, or its description is damaged.
    """
    for file in (path, engine.sidecar(path)):
        if not file.exists():
            raise CannotRun(f"there is no {file.name}")
    about = read_description(path)
    library = plugin_library if about["options"]["plugins"] == "native" else None
    capability = driver.capability()
    if capability is None:
        raise CannotRun("built, not run: a CUDA driver finds no GPU on this machine")
    if str(capability / 10) not in about["compute_capabilities"] and not about["options"]["hardware_compatible"]:
        raise CannotRun(f"built, not run: this GPU has compute capability {capability / 10}")

    check_plugin_library(path, about, library)

    def backend(golden: Golden) -> Ran:
        return Ran(engine.run(about["target"], path, log, golden.inputs, library), {}, {})

    return backend


def planned_layers(path: Path) -> dict[str, tuple[str, str, str]]:
    """For each planned attention of an ONNX file the names of its precision, rank and output."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    ours = [node for node in graph.node if node.domain == NAMESPACE and node.op_type.startswith("adaptive_attention")]
    return {node.name: (node.input[5], node.input[6], node.output[0]) for node in ours}


def session_of(model: Path | bytes, folder: Path, provider: str) -> Any:
    """ONNX Runtime's session of a file, or of a model from memory whose external data are in a folder.

    Raises:
        CannotRun: ONNX Runtime has no such provider here, or no kernel of it for a type of the model.
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
    if provider != "CPUExecutionProvider" and driver.capability() is None:
        raise CannotRun(f"{provider} needs a GPU, and a CUDA driver finds none on this machine")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it logs of an error, in colours, stands in the error too
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", utf8(folder))
    if isinstance(model, Path) and not model.is_file():  # a pipe or a device could be read without an end
        raise TargetError(f"{model} is not a file")
    source = utf8(model) if isinstance(model, Path) else model
    try:
        session = onnxruntime.InferenceSession(source, options, providers=[provider])
    except Exception as error:  # its exceptions have no public base class
        reason = str(error).strip().splitlines()[-1]
        if "NOT_IMPLEMENTED" in reason or "Could not find an implementation" in reason:
            raise CannotRun(f"{provider} cannot run it: {reason.split(' : ')[-1]}") from error
        file = model if isinstance(model, Path) else "the file"
        raise TargetError(f"ONNX Runtime refuses {file}: {reason}") from error
    if provider not in session.get_providers():
        raise CannotRun(f"{provider} does not load here (its libraries of CUDA?), and ONNX Runtime would use the CPU")
    return session


def feed_of(session: Any, values: Mapping[str, Array]) -> dict[str, Array]:
    """What a session takes, of named values.

    Raises:
        TargetError: it takes something else.
    """
    wanted = {x.name: x.type for x in session.get_inputs()}
    unknown = [name for name in wanted if name not in values]
    if unknown:
        raise TargetError(f"model.onnx has an input {unknown[0]!r}, of which the golden results know nothing")
    return {name: as_type(kind, values[name]) for name, kind in wanted.items()}


def showing(path: Path, names: Collection[str]) -> bytes:
    """A model with more outputs, as ONNX Runtime loads it from memory."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    have = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in have)
    content: bytes = model.SerializeToString()
    return content


def as_type(kind: str, x: Array) -> Array:
    """An input in the type that the model takes: golden results hold bfloat16 as float32."""
    if kind == "tensor(bfloat16)":
        import ml_dtypes

        return x.astype(ml_dtypes.bfloat16)
    return x


def wide(x: Array) -> Array:
    """An output as reports compare it."""
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x
