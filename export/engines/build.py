"""Build TensorRT and TensorRT-RTX engines in a child process, since a builder can end its process.

The two packages share one API, so one piece of code serves both. This is the side of the caller; `worker` is the child.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from adaattn.errors import ConfigError, TargetError
from adaattn.export.engines.child import Progress, run_child
from adaattn.export.engines.description import EngineInfo, Profile, read_engine_info
from adaattn.export.engines.options import (
    INSTALL,
    PACKAGES,
    RTX_COMPUTE_CAPABILITIES,
    BuildOptions,
    installed,
    versions_found,
)
from adaattn.system import cuda_driver
from adaattn.system.atomic_file import scratch_folder


def engine_from_onnx(
    model: Path,
    target: str,
    engine: Path,
    profiles: Sequence[Profile],
    options: BuildOptions | None = None,
    log: Path | None = None,
    on_progress: Progress = lambda phase, share: None,
) -> EngineInfo:
    """Build an engine, its log beside it, and `<engine>.json`, which says what it is.

    Args:
        model: an ONNX file that `adaattn.export` made.
        target: "tensorrt", for the GPU of this machine, or "tensorrt-rtx", ahead of time and without one.
        engine: the file to write; its log takes its place with `.log`.
        profiles: one or more ranges of shapes that the engine serves.
        on_progress: called with the builder's phase and the share of its work that is done.

    Returns:
        What `<engine>.json` says.

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
        raise ConfigError(f"target {target!r} is unknown; choose one of {', '.join(PACKAGES)}")
    options.check_targets([target])
    if not installed(target):
        raise TargetError(f"{PACKAGES[target]} is not installed: {INSTALL[target]}")
    if target == "tensorrt" and cuda_driver.capability() is None:
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
        run_child(job, scratch, log or engine.with_suffix(".log"), on_progress)
    return read_engine_info(engine)
