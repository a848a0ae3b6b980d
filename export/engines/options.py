"""Define the options of engine builds, and find what is installed to build engines."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

from adaattn.checks import as_bool, as_choice, as_int, as_path, as_sequence, check_instance, described
from adaattn.errors import ConfigError
from adaattn.system import cuda_driver

PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {
    "tensorrt": "pip install 'adaattn[tensorrt]', on a machine with an NVIDIA GPU and its driver",
    "tensorrt-rtx": "pip install 'adaattn[tensorrt-rtx]'",
}
# What TensorRT-RTX 1.7 compiles float32 products for; 7.5 has none ("FP32 GEMM is not supported").
RTX_COMPUTE_CAPABILITIES = ("8.6", "8.9", "12.0")
MOST_MEBIBYTES = 2**43 - 1  # bytes that TensorRT counts in 64 bits
PLUGINS = ("python", "native", "none")


@dataclass(frozen=True)
class BuildOptions:
    """Options of the engine builder; None leaves one to the builder.

    Args:
        plugins: what computes the custom ops in a tensorrt engine. "python", the default, embeds the fused kernels, and
            the engine needs nothing else; "native" takes them from `plugin_library`, which is loaded at run time too;
            "none" compiles the ops' ONNX functions, as tensorrt-rtx always does.
        plugin_library: the library that `adaattn-plugins build` made.
        compute_capabilities: of tensorrt-rtx, such as "8.9"; None for RTX_COMPUTE_CAPABILITIES.
        workspace: largest scratch memory of the engine, in MiB.
        optimization_level: 0 (build fast) to 5 (run fast).
        timing_cache: TensorRT's timing cache, a file: read if present, then updated; it makes the next build faster.
        version_compatible: build a version-compatible engine.
        hardware_compatible: build a tensorrt engine for all GPUs from Ampere on; needs plugins="none".
        weight_streaming: stream weights from host memory where they do not fit the GPU's memory.
        strip_weights: build an engine without weights; `open_runtime` takes them from the ONNX file.

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

    def check_targets(self, targets: Collection[str]) -> None:
        """Refuse options that none of the targets takes.

        Raises:
            ConfigError: an option that applies to none of the targets, or an unknown compute capability.
        """
        for name in self.given():
            takers = TAKEN_BY.get(name, tuple(PACKAGES))
            if not set(takers) & set(targets):
                raise ConfigError(
                    f"{name} applies only to targets {', '.join(takers)}; selected targets: {', '.join(targets)}"
                )
        known = compute_capabilities() if self.compute_capabilities else None
        for each in self.compute_capabilities or ():
            if known is not None and each not in known:
                raise ConfigError(
                    f"compute capability {each!r} is unknown to tensorrt_rtx; choose one of {', '.join(known)}"
                )

    def given(self) -> list[str]:
        """Return the names of the options that are set."""
        return [each.name for each in fields(self) if getattr(self, each.name) not in (None, False)]

    def taken_by(self, target: str) -> BuildOptions:
        """Return the options that a target takes."""
        taken = [name for name in self.given() if target in TAKEN_BY.get(name, tuple(PACKAGES))]
        return BuildOptions(**{name: getattr(self, name) for name in taken})


TAKEN_BY = {
    **dict.fromkeys(("plugins", "plugin_library", "timing_cache", "hardware_compatible"), ("tensorrt",)),
    "compute_capabilities": ("tensorrt-rtx",),
}
"""Options that only some targets take."""


def installed(target: str) -> bool:
    """Return whether the package of a TensorRT target is installed."""
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
    """Return the versions of what builds and runs engines here, for error messages.

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
    cuda, capability = cuda_driver.cuda_version(), cuda_driver.capability()
    if cuda is None or capability is None:
        return f"{package} {version}, no GPU that a CUDA driver finds"
    major, minor = cuda
    return f"{package} {version}, CUDA driver {major}.{minor}, compute capability {capability / 10}"
