"""Runtimes as the parity rule sees them: a golden case in, named outputs and plans out. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaattn.errors import TargetError
from adaattn.export import engine
from adaattn.export.engine_file import check_plugin_library, read_description
from adaattn.export.folder import utf8
from adaattn.export.golden import Array, Golden
from adaattn.export.parity import OPERAND, Backend, Ran, probe_inputs
from adaattn.plugins import NAMESPACE, driver, onnx_file

if TYPE_CHECKING:
    import onnx

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

    Outputs come from the file as it is. Plans and heads come from a copy that shows them: its graph has them inside. A
    second copy takes the plans as inputs; a probe runs the nodes that make one plan.

    Raises:
        CannotRun: ONNX Runtime has no such provider here, or no kernel of it for a type of the model.
        TargetError: ONNX Runtime refuses the file.
    """
    return OnnxRuntimeBackend(path, provider)


@dataclass(frozen=True)
class PlannedLayer:
    """Names of a planned attention's values in a graph: its plan, its output, and the error that the plan predicts."""

    operands: Mapping[str, str]  # by the arguments of the op
    precision: str
    rank: str
    output: str
    predicted: str | None
    plan: str | None  # the first output of the node of `plan`; None where no error model made the plan


class OnnxRuntimeBackend:
    """See `onnxruntime_backend`."""

    def __init__(self, path: Path, provider: str) -> None:
        self._path, self._provider = path, provider
        self._sessions: dict[str, Any] = {"": session_of(path, path.parent, provider)}
        self._names = [output.name for output in self._sessions[""].get_outputs()]
        self._layers = planned_layers(path)

    def __call__(self, golden: Golden) -> Ran:
        wanted = [*golden.layers, golden.probes] if golden.forced or golden.probes else []
        unknown = [name for name in wanted if name and name not in self._layers]
        if unknown:
            raise TargetError(f"{self._path.name} has no planned attention {unknown[0]!r}, which the export had")
        if golden.probes:
            return Ran(self._attention(golden) if golden.forced else self._plan(golden), {}, {})
        if golden.forced:
            return Ran(self.values(golden, self._names), {}, {})
        outputs = self._call(self._sessions[""], self._names, golden.name, golden.inputs)
        layers = {name: self._layers[name] for name in golden.layers if name in self._layers}
        if not layers:
            return Ran(outputs, {}, {})
        # Heads only where there is something to hold them against: they can be large.
        shown = [name for layer in layers.values() for name in (layer.precision, layer.rank, layer.predicted) if name]
        held = {name: layer for name, layer in layers.items() if golden.layers[name].exact is not None}
        found = self.values(golden, list(dict.fromkeys([*shown, *(layer.output for layer in held.values())])))
        return Ran(
            outputs,
            {name: (found[layer.precision], found[layer.rank]) for name, layer in layers.items()},
            {name: found[layer.output] for name, layer in held.items()},
            {name: found[layer.predicted] for name, layer in layers.items() if layer.predicted},
        )

    def values(self, golden: Golden, names: Sequence[str]) -> dict[str, Array]:
        """Return values inside the graph by their names, with the plans forced where the golden says so.

        Raises:
            TargetError: ONNX Runtime fails.
        """
        key = f"{bool(golden.forced)}: {sorted(names)}"
        if key not in self._sessions:
            model = onnx_file.load(self._path)
            if golden.forced:
                _take_plans(model, self._layers)
            _show(model, names)
            self._keep(key, session_of(model.SerializeToString(), self._path.parent, self._provider))
        plans: dict[str, Array] = {}
        for name, layer in golden.layers.items() if golden.forced else ():
            plans |= {_forced(name, "precision"): layer.precision, _forced(name, "rank"): layer.rank}
        return self._call(self._sessions[key], list(names), golden.name, {**golden.inputs, **plans})

    def _plan(self, golden: Golden) -> dict[str, Array]:
        """Run the nodes that make one plan, on moments of their own."""
        layer = self._layers[golden.probes]
        if layer.plan is None:
            raise TargetError(f"{self._path.name} has no plan for {golden.probes}, which the export had")
        # Inputs of their own: where queries and values are one tensor, so are their moments.
        feed = {_alone(name): x for name, x in probe_inputs(golden).items()}
        values = {f"{golden.probes}.precision": layer.precision, f"{golden.probes}.rank": layer.rank}
        return self._part(golden.name, layer.plan, feed, values)

    def _attention(self, golden: Golden) -> dict[str, Array]:
        """Run one attention and what it makes of its operands, with its plan as the golden forces it."""
        layer, forced = self._layers[golden.probes], golden.layers[golden.probes]
        feed = {_alone("precision"): forced.precision, _alone("rank"): forced.rank}
        for name, x in golden.inputs.items():
            operand = name.removeprefix(OPERAND)
            if operand != name and operand not in layer.operands:
                raise TargetError(f"{golden.probes} of {self._path.name} takes no {operand}, which the export had")
            feed[name if operand == name else layer.operands[operand]] = x
        return self._part(golden.name, layer.output, feed, {f"{golden.probes}.output": layer.output})

    def _part(self, case: str, cut: str, feed: Mapping[str, Array], wanted: Mapping[str, str]) -> dict[str, Array]:
        """Run the nodes between values that are known and others that are wanted.

        Args:
            cut: a value, whose node gets inputs of its own for some of its arguments: those that `_alone` names.
            feed: the known values.
            wanted: for each label the name of a value.
        """
        names, key = list(wanted.values()), f"{cut}: {sorted(feed)}"
        if key not in self._sessions:
            model = onnx_file.load(self._path)
            (node,) = (node for node in model.graph.node if cut in node.output)
            (function,) = (x for x in model.functions if (x.domain, x.name) == (node.domain, node.op_type))
            for place, argument in enumerate(function.input):
                if _alone(argument) in feed:
                    node.input[place] = _alone(argument)
            kinds = value_types(model.graph)
            types = {
                name: (kinds[name][0] if name in kinds else element_type(str(x.dtype)), x.ndim)
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
            said = str(error).strip().splitlines()[-1]
            raise TargetError(f"ONNX Runtime fails on {case}: {said}") from error


def engine_backend(path: Path, log: Path, plugin_library: Path | None = None) -> EngineBackend:
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
    return EngineBackend(path, log, about, library)


class EngineBackend:
    """See `engine_backend`. Forced plans take a second engine, which `build_exact` makes, for fp32 at full rank."""

    def __init__(self, path: Path, log: Path, about: Mapping[str, Any], library: Path | None = None) -> None:
        self._path, self._log, self._about, self._library = path, log, about, library
        self._exact: Path | None = None

    def __call__(self, golden: Golden) -> Ran:
        path = self._path if golden.whole else self._exact
        if path is None:
            raise TargetError(f"no engine has plans that are forced to {golden.forced}")
        return Ran(engine.run(self._about["target"], path, self._log, golden.inputs, self._library), {}, {})

    def build_exact(self, scratch: Path) -> None:
        """Build the engine with all plans at fp32 and full rank, as the engine itself was built.

        Raises:
            TargetError: the builder refuses.
        """
        built, options = scratch / "exact.engine", dict(self._about["options"])
        options |= {"plugin_library": self._library, "timing_cache": None}
        model = exact_copy(self._path.with_name("model.onnx"), scratch / "exact.onnx")
        names = set(engine.BuildOptions(**options).taken_by(self._about["target"]).given())
        chosen = {name: value for name, value in options.items() if name in names}
        if self._about["target"] == "tensorrt-rtx":
            chosen["compute_capabilities"] = tuple(self._about["compute_capabilities"])
        engine.engine_from_onnx(
            model, self._about["target"], built, self._about["profiles"], engine.BuildOptions(**chosen)
        )
        self._exact = built


def exact_copy(path: Path, copy: Path) -> Path:
    """Write a copy of an ONNX file whose plans are all fp32 at full rank, whatever its plan nodes choose.

    Args:
        copy: the file to write, in another folder; external data are linked there.
    """
    import onnx
    from onnx import helper, numpy_helper

    model, layers = onnx_file.load(path), planned_layers(path)
    made: list[onnx.NodeProto] = []
    for number, node in enumerate([x for x in model.graph.node if x.domain == NAMESPACE and x.name in layers]):
        layer, at = layers[node.name], f"exact/{number}"
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int32), f"{at}/code"))
        made += [
            helper.make_node("Shape", [layer.precision], [f"{at}/shape"]),
            helper.make_node("Shape", [layer.operands["query"]], [f"{at}/head_dim"], start=3, end=4),
            helper.make_node("Cast", [f"{at}/head_dim"], [f"{at}/full"], to=onnx.TensorProto.INT32),
            helper.make_node("Expand", [f"{at}/code", f"{at}/shape"], [f"{at}/precision"]),
            helper.make_node("Expand", [f"{at}/full", f"{at}/shape"], [f"{at}/rank"]),
        ]
        new = {layer.precision: f"{at}/precision", layer.rank: f"{at}/rank"}
        for place, name in enumerate(node.input):
            node.input[place] = new.get(name, name)
        place = list(model.graph.node).index(node)
        for each in reversed(made):
            model.graph.node.insert(place, each)
        made.clear()
    copy.write_bytes(model.SerializeToString())
    data = path.with_name(path.name + ".data")
    if data.exists():
        (copy.parent / data.name).symlink_to(data.resolve())
    return copy


