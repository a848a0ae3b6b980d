"""Run as the child process that builds and runs engines: `python -m adaattn.export.engines.worker JOB.json`."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaattn.errors import AdaAttnError, TargetError
from adaattn.export.artifacts.arrays import save_arrays
from adaattn.export.engines.description import EngineInfo, EngineTensor, sidecar
from adaattn.export.engines.options import PACKAGES, BuildOptions
from adaattn.plugins import NAMESPACE
from adaattn.system import cuda_driver
from adaattn.system.atomic_file import write
from adaattn.system.supervisor import end_with_parent


def work(job: Mapping[str, Any]) -> None:
    """Do a job; an error becomes the last line of its log."""
    try:
        if job["do"] == "build":
            _build(job)
        else:
            _run(job)
    except AdaAttnError as error:
        sys.exit(f"[E] {error}")


def _build(job: Mapping[str, Any]) -> None:
    trt = importlib.import_module(PACKAGES[job["target"]])
    logger = trt.Logger(trt.Logger.INFO)
    _take_plugins(trt, job)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["model"]):
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            print(f"[E] node {error.node_name()} ({error.node_operator()}): {error.desc()}")
        sys.exit(1)
    _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    cache = _configure(trt, builder, config, job)
    config.progress_monitor = _monitor(trt, job["progress"])
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        sys.exit(1)
    engine = Path(job["engine"])
    write(engine, serialized)
    if cache is not None:
        write(Path(job["timing_cache"]), cache.serialize())
    write(sidecar(engine), json.dumps(_described(trt, logger, network, serialized, job).as_json(), indent=1).encode())


def _take_plugins(trt: Any, job: Mapping[str, Any]) -> None:
    if job["plugins"] == "python":
        from adaattn.plugins.python import register

        register()
    elif job["plugins"] == "native" and trt.get_plugin_registry().load_library(job["plugin_library"]) is None:
        raise TargetError(
            f"TensorRT does not load {job['plugin_library']}; was it built for the headers of its version?"
        )


def _network_flags(trt: Any) -> int:
    """Return the flags of a strongly typed network (TensorRT 11 needs none) whose Python plugins are compiled ahead."""
    names = ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")
    flags = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in names]
    return sum(1 << int(flag) for flag in flags if flag is not None)


def _configure(trt: Any, builder: Any, config: Any, job: Mapping[str, Any]) -> Any:
    """Set the options of a job; return the timing cache, or None."""

    def known(holder: Any, name: str, option: str) -> Any:
        found = getattr(holder, name, None)
        if found is None:
            raise TargetError(f"this version has no {name}: {option} cannot be had")
        return found

    # On by default, and then a float32 head would have errors near 3e-4.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers keep the names of their nodes
    if job["compute_capabilities"]:
        config.num_compute_capabilities = len(job["compute_capabilities"])
        for index, capability in enumerate(job["compute_capabilities"]):
            name = "SM" + capability.replace(".", "")
            if not hasattr(trt.ComputeCapability, name):
                raise TargetError(f"compute capability {capability} is unknown to {PACKAGES[job['target']]}")
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    for each in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in each.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    if job["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace"] << 20)
    if job["optimization_level"] is not None:
        config.builder_optimization_level = job["optimization_level"]
    for option, names in (
        ("version_compatible", ("VERSION_COMPATIBLE",)),
        ("weight_streaming", ("WEIGHT_STREAMING",)),
        ("strip_weights", ("STRIP_PLAN", "REFIT_IDENTICAL")),
    ):
        if job[option]:
            for name in names:
                config.set_flag(known(trt.BuilderFlag, name, option))
    if job["hardware_compatible"]:
        levels = known(trt, "HardwareCompatibilityLevel", "hardware_compatible")
        config.hardware_compatibility_level = levels.AMPERE_PLUS
    if job["timing_cache"] is None:
        return None
    file = Path(job["timing_cache"])
    cache = known(config, "create_timing_cache", "timing_cache")(file.read_bytes() if file.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _monitor(trt: Any, pipe: int) -> Any:
    """Return a monitor that writes the builder's progress into a pipe: a line of JSON for each step."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, tuple[int, int, str | None]] = {}  # steps done, of how many, of a step of which
            self.most = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (0, num_steps, parent_phase)

        def step_complete(self, phase_name: str, step: int) -> bool:
            _, steps, parent = self.phases.get(phase_name, (0, 1, None))
            self.phases[phase_name] = (step + 1, steps, parent)
            share, at = 0.0, phase_name
            while at in self.phases:
                done, steps, parent = self.phases[at]
                share = min(1.0, (done + share) / max(1, steps))
                at = parent or ""
            self.tell(phase_name, share)
            return True

        def phase_finish(self, phase_name: str) -> None:
            _, _, parent = self.phases.pop(phase_name, (0, 1, ""))
            if parent is None:
                self.tell(phase_name, 1.0)

        def tell(self, phase_name: str, share: float) -> None:
            self.most = max(self.most, share)  # phases side by side take turns
            os.write(pipe, f"{json.dumps([phase_name, self.most])}\n".encode())

    return Monitor()


