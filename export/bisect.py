"""Find the node where ONNX Runtime departs from eager PyTorch: by the names of values, with no model and no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import external_data_helper, helper

from adaattn.errors import TargetError
from adaattn.export import backends, golden, parity, trace
from adaattn.export.golden import Array, Output
from adaattn.export.verify import as_exported
from adaattn.plugins import onnx_file


@dataclass(frozen=True)
class Departure:
    """Where a graph departs.

    Args:
        value: the first that does and takes an output with it.
        error: relative, against eager PyTorch in the model's type.
        limit: what it might have been: the largest limit of an output of the export, and a few floors of its type.
        nodes: lines about the nodes that make the value from others that agree.
        model: these nodes as a model.
    """

    value: str
    error: float
    limit: float
    nodes: list[str]
    model: onnx.ModelProto


def bisect(folder: Path, provider: str = "CPUExecutionProvider") -> Departure | None:
    """The first value of `model.onnx` that departs from eager PyTorch's on a small case; None where no output does.

    Values that only cancel, whose relative error is large and of no consequence, are passed over: a value counts when
    a path of values that all depart leads from it to an output.

    Raises:
        ConfigError: the folder does not have the trace of eager PyTorch that was exported, or no ONNX file.
        TargetError: ONNX Runtime refuses the file or fails, or the file lacks an output.
    """
    path = folder / "model.onnx"
    values = trace.load(as_exported(folder, "trace.npz"))
    outputs = [item for case in golden.load(as_exported(folder, "golden.npz")) for item in case.outputs.items()]
    limit = _limit([output for _, output in outputs], values)
    graph = onnx_file.load(path).graph
    missing = {name for name, _ in outputs} - {output.name for output in graph.output}
    if missing:
        raise TargetError(f"{path} has no output {sorted(missing)[0]!r}, which the export had")
    names = [name for node in graph.node for name in node.output if name in values]
    found = dict(zip(names, _run(path, provider, names, graph, values), strict=True))
    errors = {name: _error(found[name], values[name], limit) for name in names}
    departed = {name for name, error in errors.items() if not error <= (limit if values[name].dtype.kind == "f" else 0)}
    first = _first(graph, departed, set(names))
    if first is None:
        return None
    nodes, known = _between(graph, first, set(values))
    return Departure(first, errors[first], limit, _lines(nodes, errors), _model(path, nodes, known, first, values))


def _limit(outputs: Collection[Output], values: Mapping[str, Array]) -> float:
    """For floating-point values; integers must be the same."""
    floors = [parity.FLOOR[name] for x in values.values() if (name := str(x.dtype)) in parity.FLOOR]
    floors += [parity.FLOOR[output.dtype] for output in outputs if output.dtype in parity.FLOOR]
    limits = [output.limit for output in outputs if output.limit <= parity.USELESS]
    return max([*(4 * floor for floor in floors), *limits])


def _run(path: Path, provider: str, names: list[str], graph: Any, values: Mapping[str, Array]) -> list[Array]:
    session = backends.session_of(backends.showing(path, names), path.parent, provider)
    feed = backends.feed_of(session, values)
    try:
        return [backends.wide(x) for x in session.run(names, feed)]
    except Exception as error:  # its exceptions have no public base class
        raise TargetError(f"ONNX Runtime does not run {path}: {str(error).strip().splitlines()[-1]}") from error


def _error(got: Array, want: Array, limit: float) -> float:
    """As the rule sees it: fill values stand for themselves."""
    if got.shape != want.shape:
        return np.inf
    if not np.issubdtype(want.dtype, np.floating):
        return float((got != want).mean()) if want.size else 0.0
    wide = want.astype(np.float64)
    usable, filled = parity.judged(wide, np.isnan(wide))
    if not np.isfinite(got[usable]).all() or not parity.stands(got[filled], wide[filled], limit).all():
        return np.inf
    return parity.relative_error(np.abs(got[usable] - wide[usable]), wide[usable])


def _first(graph: Any, departed: Collection[str], known: Collection[str]) -> str | None:
    """The first of the values that departed from which others that did lead to an output."""
    guilty = {output.name for output in graph.output} & set(departed)
    first = None
    for node in reversed(graph.node):
        # A value that eager has no name for passes on what comes of it.
        if any(name in guilty and (name in departed or name not in known) for name in node.output):
            guilty.update(node.input)
            first = next((name for name in node.output if name in departed), first)
    return first


def _between(graph: Any, value: str, known: Collection[str]) -> tuple[list[Any], set[str]]:
    """The nodes that make a value from known ones, in order, and these."""
    maker = {name: node for node in graph.node for name in node.output}
    places = {id(node): place for place, node in enumerate(graph.node)}
    nodes, ends, todo = {}, set(), [value]
    while todo:
        node = maker[todo.pop()]
        nodes[places[id(node)]] = node
        for name in node.input:
            if name in known and name != value:
                ends.add(name)
            elif name in maker and places[id(maker[name])] not in nodes:
                todo.append(name)
    return [nodes[place] for place in sorted(nodes)], ends


def _lines(nodes: list[Any], errors: Mapping[str, float]) -> list[str]:
    def said(name: str) -> str:
        return f"{name} (error {errors[name]:.1e})" if name in errors else name

    return [
        f"{node.op_type} {node.name}: {', '.join(map(said, node.input))} → {', '.join(map(said, node.output))}"
        for node in nodes
    ]


def _model(path: Path, nodes: list[Any], known: set[str], value: str, values: Mapping[str, Array]) -> onnx.ModelProto:
    """The nodes as a model of their own; what they read of eager's values are its inputs."""
    whole = onnx.load(path, load_external_data=False)
    used = {name for node in nodes for name in node.input}
    weights = [x for x in whole.graph.initializer if x.name in used]
    for weight in weights:
        if external_data_helper.uses_external_data(weight):
            external_data_helper.load_external_data_for_tensor(weight, str(path.parent))
            del weight.external_data[:]
            weight.data_location = onnx.TensorProto.DEFAULT
    graph = whole.graph
    infos = {x.name: x for x in (*graph.value_info, *graph.input, *graph.output)}

    def info(name: str) -> onnx.ValueInfoProto:
        if name in infos:
            return infos[name]
        return helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(values[name].dtype), values[name].shape
        )

    inputs = [info(name) for name in sorted(known - {x.name for x in weights})]
    part = helper.make_graph(nodes, "departure", inputs, [info(value)], weights)
    return helper.make_model(
        part, opset_imports=whole.opset_import, functions=whole.functions, ir_version=whole.ir_version
    )