def planned_layers(path: Path) -> dict[str, PlannedLayer]:
    """Return the planned attentions of an ONNX file by the names of their nodes."""
    model = onnx_file.load(path)
    functions = {function.name: function for function in model.functions if function.domain == NAMESPACE}
    maker = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        if node.domain != NAMESPACE or not node.op_type.startswith("adaptive_attention"):
            continue
        named = dict(zip(functions[node.op_type].input, node.input, strict=False))
        above = ancestors(maker, named["precision"])
        plan = next((x for x in above if x.domain == NAMESPACE and x.op_type == "plan"), None)
        predicted, made = None, None
        if plan is not None:
            results = dict(zip(functions[plan.op_type].output, plan.output, strict=False))
            predicted, made = results.get("predicted_error") or None, plan.output[0]
        found[node.name] = PlannedLayer(named, named["precision"], named["rank"], node.output[0], predicted, made)
    return found


def ancestors(maker: Mapping[str, Any], value: str) -> Iterator[Any]:
    """Yield the nodes that a value is made by, the nearest first."""
    todo, seen = [value], set[int]()
    while todo:
        node = maker.get(todo.pop(0))
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            yield node
            todo += node.input


def part(
    whole: onnx.ModelProto,
    folder: Path,
    values: Sequence[str],
    known: Collection[str],
    types: Mapping[str, tuple[int, int]] | None = None,
) -> onnx.ModelProto:
    """Return the nodes that make values from known ones as a model of their own, whose inputs those are.

    Args:
        folder: of the external data.
        known: names of values that the model takes as inputs.
        types: element types of values, and their numbers of axes, which the file itself may not say.
    """
    import onnx
    from onnx import external_data_helper, helper

    graph = whole.graph
    maker = {name: node for node in graph.node for name in node.output}
    places = {id(node): place for place, node in enumerate(graph.node)}
    nodes, ends, todo = dict[int, Any](), set[str](), list(values)
    while todo:
        value = todo.pop()
        node = maker.get(value)
        if node is None or places[id(node)] in nodes:
            continue
        nodes[places[id(node)]] = node
        ends |= {name for name in node.input if name in known}
        todo += [name for name in node.input if name not in known]
    chosen = [nodes[place] for place in sorted(nodes)]
    used = {name for node in chosen for name in node.input}
    weights = [x for x in graph.initializer if x.name in used]
    for weight in weights:
        if external_data_helper.uses_external_data(weight):
            external_data_helper.load_external_data_for_tensor(weight, str(folder))
            del weight.external_data[:]
            weight.data_location = onnx.TensorProto.DEFAULT
    known_types = value_types(graph) | dict(types or {})
    taken = sorted(ends - {x.name for x in weights} | {x.name for x in graph.input if x.name in used})

    def info(name: str) -> onnx.ValueInfoProto:
        if name not in known_types:
            return onnx.ValueInfoProto(name=name)
        kind, rank = known_types[name]
        return helper.make_tensor_value_info(name, kind, [None] * rank)  # sizes are left out: a probe has other ones

    inputs, outputs = ([info(name) for name in names] for names in (taken, values))
    made = helper.make_graph(chosen, "part", inputs, outputs, weights)
    return helper.make_model(
        made, opset_imports=whole.opset_import, functions=whole.functions, ir_version=whole.ir_version
    )


