"""TensorRT and TensorRT-RTX engines, built and run in a child process: their builders can end the process they are in.

The two packages share one API, so one piece of code serves both. This is the side of the caller; `worker` is the child.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from adaattn import children
from adaattn.atomic_file import scratch_folder, write
from adaattn.checks import as_bool, as_choice, as_int, as_path, as_sequence, check_instance, described
from adaattn.errors import ConfigError, TargetError
from adaattn.export.golden import Array, save_arrays
from adaattn.plugins import driver

PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {
    "tensorrt": "pip install 'adaattn[tensorrt]', on a machine with an NVIDIA GPU and its driver",
    "tensorrt-rtx": "pip install 'adaattn[tensorrt-rtx]'",
}
# What TensorRT-RTX 1.7 compiles float32 products for; 7.5 has none ("FP32 GEMM is not supported").
RTX_COMPUTE_CAPABILITIES = ("8.6", "8.9", "12.0")

Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""For each input of the model its least, usual and largest shape."""
MOST_MEBIBYTES = 2**43 - 1  # bytes that TensorRT counts in 64 bits
PLUGINS = ("python", "native", "none")
Progress = Callable[[str, float], None]
"""Called with the builder's phase and the share of the build that is done, 0 to 1."""


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built; what is None is left to the builder.

    Args:
        plugins: what computes our ops in a tensorrt engine: "python", also where it is None, embeds the fused kernels
            (the engine needs nothing else), "native" takes them from `plugin_library`, which the engine needs when it
            runs too, "none" compiles the ops' bodies, as tensorrt-rtx always does.
        plugin_library: what `adaattn-plugins build` made.
        compute_capabilities: of tensorrt-rtx, such as "8.9"; None for RTX_COMPUTE_CAPABILITIES.
        workspace: largest scratch memory of the engine, in MiB.
        optimization_level: 0 (build fast) to 5 (run fast).
        timing_cache: of tensorrt: a file that is read where it exists, and written; the next build is faster by it.
        version_compatible: later versions of the package shall run the engine.
        hardware_compatible: of tensorrt: GPUs of other architectures, Ampere and newer, shall run it; without plugins.
        weight_streaming: weights may stay in host memory where they do not fit the GPU's.
        strip_weights: leave weights out of the engine; `open_runtime` takes them from the ONNX file.

    Raises:
        ConfigError: options that do not go together.
    """

    plugins: str | None = None
    plugin_library: Path | None = None
    compute_capabilities: tuple[str, ...] | None = None
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False
    strip_weights: bool = False

    def __post_init__(self) -> None:
        if self.plugins is not None:
            as_choice("plugins", self.plugins, PLUGINS)
        for name in ("version_compatible", "hardware_compatible", "weight_streaming", "strip_weights"):
            as_bool(name, getattr(self, name))
        for name in ("plugin_library", "timing_cache"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_path(name, given))
        if self.compute_capabilities is not None:
            for capability in as_sequence("compute_capabilities", self.compute_capabilities):
                check_instance("compute_capabilities", capability, str, 'texts such as "8.9"')
        if (self.plugins == "native") != (self.plugin_library is not None):
            raise ConfigError("plugins='native' and plugin_library go together: adaattn-plugins build model.onnx")
        if self.hardware_compatible and self.plugins != "none":
            raise ConfigError("hardware_compatible needs plugins='none': a plugin's kernels are of one architecture")
        level = self.optimization_level
        if level is not None and as_int("optimization_level", level, "0 to 5", least=0) > 5:
            raise ConfigError(f"optimization_level is {described(level)}; choose 0 to 5")
        wanted = f"MiB, 1 to {MOST_MEBIBYTES}"
        if self.workspace is not None and as_int("workspace", self.workspace, wanted) > MOST_MEBIBYTES:
            raise ConfigError(f"workspace is {described(self.workspace)}; give {wanted}")

    def check(self, targets: Collection[str]) -> None:
        """Refuse options that none of the targets takes.

        Raises:
            ConfigError: an option with nothing to act on, or a compute capability that the package does not know.
        """
        for name in self.given():
            takers = TAKEN_BY.get(name, tuple(PACKAGES))
            if not set(takers) & set(targets):
                raise ConfigError(
                    f"{name} has nothing to act on: it is for {' and '.join(takers)}, not for {', '.join(targets)}"
                )
        known = compute_capabilities() if self.compute_capabilities else None
        for each in self.compute_capabilities or ():
            if known is not None and each not in known:
                raise ConfigError(
                    f"compute capability {each!r} is unknown to tensorrt_rtx; choose of {', '.join(known)}"
                )

    def given(self) -> list[str]:
        """Names of the options that are set."""
        return [each.name for each in fields(self) if getattr(self, each.name) not in (None, False)]

    def taken_by(self, target: str) -> BuildOptions:
        """Those that a target takes."""
        taken = [name for name in self.given() if target in TAKEN_BY.get(name, tuple(PACKAGES))]
        return BuildOptions(**{name: getattr(self, name) for name in taken})


TAKEN_BY = {
    **dict.fromkeys(("plugins", "plugin_library", "timing_cache", "hardware_compatible"), ("tensorrt",)),
    "compute_capabilities": ("tensorrt-rtx",),
}
"""Options that only some targets take."""


def installed(target: str) -> bool:
    """Whether the package of a TensorRT target is here."""
    return importlib.util.find_spec(PACKAGES[target]) is not None


def compute_capabilities() -> list[str] | None:
    """Return what the TensorRT-RTX that is installed builds engines for; None where there is none to ask."""
    try:
        trt = importlib.import_module(PACKAGES["tensorrt-rtx"])
        names = list(trt.ComputeCapability.__members__)
    except (ImportError, AttributeError):
        return None
    return [f"{name[2:-1]}.{name[-1]}" for name in names if name.startswith("SM")]


def versions_found(target: str) -> str:
    """What there is to build and run engines with, for error messages.

    Example:
        >>> versions_found("tensorrt-rtx")  # doctest: +SKIP
        'tensorrt_rtx 1.7.1.116, no GPU that a CUDA driver finds'
    """
    package = PACKAGES[target]
    version = "of unknown version" if installed(target) else "not installed"
    for distribution in (package, f"{package}_cu13", f"{package}_cu12"):
        try:
            version = importlib.metadata.version(distribution)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda, capability = driver.cuda_version(), driver.capability()
    if cuda is None or capability is None:
        return f"{package} {version}, no GPU that a CUDA driver finds"
    major, minor = cuda
    return f"{package} {version}, CUDA driver {major}.{minor}, compute capability {capability / 10}"


def engine_from_onnx(
    model: Path,
    target: str,
    engine: Path,
    profiles: Sequence[Profile],
    options: BuildOptions | None = None,
    log: Path | None = None,
    on_progress: Progress = lambda phase, share: None,
) -> dict[str, Any]:
    """Build an engine, its log beside it, and `<engine>.json`, which says what it is.

    Args:
        model: an ONNX file that `adaattn.export` made.
        target: "tensorrt", for the GPU of this machine, or "tensorrt-rtx", ahead of time and without one.
        engine: the file to write; its log takes its place with `.log`.
        profiles: one or more ranges of shapes that the engine serves.
        on_progress: called with the builder's phase and the share of its work that is done.

    Returns:
        What is in `<engine>.json`: versions, architectures, options, tensors, profiles, and for each of our ops whether
        the engine has a plugin or its compiled body ("unknown" where this machine cannot open the engine).

    Example:
        >>> shapes = {"x": ((1, 1, 64), (1, 128, 64), (8, 512, 64))}
        >>> engine_from_onnx(Path("model.onnx"), "tensorrt-rtx", Path("m.engine"), [shapes])  # doctest: +SKIP

    Raises:
        ConfigError: no such target, or an option that it does not take.
        TargetError: the package or the GPU is missing, or the builder refused or crashed; the message is its own first
            error and the versions found.
    """
    options = options or BuildOptions()
    if target not in PACKAGES:
        raise ConfigError(f"target {target!r} is unknown; choose of {', '.join(PACKAGES)}")
    options.check([target])
    if not installed(target):
        raise TargetError(f"{PACKAGES[target]} is not installed: {INSTALL[target]}")
    if target == "tensorrt" and driver.capability() is None:
        found = versions_found(target)
        raise TargetError(f"tensorrt builds an engine on the GPU that runs it, and there is none here ({found})")
    rtx = target == "tensorrt-rtx"
    wanted = asdict(options) | {
        "plugins": "none" if rtx else options.plugins or "python",
        "compute_capabilities": list(options.compute_capabilities or RTX_COMPUTE_CAPABILITIES) if rtx else [],
    }
    job = {
        **{name: str(value.absolute()) if isinstance(value, Path) else value for name, value in wanted.items()},
        "do": "build",
        "target": target,
        "model": str(model.absolute()),
        "engine": str(engine.absolute()),
        "profiles": [{name: [list(x) for x in shapes] for name, shapes in each.items()} for each in profiles],
    }
    with scratch_folder() as scratch:
        _run_child(job, scratch, log or engine.with_suffix(".log"), on_progress)
    from adaattn.export.engine_file import read_description

    return read_description(engine)


def sidecar(engine: Path) -> Path:
    """The file that says what an engine is."""
    return engine.with_name(engine.name + ".json")


def run(
    target: str, engine: Path, log: Path, inputs: Mapping[str, Array], plugin_library: Path | None = None
) -> dict[str, Array]:
    """Outputs of an engine on the GPU of this machine, by name; bfloat16 goes in and comes out as float32.

    Args:
        log: of the run.
        plugin_library: for an engine that was built with plugins="native".

    Raises:
        TargetError: the engine does not load or run.
    """
    with scratch_folder() as scratch:
        files = {"inputs": scratch / "inputs.npz", "outputs": scratch / "outputs.npz"}
        save_arrays(files["inputs"], inputs)
        job: dict[str, Any] = {"do": "run", "target": target, "engine": str(engine.absolute())}
        job |= {"plugin_library": None if plugin_library is None else str(plugin_library.absolute())}
        job |= {name: str(file) for name, file in files.items()}
        _run_child(job, scratch, log)
        with np.load(files["outputs"]) as outputs:
            return dict(outputs)


def _run_child(
    job: Mapping[str, Any], scratch: Path, log: Path, on_progress: Progress = lambda phase, share: None
) -> None:
    reading, writing = os.pipe()
    job_file, said_file = scratch / "job.json", scratch / "log"
    with os.fdopen(reading) as progress, os.fdopen(writing, "wb") as end, said_file.open("wb") as stream:
        job_file.write_text(json.dumps({**job, "progress": writing}))
        command = [*children.python(), "-m", "adaattn.export.worker", str(job_file)]
        with children.child(command, stream, stream, pass_fds=(writing,)) as process:
            end.close()
            for line in progress:  # until the child has ended
                on_progress(*json.loads(line))
            code = process.wait()
    write(log, said_file.read_bytes())
    if code:
        if code < 0:
            said = f"the process that had to {job['do']} the engine crashed with {signal.Signals(-code).name}"
        else:
            said = _first_error(log.read_text(errors="replace"))
        raise TargetError(f"{said} ({versions_found(job['target'])})")


def _first_error(log: str) -> str:
    """The line of a TensorRT log that says what went wrong."""
    # Without a GPU each log starts with complaints about CUDA that are of no consequence.
    lines = [line for line in log.splitlines() if line.strip() and "catchCudaError" not in line]
    errors = [line for line in lines if "[E]" in line]
    return re.sub(r"^.*?\[E\]\s*", "", errors[0]) if errors else (lines or ["the log is empty"])[-1].strip()
