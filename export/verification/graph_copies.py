"""Copy an ONNX graph so that its inner values can be seen, its plans forced, or a part of it run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaattn.plugins import NAMESPACE, onnx_file

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class PlannedLayer:
    """Names of a planned attention's values in a graph: its plan, its output, and the error that the plan predicts."""

    operands: Mapping[str, str]  # by the arguments of the op
    precision: str
    rank: str
    output: str
    predicted: str | None
    plan: str | None  # the first output of the node of `plan`; None where no error model made the plan


def exact_copy(path: Path, copy: Path) -> Path:
    """Write a copy of an ONNX file whose plans are all fp32 at full rank, whatever its plan nodes choose.

    Of a file with the types of a compile-time plan, all types are fp32.

    Args:
        copy: the file to write, in another folder; external data are linked there.
    """
    model = onnx_file.load(path)
    if onnx_file.is_typed(model):
        copy.write_bytes(float32_copy(path, rounds=False).SerializeToString())
        return copy
    _set_plans_aside(model, planned_layers(path))
    copy.write_bytes(model.SerializeToString())
    data = path.with_name(path.name + ".data")
    if data.exists():
        (copy.parent / data.name).symlink_to(data.resolve())
    return copy


def _set_plans_aside(model: onnx.ModelProto, layers: Mapping[str, PlannedLayer]) -> None:
    """Make all plans of a model fp32 at full rank."""
    import onnx
    from onnx import helper, numpy_helper

    for number, node in enumerate([x for x in model.graph.node if x.domain == NAMESPACE and x.name in layers]):
        layer, at = layers[node.name], f"exact/{number}"
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int32), f"{at}/code"))
        made = [
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
    """Return the nodes that compute values from known ones as a separate model, whose inputs are the known ones.

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


def input_alone(argument: str) -> str:
    """Return the name of an input that replaces an operand of one node."""
    return f"alone/{argument}"


def forced_input(layer: str, what: str) -> str:
    """Return the name of an input that forces the precision or the rank of a planned attention."""
    return f"forced/{layer}/{what}"


def take_plans(model: onnx.ModelProto, layers: Mapping[str, PlannedLayer]) -> None:
    """Make the plan of each planned attention an input of the graph."""
    from onnx import TensorProto, helper

    for node in model.graph.node:
        if node.domain == NAMESPACE and node.name in layers:
            layer = layers[node.name]
            new = {layer.precision: forced_input(node.name, "precision"), layer.rank: forced_input(node.name, "rank")}
            for place, name in enumerate(node.input):
                node.input[place] = new.get(name, name)
            model.graph.input.extend(
                helper.make_tensor_value_info(name, TensorProto.INT32, None) for name in new.values()
            )


def show_values(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Make values of a graph its outputs too."""
    import onnx

    have = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in have)


# What moves numbers and computes none, so that nothing is rounded again.
_MOVES = (
    *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice"),
    *("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
)


def float32_copy(path: Path, rounds: bool) -> onnx.ModelProto:
    """Return a copy of a typed ONNX file in float32, with the weights that it stores.

    ONNX Runtime has no 16-bit kernels for most operators on a CPU. It computes them in float32 and leaves out the
    roundings between them, or refuses bfloat16. Of a copy that rounds it computes what the types say; one that does
    not tells faults of the graph from roundings.

    Args:
        rounds: whether casts round every result that has a type of 16 bits, and operands are quantized; if not, only
            what depends on weights alone, since the file may have it as it is, and planned heads are at fp32.
    """
    import onnx
    from onnx import external_data_helper

    model = onnx_file.load(path)
    external_data_helper.load_external_data_for_model(model, str(path.parent))
    inferred = onnx.shape_inference.infer_shapes(model)
    _widen(model.graph, value_types(inferred.graph), rounds)
    if not rounds:
        _set_plans_aside(model, planned_layers(path))
    del model.graph.value_info[:]
    return model


def _widen(graph: onnx.GraphProto, kinds: Mapping[str, tuple[int, int]], rounds: bool) -> None:
    from onnx import AttributeProto, TensorProto, helper

    constants = {tensor.name for tensor in graph.initializer}
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in _narrow():
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    made = []
    for node in graph.node:
        kind = kinds.get(node.output[0], (0, 0))[0]
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            elif attribute.type == AttributeProto.GRAPH:
                _widen(attribute.g, {**kinds, **value_types(attribute.g)}, rounds)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i in _narrow():
                kind, attribute.i = attribute.i, TensorProto.FLOAT
        constant = all(name in constants for name in node.input)
        if constant:
            constants |= set(node.output)
        elif not rounds and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            made.append(helper.make_node("Identity", [node.input[0]], list(node.output)))
            continue
        made.append(node)
        if (rounds or constant) and kind in _narrow() and node.op_type not in _MOVES:
            name, (exact, rounded) = node.output[0], (f"{node.output[0]}/{step}" for step in ("exact", "rounded"))
            node.output[0] = exact
            made.append(helper.make_node("Cast", [exact], [rounded], to=kind))
            made.append(helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(made)


def _narrow() -> tuple[int, ...]:
    from onnx import TensorProto

    return TensorProto.FLOAT16, TensorProto.BFLOAT16


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    from onnx import numpy_helper

    if tensor.data_type in _narrow():
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
