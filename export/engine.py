"""TensorRT and TensorRT-RTX engines, built and run in a child process: their builders can end the process they are in.

The two packages share one API, so one piece of code serves both. This file is also the child, `python -m
adaattn.export.engine JOB.json`, and long by it: the two halves speak through one job and are read together.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaattn.errors import ConfigError, TargetError
from adaattn.export.folder import write_whole
from adaattn.plugins import NAMESPACE

if TYPE_CHECKING:
    import torch

PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {
    "tensorrt": "pip install 'adaattn[tensorrt]', on a machine with an NVIDIA GPU and its driver",
    "tensorrt-rtx": "pip install 'adaattn[tensorrt-rtx]'",
}
# What TensorRT-RTX 1.7 compiles float32 products for; 7.5 has none ("FP32 GEMM is not supported").
RTX_COMPUTE_CAPABILITIES = ("8.6", "8.9", "12.0")

Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""For each input of the model its least, usual and largest shape."""
PLUGINS = ("python", "native", "none")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built; what is None is left to the builder.

    Args:
        plugins: what computes our ops in a tensorrt engine: "python" embeds the fused kernels (the engine needs nothing
            else), "native" takes them from `plugin_library`, which the engine needs when it runs too, "none" compiles
            the ops' bodies, as tensorrt-rtx always does.
        plugin_library: what `adaattn-plugins build` made.
        compute_capabilities: of tensorrt-rtx, such as "8.9".
        workspace: largest scratch memory of the engine, in MiB.
        optimization_level: 0 (build fast) to 5 (run fast).
        timing_cache: a file that is read where it exists, and written; the next build is faster by it.
        version_compatible: later versions of TensorRT shall run the engine.
        hardware_compatible: GPUs of other architectures, Ampere and newer, shall run it; without plugins.
        weight_streaming: weights may stay in host memory; the runtime decides.
        strip_weights: leave weights out, to be refitted from the ONNX file; `open_runtime` does not do that.

    Raises:
        ConfigError: options that do not go together.
    """

    plugins: str = "python"
    plugin_library: Path | None = None
    compute_capabilities: tuple[str, ...] = RTX_COMPUTE_CAPABILITIES
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False
    strip_weights: bool = False

    def __post_init__(self) -> None:
        if self.plugins not in PLUGINS:
            raise ConfigError(f"plugins is {self.plugins!r}; choose of {', '.join(PLUGINS)}")
        if (self.plugins == "native") != (self.plugin_library is not None):
            raise ConfigError("plugins='native' and a plugin_library go together: adaattn-plugins build model.onnx")
        if self.hardware_compatible and self.plugins != "none":
            raise ConfigError("hardware_compatible needs plugins='none': a plugin's kernels are of one architecture")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise ConfigError(f"optimization_level is {self.optimization_level}; choose 0 to 5")
        if self.workspace is not None and self.workspace < 1:
            raise ConfigError(f"workspace is {self.workspace}; give MiB, 1 or more")


def installed(target: str) -> bool:
    """Whether the package of a TensorRT target is here."""
    return importlib.util.find_spec(PACKAGES[target]) is not None


def engine_from_onnx(
    model: Path,
    target: str,
    engine: Path,
    profiles: Sequence[Profile],
    options: BuildOptions | None = None,
    log: Path | None = None,
    on_progress: Progress = lambda phase, step, steps: None,
) -> dict[str, Any]:
    """Build an engine, its log beside it, and `<engine>.json`, which says what it is.

    Args:
        model: an ONNX file that `adaattn.export` made.
        target: "tensorrt", for the GPU of this machine, or "tensorrt-rtx", ahead of time and without one.
        engine: the file to write; its log takes its place with `.log`.
        profiles: one or more ranges of shapes that the engine serves.
        on_progress: called with the builder's phase, its step and the number of its steps.

    Returns:
        What is in `<engine>.json`: versions, architectures, options, tensors, profiles, and for each of our ops whether
        the engine has a plugin or its compiled body ("unknown" where this machine cannot open the engine).

    Example:
        >>> shapes = {"x": ((1, 1, 64), (1, 128, 64), (8, 512, 64))}
        >>> engine_from_onnx(Path("model.onnx"), "tensorrt-rtx", Path("m.engine"), [shapes])  # doctest: +SKIP

    Raises:
        ConfigError: no such target.
        TargetError: the package is missing, or the builder refused or crashed; the message is its own first error.
    """
    options = options or BuildOptions()
    if target not in PACKAGES:
        raise ConfigError(f"target {target!r} is unknown; choose of {', '.join(PACKAGES)}")
    if not installed(target):
        raise TargetError(f"{PACKAGES[target]} is not installed: {INSTALL[target]}")
    rtx = target == "tensorrt-rtx"
    if rtx and options.timing_cache is not None:
        raise ConfigError("tensorrt-rtx has no timing cache: it times nothing until it runs")
    wanted = asdict(options) | {"plugins": "none" if rtx else options.plugins}
    job = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in wanted.items()},
        "do": "build",
        "package": PACKAGES[target],
        "model": str(model),
        "engine": str(engine),
        "sidecar": str(sidecar(engine)),
        "profiles": [{name: [list(x) for x in shapes] for name, shapes in each.items()} for each in profiles],
        "compute_capabilities": list(options.compute_capabilities) if rtx else [],
    }
    _run_child(job, engine.with_suffix(".job.json"), log or engine.with_suffix(".log"), on_progress)
    built: dict[str, Any] = json.loads(sidecar(engine).read_text())
    return built


def sidecar(engine: Path) -> Path:
    """The file that says what an engine is."""
    return engine.with_name(engine.name + ".json")


def run(target: str, engine: Path, log: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of an engine on the GPU of this machine, by name.

    Raises:
        TargetError: the engine does not load or run.
    """
    import torch

    files = {"inputs": engine.with_suffix(".inputs.pt"), "outputs": engine.with_suffix(".outputs.pt")}
    torch.save(dict(inputs), files["inputs"])
    job = {"do": "run", "package": PACKAGES[target], "engine": str(engine), **{n: str(f) for n, f in files.items()}}
    try:
        _run_child(job, engine.with_suffix(".job.json"), log)
        outputs: dict[str, torch.Tensor] = torch.load(files["outputs"], weights_only=True)
        return outputs
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


