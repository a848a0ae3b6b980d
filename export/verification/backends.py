"""Run a golden case on a runtime, and return named outputs and plans. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaattn.errors import TargetError, last_line
from adaattn.export.artifacts.arrays import Array
from adaattn.export.artifacts.dtypes import ONNX_TYPES
from adaattn.export.engines import build as engine_build
from adaattn.export.engines import child, description
from adaattn.export.engines import options as engine_options
from adaattn.export.engines.description import EngineInfo, read_engine_info
from adaattn.export.engines.load import check_plugin_library
from adaattn.export.parity.compare import Backend, BackendResult
from adaattn.export.parity.criterion import OPERAND, probe_inputs
from adaattn.export.parity.golden_case import GoldenCase
from adaattn.export.runtime.session import PROVIDERS, CannotRun, feed_of, session_of, wide
from adaattn.export.verification.graph_copies import (
    exact_copy,
    float32_copy,
    forced_input,
    input_alone,
    part,
    planned_layers,
    show_values,
    take_plans,
    value_types,
)
from adaattn.plugins import onnx_file
from adaattn.system import cuda_driver

BACKENDS = (*PROVIDERS, *engine_options.PACKAGES)
"""By the names of commands and reports."""


def open_backend(name: str, folder: Path, log: Path, plugin_library: Path | None = None) -> Backend:
    """Open a backend of BACKENDS on the artifacts of an export.

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
    """Open an ONNX file in ONNX Runtime, without custom ops.

    Outputs come from the file as it is. Plans and heads come from a copy that shows them: its graph has them inside. A
    second copy takes the plans as inputs; a probe runs the nodes that make one plan.

    Raises:
        CannotRun: ONNX Runtime has no such provider here, or its provider has no kernel for a type of the model.
        TargetError: ONNX Runtime refuses the file.
    """
    return OnnxRuntimeBackend(path, provider)


class OnnxRuntimeBackend:
    """See `onnxruntime_backend`."""

    def __init__(self, path: Path, provider: str) -> None:
        self._path, self._provider = path, provider
        self._sessions: dict[str, Any] = {"": self._opened()}
        self._typed = onnx_file.is_typed(onnx_file.load(path))
        self._names = [output.name for output in self._sessions[""].get_outputs()]
        self._layers = planned_layers(path)

    def _opened(self) -> Any:
        try:
            return session_of(self._path, self._path.parent, self._provider)
        except CannotRun:
            if not self._path.is_file() or not onnx_file.is_typed(onnx_file.load(self._path)):
                raise
            # It has no kernels of bfloat16: casts around those of float32 round as they would.
            rounded = float32_copy(self._path, rounds=True).SerializeToString()
            return session_of(rounded, self._path.parent, self._provider)

    def __call__(self, golden: GoldenCase) -> BackendResult:
        """Run a case, with its plans forced where it says so."""
        wanted = [*golden.layers, golden.probes] if golden.forced or golden.probes else []
        unknown = [name for name in wanted if name and name not in self._layers]
        if unknown:
            raise TargetError(f"{self._path.name} has no planned attention {unknown[0]!r}, which the export had")
        if golden.probes:
            return BackendResult(self._attention(golden) if golden.forced else self._plan(golden), {}, {})
        if golden.forced:
            return BackendResult(self.values(golden, self._names), {}, {})
        outputs = self._call(self._sessions[""], self._names, golden.name, golden.inputs)
        layers = {name: self._layers[name] for name in golden.layers if name in self._layers}
        if not layers:
            return BackendResult(outputs, {}, {})
        # Heads only where there is something to hold them against: they can be large.
        shown = [name for layer in layers.values() for name in (layer.precision, layer.rank, layer.predicted) if name]
        held = {name: layer for name, layer in layers.items() if golden.layers[name].exact is not None}
        found = self.values(golden, list(dict.fromkeys([*shown, *(layer.output for layer in held.values())])))
        return BackendResult(
            outputs,
            {name: (found[layer.precision], found[layer.rank]) for name, layer in layers.items()},
            {name: found[layer.output] for name, layer in held.items()},
            {name: found[layer.predicted] for name, layer in layers.items() if layer.predicted},
        )

    def values(self, golden: GoldenCase, names: Sequence[str]) -> dict[str, Array]:
        """Return values inside the graph by their names, with the plans forced where the golden says so.

        Raises:
            TargetError: ONNX Runtime fails.
        """
        key = f"{bool(golden.forced)}: {sorted(names)}"
        if key not in self._sessions:
            unrounded = self._typed and golden.forced
            model = float32_copy(self._path, rounds=False) if unrounded else onnx_file.load(self._path)
            if golden.forced and not self._typed:
                take_plans(model, self._layers)
            show_values(model, names)
            self._keep(key, session_of(model.SerializeToString(), self._path.parent, self._provider))
        plans: dict[str, Array] = {}
        for name, layer in golden.layers.items() if golden.forced else ():
            plans |= {forced_input(name, "precision"): layer.precision, forced_input(name, "rank"): layer.rank}
        return self._call(self._sessions[key], list(names), golden.name, {**golden.inputs, **plans})

    def _plan(self, golden: GoldenCase) -> dict[str, Array]:
        """Run the nodes that make one plan, on given moments."""
        layer = self._layers[golden.probes]
        if layer.plan is None:
            raise TargetError(f"{self._path.name} has no plan for {golden.probes}, which the export had")
        # Inputs of their own: where queries and values are one tensor, so are their moments.
        feed = {input_alone(name): x for name, x in probe_inputs(golden).items()}
        values = {f"{golden.probes}.precision": layer.precision, f"{golden.probes}.rank": layer.rank}
        return self._part(golden.name, layer.plan, feed, values)

    def _attention(self, golden: GoldenCase) -> dict[str, Array]:
        """Run one attention, and the nodes between its operands and it, with the plan that the golden case forces."""
        layer, forced = self._layers[golden.probes], golden.layers[golden.probes]
        feed = {input_alone("precision"): forced.precision, input_alone("rank"): forced.rank}
        for name, x in golden.inputs.items():
            operand = name.removeprefix(OPERAND)
            if operand != name and operand not in layer.operands:
                raise TargetError(f"{golden.probes} of {self._path.name} takes no {operand}, which the export had")
            feed[name if operand == name else layer.operands[operand]] = x
        return self._part(golden.name, layer.output, feed, {f"{golden.probes}.output": layer.output})

    def _part(self, case: str, cut: str, feed: Mapping[str, Array], wanted: Mapping[str, str]) -> dict[str, Array]:
        """Run the nodes between values that are known and others that are wanted.

        Args:
            cut: a value, whose node gets inputs of its own for some of its arguments: those that `input_alone` names.
            feed: the known values.
            wanted: for each label the name of a value.
        """
        names, key = list(wanted.values()), f"{cut}: {sorted(feed)}"
        if key not in self._sessions:
            model = onnx_file.load(self._path)
            (node,) = (node for node in model.graph.node if cut in node.output)
            (function,) = (x for x in model.functions if (x.domain, x.name) == (node.domain, node.op_type))
            for place, argument in enumerate(function.input):
                if input_alone(argument) in feed:
                    node.input[place] = input_alone(argument)
            kinds = value_types(model.graph)
            types = {
                name: (kinds[name][0] if name in kinds else ONNX_TYPES[str(x.dtype)], x.ndim)
                for name, x in feed.items()
            }
            alone = part(model, self._path.parent, names, set(feed), types)
            self._keep(key, session_of(alone.SerializeToString(), self._path.parent, self._provider))
        found = self._call(self._sessions[key], names, case, feed)
        return {label: found[name] for label, name in wanted.items()}

    def _keep(self, key: str, session: Any) -> None:
        """Keep a session beside that of the file itself, and no other: each may hold all weights."""
        self._sessions = {"": self._sessions[""], key: session}

    def _call(self, session: Any, names: list[str], case: str, values: Mapping[str, Array]) -> dict[str, Array]:
        feed = feed_of(session, values)
        try:
            return {name: wide(x) for name, x in zip(names, session.run(names, feed), strict=True)}
        except Exception as error:  # its exceptions have no public base class
            raise TargetError(f"ONNX Runtime fails on {case}: {last_line(error)}") from error


