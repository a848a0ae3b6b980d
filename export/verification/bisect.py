"""Find the node where ONNX Runtime departs from eager PyTorch, by the names of values, without model and torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from adaattn.errors import TargetError
from adaattn.export.artifacts.dtypes import ONNX_TYPES
from adaattn.export.artifacts.manifest import as_exported
from adaattn.export.parity import compare, criterion, golden_case
from adaattn.export.parity.golden_case import GoldenCase
from adaattn.export.verification import backends, graph_copies
from adaattn.export.verification.verify import compare_inside
from adaattn.plugins import NAMESPACE, onnx_file


@dataclass(frozen=True)
class Departure:
    """Where a graph departs.

    Args:
        value: the first that does and takes an output with it.
        error: relative, against float64.
        limit: what it might have been, by the parity rule for this value.
        plans: the plans at which it departs, such as "fp32"; empty for those that the model makes.
        nodes: lines about the nodes that make the value from others that agree.
        model: these nodes as a model.
    """

    value: str
    error: float
    limit: float
    plans: str
    nodes: list[str]
    model: onnx.ModelProto


def bisect(folder: Path, provider: str = "CPUExecutionProvider") -> Departure | None:
    """Return the first value of `model.onnx` that departs from eager PyTorch's; None where no output does.

    A small case is run with all plans forced to fp32, where limits are sharp, then with the plans that the model makes.
    Where it agrees, the plan nodes are looked at, and the attentions at the plans that the golden results force. Values
    that only cancel, whose relative error is large and of no consequence, are passed over: a value counts when a path
    of values that all depart leads from it to an output.

    Raises:
        ConfigError: the folder does not have the trace of eager PyTorch that was exported, or no ONNX file.
        TargetError: ONNX Runtime refuses the file or fails, or the file lacks an output.
    """
    path = folder / "model.onnx"
    traces = golden_case.load(as_exported(folder, "trace.npz"), "trace of eager PyTorch")
    goldens = golden_case.load(as_exported(folder, "golden.npz"))
    graph = onnx_file.load(path).graph
    missing = {name for case in goldens if case.whole for name in case.outputs} - {x.name for x in graph.output}
    if missing:
        raise TargetError(f"{path} has no output {sorted(missing)[0]!r}, which the export had")
    backend = backends.OnnxRuntimeBackend(path, provider)
    for trace in traces:
        found = _departure(path, backend, graph, trace)
        if found is not None:
            return found
    return _by_layer(path, backend, goldens, traces[0])


def _departure(path: Path, backend: backends.OnnxRuntimeBackend, graph: Any, trace: GoldenCase) -> Departure | None:
    rows = compare_inside(path, backend, trace)
    departed = {name for name, row in rows.items() if row["verdict"] == "failed"}
    first = _first(graph, departed, set(rows))
    if first is None:
        return None
    return _described(path, first, set(trace.outputs) | set(trace.inputs), rows, trace.forced, _types(trace))


def _types(trace: GoldenCase) -> dict[str, tuple[int, int]]:
    return {name: (ONNX_TYPES[x.dtype], x.exact.ndim) for name, x in trace.outputs.items()}


def _by_layer(
    path: Path, backend: backends.OnnxRuntimeBackend, goldens: Sequence[GoldenCase], trace: GoldenCase
) -> Departure | None:
    """Return the first plan, or attention at a plan that is forced, that departs by itself."""
    layers, known = graph_copies.planned_layers(path), set(trace.outputs) | set(trace.inputs)
    # Where outputs depart though nothing is rounded, plans differ for what they read: they are not the cause.
    sound = {
        case.case for case in goldens if case.forced == criterion.EXACT and not case.probes and _agrees(backend, case)
    }
    for case in goldens:
        differences = compare.plan_differences(case, backend(case)) if case.whole and case.case in sound else []
        if differences:
            value = layers[differences[0][0]].precision
            row = {"error": None, "limit": None, "verdict": "failed"}
            return _described(path, value, known, {value: row}, "", _types(trace))
    for case in goldens:
        ran = backend(case) if case.probes else None
        for name, output in case.outputs.items() if ran is not None else ():
            row = compare.compare_output(case, name, output, ran.outputs[name]) if ran is not None else {}
            if row["verdict"] == "failed":
                value = getattr(layers[case.probes], name.rpartition(".")[2])
                return _described(path, value, known, {value: row}, case.forced, _types(trace))
    return None


def _agrees(backend: backends.OnnxRuntimeBackend, case: GoldenCase) -> bool:
    outputs = backend(case).outputs
    rows = (compare.compare_output(case, name, output, outputs.get(name)) for name, output in case.outputs.items())
    return all(row["verdict"] != "failed" for row in rows)


def _described(
    path: Path,
    value: str,
    known: set[str],
    rows: Mapping[str, Mapping[str, Any]],
    plans: str,
    types: Mapping[str, tuple[int, int]] | None = None,
) -> Departure:
    model = graph_copies.part(onnx_file.load(path), path.parent, [value], known - {value}, types)
    errors = {name: _error(row) for name, row in rows.items()}
    limit = rows[value]["limit"]
    return Departure(
        value, errors[value], 0.0 if limit is None else limit, plans, _lines(model.graph.node, errors), model
    )


def _error(row: Mapping[str, Any]) -> float:
    """Return the error of a value; infinite where it fails without a number, as whole numbers and shapes do."""
    error = row["error"]
    failed = row.get("verdict") == "failed"
    if error is None or (failed and row["limit"] is not None and error <= row["limit"]):
        return float("inf") if failed else 0.0
    return float(error)


def _first(graph: Any, departed: Collection[str], known: Collection[str]) -> str | None:
    """Return the first departing value from which departing values lead to an output or to the inputs of a plan."""
    plans = [name for node in graph.node if node.domain == NAMESPACE and node.op_type == "plan" for name in node.input]
    guilty = {*(output.name for output in graph.output), *plans} & set(departed)
    first = None
    for node in reversed(graph.node):
        # A value that eager has no name for passes on to its readers.
        if any(name in guilty and (name in departed or name not in known) for name in node.output):
            guilty.update(node.input)
            first = next((name for name in node.output if name in departed), first)
    return first


def _lines(nodes: Sequence[Any], errors: Mapping[str, float]) -> list[str]:
    def shown(name: str) -> str:
        return f"{name} (error {errors[name]:.1e})" if name in errors else name

    return [
        f"{node.op_type} {node.name}: {', '.join(map(shown, node.input))} → {', '.join(map(shown, node.output))}"
        for node in nodes
    ]