def _run_child(
    job: Mapping[str, Any], job_file: Path, log: Path, on_progress: Progress = lambda phase, step, steps: None
) -> None:
    reading, writing = os.pipe()
    job_file.write_text(json.dumps({**job, "progress": writing}))
    try:
        with log.open("wb") as stream, os.fdopen(reading) as progress:
            child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(job_file)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                pass_fds=(writing,),
            )
            os.close(writing)
            try:
                for line in progress:  # until the child has ended
                    on_progress(*json.loads(line))
                code = child.wait()
            finally:  # interrupted: the child must be gone before its folder is
                child.kill()
                child.wait()
    finally:
        job_file.unlink(missing_ok=True)
    if code < 0:
        raise TargetError(f"the process that had to {job['do']} the engine crashed with {signal.Signals(-code).name}")
    if code:
        raise TargetError(_first_error(log.read_text(errors="replace")))


def _first_error(log: str) -> str:
    """The line of a TensorRT log that says what went wrong."""
    # Without a GPU each log starts with complaints about CUDA that are of no consequence.
    lines = [line for line in log.splitlines() if line.strip() and "catchCudaError" not in line]
    errors = [line for line in lines if "[E]" in line]
    return re.sub(r"^.*?\[E\]\s*", "", errors[0]) if errors else (lines or ["the log is empty"])[-1].strip()


def _child(job: Mapping[str, Any]) -> None:
    if job["do"] == "build":
        _child_build(job)
    else:
        _child_run(job)


def _child_build(job: Mapping[str, Any]) -> None:
    trt = importlib.import_module(job["package"])
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
    write_whole(Path(job["engine"]), serialized)
    if cache is not None:
        write_whole(Path(job["timing_cache"]), cache.serialize())
    write_whole(Path(job["sidecar"]), json.dumps(_described(trt, logger, network, serialized, job), indent=1).encode())


def _take_plugins(trt: Any, job: Mapping[str, Any]) -> None:
    if job["plugins"] == "python":
        from adaattn.plugins.tensorrt import register

        register()
    elif job["plugins"] == "native" and trt.get_plugin_registry().load_library(job["plugin_library"]) is None:
        sys.exit(f"[E] TensorRT {trt.__version__} does not load {job['plugin_library']}; was it built for its headers?")


