"""Load an engine from its file, with the plugins and weights that its `.engine.json` asks for."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaattn.errors import ConfigError, TargetError
from adaattn.export.engines.description import EngineInfo, read_engine_info, sidecar
from adaattn.export.engines.options import INSTALL, PACKAGES, versions_found
from adaattn.system import cuda_driver


@dataclass(frozen=True)
class OpenEngine:
    """An engine that is ready for execution contexts, its description, and the objects that must live as long."""

    engine: Any
    info: EngineInfo
    runtime: Any
    logger: Any


def open_engine(path: Path, plugin_library: Path | None = None) -> OpenEngine:
    """Load an engine with what its options ask for: its plugins, its weights, its share of the GPU's memory.

    An engine is a program: open only engines whose origin you trust.

    Args:
        plugin_library: the library of an engine that was built with plugins="native". The engine's own description is
            not asked where it lies, since loading a library runs its code.

    Raises:
        ConfigError: there is no `.engine.json` beside it, or it is damaged; the engine needs a plugin library and none
            is given, or the other way round.
        TargetError: its package, its GPU or a file that it needs is missing, or the package refuses it.
    """
    info = read_engine_info(path)
    options, target = info.options, info.target
    check_plugin_library(path, info, plugin_library)
    package = PACKAGES[target]
    if importlib.util.find_spec(package) is None:
        raise TargetError(f"{package} is not installed: {INSTALL[target]}")
    built = ", ".join(info.compute_capabilities)
    if not info.runs_on(cuda_driver.capability()):
        raise TargetError(f"{path.name} needs a GPU of compute capability {built} ({versions_found(target)})")
    trt = importlib.import_module(package)
    logger = trt.Logger(trt.Logger.WARNING)
    if plugin_library is not None:
        library = str(plugin_library.absolute())  # a bare name would be looked for in other folders
        if trt.get_plugin_registry().load_library(library) is None:
            raise TargetError(f"TensorRT does not load the plugins {plugin_library} ({versions_found(target)})")
    runtime = trt.Runtime(logger)
    # A version-compatible engine carries code for the host.
    runtime.engine_host_code_allowed = options.version_compatible
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        version = info.versions[package]
        raise TargetError(f"{path.name}, which {version} built, does not open ({versions_found(target)})")
    if options.strip_weights:
        _refit(trt, logger, engine, _weights_of(path, info.model))
    if options.weight_streaming:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return OpenEngine(engine, info, runtime, logger)


def check_plugin_library(path: Path, info: EngineInfo, plugin_library: Path | None) -> None:
    """Raise ConfigError where an engine needs a plugin library that is not given, or uses none."""
    native = info.options.plugins == "native"
    if native and plugin_library is None:
        raise ConfigError(
            f"{path.name} was built with the plugins of {info.options.plugin_library}, and loading a library "
            "runs its code: name the one that you trust with --plugin-library, or open_runtime(..., plugin_library=...)"
        )
    if plugin_library is not None:
        if not native:
            raise ConfigError(f"{path.name} was built without a plugin library; leave out --plugin-library")
        if not plugin_library.is_file():
            raise ConfigError(f"the plugin library {plugin_library} does not exist; adaattn-plugins build makes it")


def _weights_of(path: Path, model: str) -> Path:
    """Return the ONNX file that an engine takes its weights from, which must lie beside it or in a folder below."""
    weights = path.parent / model
    if not weights.resolve().is_relative_to(path.parent.resolve()):
        raise ConfigError(
            f"{path.name} takes its weights from {model}, which is outside its folder; put the ONNX file beside the "
            f"engine and its name into {sidecar(path).name}"
        )
    return weights


def _refit(trt: Any, logger: Any, engine: Any, model: Path) -> None:
    """Put the weights of the ONNX file into an engine that was built without."""
    if not model.is_file():
        raise TargetError(f"the engine was built without weights and takes them from {model}, which is not there")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(model)) or not refitter.refit_cuda_engine():
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise TargetError(f"the engine does not take the weights of {model}: {'; '.join(errors) or 'its log says why'}")
