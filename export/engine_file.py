"""An engine from its file: what its `.engine.json` says, what it is loaded with, which profile takes a shape."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaattn.errors import ConfigError, TargetError
from adaattn.export.engine import INSTALL, sidecar, versions_found
from adaattn.export.folder import read_json
from adaattn.plugins import driver


@dataclass(frozen=True)
class OpenEngine:
    """An engine that is ready for execution contexts, what its `.engine.json` says, and what must live as long."""

    engine: Any
    about: Mapping[str, Any]
    runtime: Any
    logger: Any


def open_engine(path: Path) -> OpenEngine:
    """Load an engine with what its options ask for: its plugins, its weights, its share of the GPU's memory.

    Raises:
        ConfigError: there is no `.engine.json` beside it.
        TargetError: its package, its GPU or a file that it needs is missing, or the package refuses it.
    """
    about = _about(path)
    options, target = about["options"], about["target"]
    if importlib.util.find_spec(about["package"]) is None:
        raise TargetError(f"{about['package']} is not installed: {INSTALL[target]}")
    here = driver.capability()
    built = ", ".join(about["compute_capabilities"])
    fits = here is not None and (str(here / 10) in about["compute_capabilities"] or options["hardware_compatible"])
    if not fits:
        raise TargetError(f"{path.name} needs a GPU of compute capability {built} ({versions_found(target)})")
    trt = importlib.import_module(about["package"])
    logger = trt.Logger(trt.Logger.WARNING)
    library = options["plugin_library"]
    if library is not None and trt.get_plugin_registry().load_library(library) is None:
        raise TargetError(f"TensorRT does not load the plugins {library} ({versions_found(target)})")
    runtime = trt.Runtime(logger)
    # A version-compatible engine carries code for the host: open only engines whose origin you trust.
    runtime.engine_host_code_allowed = options["version_compatible"]
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        version = about["versions"][about["package"]]
        raise TargetError(f"{path.name}, which {version} built, does not open ({versions_found(target)})")
    if options["strip_weights"]:
        _refit(trt, logger, engine, path.parent / about["model"])
    if options["weight_streaming"]:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return OpenEngine(engine, about, runtime, logger)


def _refit(trt: Any, logger: Any, engine: Any, model: Path) -> None:
    """Put the weights of the ONNX file into an engine that was built without."""
    if not model.is_file():
        raise TargetError(f"the engine was built without weights and takes them from {model}, which is not there")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(model)) or not refitter.refit_cuda_engine():
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise TargetError(f"the engine does not take the weights of {model}: {'; '.join(errors) or 'its log says why'}")


def profile_of(profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]], shapes: Mapping[str, Sequence[int]]) -> int:
    """The first profile that all shapes lie in.

    Example:
        >>> profile_of([{"x": [[1, 8], [1, 8], [1, 8]]}, {"x": [[1, 8], [4, 8], [9, 8]]}], {"x": (3, 8)})
        1

    Raises:
        ConfigError: none of them.
    """

    def within(profile: Mapping[str, Sequence[Sequence[int]]]) -> bool:
        return all(
            low <= size <= high
            for name, shape in shapes.items()
            for low, size, high in zip(profile[name][0], shape, profile[name][2], strict=True)
        )

    for place, profile in enumerate(profiles):
        if within(profile):
            return place
    ranges = "; or ".join(
        ", ".join(f"{name} {tuple(sizes[0])} to {tuple(sizes[2])}" for name, sizes in each.items()) for each in profiles
    )
    given = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    raise ConfigError(f"the engine has no profile for {given}; it takes {ranges}")


def _about(path: Path) -> dict[str, Any]:
    file = sidecar(path)
    if not file.exists():
        raise ConfigError(f"{path.name} has no {file.name} beside it, which says what it is")
    return read_json(file)