def _described(trt: Any, logger: Any, network: Any, serialized: Any, job: Mapping[str, Any]) -> EngineInfo:
    """Describe the engine."""

    def tensor(x: Any) -> EngineTensor:
        return EngineTensor(x.name, x.dtype.name, list(x.shape))

    package, here = PACKAGES[job["target"]], cuda_driver.capability()
    options = {name: job[name] for name in BuildOptions.__dataclass_fields__ if name != "compute_capabilities"}
    for name in ("plugin_library", "timing_cache"):  # their names alone: the file is for other machines too
        options[name] = None if options[name] is None else Path(options[name]).name
    return EngineInfo(
        job["target"],
        package,
        {package: trt.__version__, "adaattn": importlib.metadata.version("adaattn")},
        job["compute_capabilities"] or ["unknown" if here is None else str(here / 10)],
        BuildOptions(**options),
        os.path.relpath(job["model"], Path(job["engine"]).parent),
        [tensor(network.get_input(i)) for i in range(network.num_inputs)],
        [tensor(network.get_output(i)) for i in range(network.num_outputs)],
        job["profiles"],
        _ops(trt, logger, serialized, job["model"]),
    )


def _ops(trt: Any, logger: Any, serialized: Any, model: str) -> dict[str, str]:
    """Return what `EngineInfo.ops` holds, by the layers that the engine lists."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    custom, quantized = [node.name for node in graph.node if node.domain == NAMESPACE], quantized_attentions(graph)
    names = [*custom, *quantized]
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = True  # what a version-compatible engine carries, which was built just now
    opened = runtime.deserialize_cuda_engine(serialized) if names else None
    if opened is None:  # there is no GPU for it here
        return dict.fromkeys(names, "unknown")
    listed = opened.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(listed)["Layers"]
    return which_became_plugins(custom, layers) | which_fused(quantized, layers)


def quantized_attentions(graph: Any) -> list[str]:
    """Return the products of quantized softmax weights: for each attention in fp8 the name of its last node."""
    maker = {name: node for node in graph.node for name in node.output}

    def source(name: str) -> str:
        node, quantized = maker.get(name), False
        while node is not None and node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            node, quantized = maker.get(node.input[0]), True
        return node.op_type if node is not None and quantized else ""

    return [node.name for node in graph.node if node.op_type == "MatMul" and source(node.input[0]) == "Softmax"]


def which_fused(names: Sequence[str], layers: Sequence[Any]) -> dict[str, str]:
    """Return for each attention in fp8 "fused", or "half precision", in which TensorRT runs what it does not fuse.

    Example:
        >>> which_fused(["a", "b"], [{"Name": "_gemm_mha_v2", "Metadata": "[ONNX Layer: a]"}, {"Name": "b"}])
        {'a': 'fused', 'b': 'half precision'}
    """
    fused = [said for said in map(json.dumps, layers) if "_gemm_mha" in said]
    return {name: "fused" if _mentioned(name, fused) else "half precision" for name in names}


def which_became_plugins(names: Sequence[str], layers: Sequence[Any]) -> dict[str, str]:
    """Return for each node "plugin" or "body", from the layers of an engine's inspector.

    Example:
        >>> which_became_plugins(["a", "b"], [{"Name": "a", "LayerType": "PluginV3"}, {"Name": "b/MatMul"}])
        {'a': 'plugin', 'b': 'body'}
    """
    plugins = [json.dumps(layer) for layer in layers if "plugin" in str(_field(layer, "LayerType")).lower()]
    return {name: "plugin" if _mentioned(name, plugins) else "body" for name in names}


def _mentioned(name: str, texts: Sequence[str]) -> bool:
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text) for text in texts)


def _field(layer: Any, name: str) -> Any:
    return layer.get(name) if isinstance(layer, dict) else None  # a name alone, of an engine that keeps no details


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let standard Attention nodes that no fused kernel takes (float32, say) be built from simpler ones."""
    attention = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # since 10.14
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if attention is not None and layer.type == attention:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _run(job: Mapping[str, Any]) -> None:
    # Polygraphy's switch for the whole process, read when it is imported.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if job["target"] == "tensorrt-rtx" else "0"
    from polygraphy.backend.trt import TrtRunner

    from adaattn.export.engines.description import profile_of
    from adaattn.export.engines.load import open_engine

    library = job["plugin_library"]
    opened = open_engine(Path(job["engine"]), None if library is None else Path(library))
    types = {x.name: x.type for x in opened.info.inputs}
    with np.load(job["inputs"]) as archive:
        inputs = {name: _as(types[name], archive[name]) for name in archive.files}
    shapes = {name: tuple(x.shape) for name, x in inputs.items()}
    with TrtRunner(opened.engine, optimization_profile=profile_of(opened.info.profiles, shapes)) as runner:
        outputs = runner.infer(inputs)
        save_arrays(Path(job["outputs"]), {name: np.asarray(_wide(x)) for name, x in outputs.items()})


def _as(kind: str, x: Any) -> Any:
    """Return an input in the engine's type; numpy has no bfloat16."""
    if kind != "BF16":
        return x
    import torch

    return torch.from_numpy(x).bfloat16()


def _wide(x: Any) -> Any:
    return x.float() if str(x.dtype) == "torch.bfloat16" else x


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)
    work(json.loads(Path(sys.argv[1]).read_text()))