def value_types(graph: onnx.GraphProto) -> dict[str, tuple[int, int]]:
    """Return the element type and the number of axes of each value that a graph says them of."""
    kinds = {x.name: x.type.tensor_type for x in (*graph.value_info, *graph.input, *graph.output)}
    return {name: (kind.elem_type, len(kind.shape.dim)) for name, kind in kinds.items()}


def element_type(dtype: str) -> int:
    """Return the number that ONNX has for a type of numpy, or for "bfloat16".

    Example:
        >>> element_type("float32"), element_type("bfloat16")
        (1, 16)
    """
    import onnx

    names = {"float32": "FLOAT", "float64": "DOUBLE"}
    return int(onnx.TensorProto.DataType.Value(names.get(dtype, dtype.upper())))


def _alone(argument: str) -> str:
    """The name of an input that a node gets for itself."""
    return f"alone/{argument}"


def _forced(layer: str, what: str) -> str:
    return f"forced/{layer}/{what}"


def _take_plans(model: onnx.ModelProto, layers: Mapping[str, PlannedLayer]) -> None:
    """Make the plan of each planned attention an input of the graph."""
    from onnx import TensorProto, helper

    for node in model.graph.node:
        if node.domain == NAMESPACE and node.name in layers:
            layer = layers[node.name]
            new = {layer.precision: _forced(node.name, "precision"), layer.rank: _forced(node.name, "rank")}
            for place, name in enumerate(node.input):
                node.input[place] = new.get(name, name)
            model.graph.input.extend(
                helper.make_tensor_value_info(name, TensorProto.INT32, None) for name in new.values()
            )


def _show(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Make values of a graph its outputs too."""
    import onnx

    have = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in have)


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


def as_type(kind: str, x: Array) -> Array:
    """An input in the type that the model takes: golden results hold bfloat16 as float32."""
    if kind == "tensor(bfloat16)":
        import ml_dtypes

        return x.astype(ml_dtypes.bfloat16)
    return x


def wide(x: Array) -> Array:
    """An output as reports compare it."""
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x