def _network_flags(trt: Any) -> int:
    """Types as the graph has them, which from TensorRT 11 on needs no flag; kernels embedded, not called back."""
    names = ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")
    flags = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in names]
    return sum(1 << int(flag) for flag in flags if flag is not None)


def _configure(trt: Any, builder: Any, config: Any, job: Mapping[str, Any]) -> Any:
    """Set what the job asks for; the timing cache, or None."""

    def known(holder: Any, name: str, option: str) -> Any:
        found = getattr(holder, name, None)
        if found is None:
            sys.exit(f"[E] {job['package']} {trt.__version__} has no {name}: {option} cannot be had")
        return found

    # On by default, and then a float32 head would have errors near 3e-4.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers keep the names of their nodes
    if job["compute_capabilities"]:
        config.num_compute_capabilities = len(job["compute_capabilities"])
        for index, capability in enumerate(job["compute_capabilities"]):
            name = "SM" + capability.replace(".", "")
            if not hasattr(trt.ComputeCapability, name):
                sys.exit(f"[E] compute capability {capability} is unknown to {job['package']} {trt.__version__}")
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
    for option, name in (
        ("version_compatible", "VERSION_COMPATIBLE"),
        ("weight_streaming", "WEIGHT_STREAMING"),
        ("strip_weights", "STRIP_PLAN"),
    ):
        if job[option]:
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
    """Writes the builder's progress into a pipe, a line of JSON for each step."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            said = json.dumps([phase_name, step + 1, self.steps.get(phase_name, 0)])
            os.write(pipe, f"{said}\n".encode())
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _described(trt: Any, logger: Any, network: Any, serialized: Any, job: Mapping[str, Any]) -> dict[str, Any]:
    """The sidecar."""

    def tensor(x: Any) -> dict[str, Any]:
        return {"name": x.name, "type": x.dtype.name, "shape": list(x.shape)}

    options = {name: job[name] for name in BuildOptions.__dataclass_fields__ if name != "compute_capabilities"}
    return {
        "package": job["package"],
        "versions": {job["package"]: trt.__version__, "adaattn": importlib.metadata.version("adaattn")},
        "compute_capabilities": job["compute_capabilities"] or [_capability_here()],
        "options": options,
        "inputs": [tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "profiles": job["profiles"],
        "ops": _ops(trt, logger, serialized, job["model"]),
    }


def _capability_here() -> str:
    from adaattn.plugins.driver import capability

    found = capability()
    return "unknown" if found is None else f"{found // 10}.{found % 10}"


def _ops(trt: Any, logger: Any, serialized: Any, model: str) -> dict[str, str]:
    """For each node of ours "plugin", "body" or "unknown", by the layers that the engine itself lists."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    names = [node.name for node in graph.node if node.domain == NAMESPACE]
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = True  # what a version-compatible engine carries, which was built just now
    opened = runtime.deserialize_cuda_engine(serialized) if names else None
    if opened is None:  # there is no GPU for it here
        return dict.fromkeys(names, "unknown")
    listed = opened.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return which_became_plugins(names, json.loads(listed)["Layers"])


def which_became_plugins(names: Sequence[str], layers: Sequence[Any]) -> dict[str, str]:
    """For each node "plugin" or "body", from the layers of an engine's inspector.

    Example:
        >>> which_became_plugins(["a", "b"], [{"Name": "a", "LayerType": "PluginV3"}, {"Name": "b/MatMul"}])
        {'a': 'plugin', 'b': 'body'}
    """
    plugins = [json.dumps(layer) for layer in layers if "plugin" in str(_field(layer, "LayerType")).lower()]
    return {
        name: "plugin" if any(re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", said) for said in plugins) else "body"
        for name in names
    }


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


def _child_run(job: Mapping[str, Any]) -> None:
    # Polygraphy's switch for the whole process, read when it is imported.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if job["package"] == "tensorrt_rtx" else "0"
    import torch
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    inputs = torch.load(job["inputs"], weights_only=True)
    with TrtRunner(EngineFromBytes(BytesFromPath(job["engine"]))) as runner:
        outputs = runner.infer(inputs)
        torch.save({name: torch.as_tensor(value).clone() for name, value in outputs.items()}, job["outputs"])


if __name__ == "__main__":
    _child(json.loads(Path(sys.argv[1]).read_text()))