def engine_backend(path: Path, log: Path, plugin_library: Path | None = None) -> EngineBackend:
    """Open an engine on the GPU of this machine.

    Args:
        log: of the runs.
        plugin_library: for an engine that was built with plugins="native"; others do without.

    Raises:
        CannotRun: there is no engine, or no GPU that it was built for.
        ConfigError: the engine needs a plugin library and none is given, or its description is damaged.
    """
    for file in (path, description.sidecar(path)):
        if not file.exists():
            raise CannotRun(f"there is no {file.name}")
    info = read_engine_info(path)
    library = plugin_library if info.options.plugins == "native" else None
    capability = cuda_driver.capability()
    if capability is None:
        raise CannotRun("built, not run: a CUDA driver finds no GPU on this machine")
    if not info.runs_on(capability):
        raise CannotRun(f"built, not run: this GPU has compute capability {capability / 10}")
    check_plugin_library(path, info, library)
    return EngineBackend(path, log, info, library)


class EngineBackend:
    """See `engine_backend`. Forced plans take a second engine, which `build_exact` makes, for fp32 at full rank."""

    def __init__(self, path: Path, log: Path, info: EngineInfo, library: Path | None = None) -> None:
        self._path, self._log, self._info, self._library = path, log, info, library
        self._exact: Path | None = None

    def __call__(self, golden: GoldenCase) -> BackendResult:
        """Run a case, on the engine with exact plans where they are forced."""
        path = self._path if golden.whole else self._exact
        if path is None:
            raise TargetError(f"no engine has plans that are forced to {golden.forced}")
        return BackendResult(child.run_engine(self._info.target, path, self._log, golden.inputs, self._library), {}, {})

    def build_exact(self, scratch: Path) -> None:
        """Build the engine with all plans at fp32 and full rank, as the engine itself was built.

        Raises:
            TargetError: the builder refuses.
        """
        info, built = self._info, scratch / "exact.engine"
        model = exact_copy(self._path.with_name("model.onnx"), scratch / "exact.onnx")
        options = replace(
            info.options,
            plugin_library=self._library,
            timing_cache=None,
            compute_capabilities=tuple(info.compute_capabilities),
        ).taken_by(info.target)
        engine_build.engine_from_onnx(model, info.target, built, info.profiles, options)
        self._exact = built
