"""Lower a captured program to an ONNX model, in which custom ops stay nodes with their functions attached."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype
from torch.export.graph_signature import OutputKind
from torch.utils._pytree import tree_leaves

import adaattn.ops  # registers the ops that the program calls
from adaattn.errors import AdaAttnError, ExportError, first_line
from adaattn.export.onnx import sdpa, typed
from adaattn.export.onnx.functions import DOMAIN, DOMAIN_VERSION, PLUGIN, attributes, function
from adaattn.export.targets import TARGETS
from adaattn.ops.signatures import OPS, VARIANTS, Signature

OLDEST_OPSET = 18


@dataclass(frozen=True)
class Lowered:
    """An ONNX graph and the program that torch made it from, whose values have the names of the graph's.

    Args:
        written: for each input that the model writes into, the output that holds its new value.
    """

    graph: ir.Model
    program: torch.export.ExportedProgram
    written: Mapping[str, str] = field(default_factory=dict)


def lower(
    program: torch.export.ExportedProgram,
    opset: int,
    dim_names: Mapping[str, str],
    input_names: Sequence[str],
    output_names: Sequence[str],
    emit_plan: bool = False,
    targets: Collection[str] = ("onnx",),
) -> Lowered:
    """Return the ONNX model of a captured program.

    Args:
        program: what torch.export captured.
        opset: 18 to 24.
        dim_names: for each symbol of the program the name that it gets.
        input_names, output_names: of the graph.
        emit_plan: add precision and rank of each planned attention as outputs, `LAYER.precision` and `LAYER.rank`.
        targets: that the model is for; what one of them does not take is written otherwise.

    Raises:
        ExportError: torch.onnx cannot translate the program, or it keeps something from one call to the next.
    """
    _register_schemas()
    _cast_before_subtraction(program)
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            output_names=list(output_names),
            custom_translation_table={
                **_translations(),
                **sdpa.translations(opset, targets),
                **typed.translations(opset, targets),
            },
            verbose=False,
            optimize=False,  # it would remove what is written into inputs, which is not an output yet
        )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = innermost_cause(error)
        if isinstance(cause, AdaAttnError):
            raise cause from error
        raise ExportError(f"torch.onnx cannot translate the program: {first_line(cause)}") from error
    assert exported is not None  # torch.onnx.export returns None only for TorchScript models
    assert exported.exported_program is not None
    _refuse_state(exported.exported_program)
    written = _return_written(exported.model.graph, exported.exported_program, output_names)
    # What torch.onnx merges does not have the types of what it replaces, where these are several.
    merges = all(TARGETS[name].merged for name in targets) and not _is_narrow(exported.exported_program)
    optimize = exported.optimize if merges else partial(onnxscript.optimizer.optimize_ir, exported.model)
    optimize()
    if _store_parts(exported.model.graph):
        optimize()  # what is made of the parts is constant now
    model = exported.model
    _transpose_after_products(model.graph)
    typed.fold_weights(model)
    for graph_input, name in zip(model.graph.inputs, input_names, strict=True):
        graph_input.name = name  # torch renames an input that is an output too
    _name_dims(model.graph, dim_names)
    planned = planned_nodes(model)
    for layer, node in planned.items():
        node.name = layer
    if emit_plan:
        for layer, node in planned.items():
            for label in ("precision", "rank"):
                value = node.inputs[OPS["adaptive_attention"].place(label)]
                assert value is not None  # the schema has no optional inputs
                named = ir.node("Identity", [value], name=f"{layer}.{label}")
                named.outputs[0].name, named.outputs[0].type = f"{layer}.{label}", value.type
                named.outputs[0].shape = value.shape
                model.graph.append(named)
                model.graph.outputs.append(named.outputs[0])
    within = [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain == DOMAIN]
    taken = set(planned)
    for node in within:  # in branches of torch.cond too
        if VARIANTS[node.op_type].op == "adaptive_attention" and node not in planned.values():
            node.name = _unused(_module_path(node) or "attention", taken)
    used = {node.op_type for node in within}
    for name in sorted(used):
        made = ir.serde.deserialize_function(function(name, model.opset_imports[""]))
        model.functions[made.identifier()] = made
    if used:
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
    _forget_paths(model)
    model.producer_name, model.producer_version = "adaattn", adaattn.__version__
    return Lowered(model, exported.exported_program, written)


def _cast_before_subtraction(program: torch.export.ExportedProgram) -> None:
    """Write `1.0 - x`, for integers x, with the cast that it implies, which torch.onnx does not find by itself."""
    aten = torch.ops.aten
    for node in list(program.graph.nodes):
        if node.target is not aten.rsub.Scalar or not isinstance(node.args[1], float):
            continue
        value = node.args[0].meta["val"]
        if not value.is_floating_point():
            with program.graph.inserting_before(node):
                cast = program.graph.call_function(aten.to.dtype, (node.args[0], node.meta["val"].dtype))
            cast.meta = {**node.meta, "val": value.to(node.meta["val"].dtype)}
            node.replace_input_with(node.args[0], cast)
    program.graph_module.recompile()


def planned_nodes(model: ir.Model) -> dict[str, ir.Node]:
    """Return the adaptive attention nodes, in order, by the paths of their modules.

    Those in branches of torch.cond are not among them: their plans are known only where a branch is taken.
    """
    nodes: dict[str, ir.Node] = {}
    for node in model.graph:
        if node.domain == DOMAIN and VARIANTS[node.op_type].op == "adaptive_attention":
            layer = _module_path(node)
            nodes[layer if layer and layer not in nodes else f"attention_{len(nodes)}"] = node
    return nodes


def _forget_paths(model: ir.Model) -> None:
    """Remove the source files and lines that torch writes into each node: they are paths of this machine."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


def _refuse_state(program: torch.export.ExportedProgram) -> None:
    """Raise ExportError where a call changes state for the next one: an artifact keeps none."""
    changed = [
        str(item.target)
        for item in program.graph_signature.output_specs
        if item.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
    ]
    if changed:
        raise ExportError(
            f"the model changes {', '.join(changed)} when it is called, and an artifact keeps nothing between calls; "
            "take it as an input and return it"
        )


def _return_written(
    graph: ir.Graph, program: torch.export.ExportedProgram, output_names: Sequence[str]
) -> dict[str, str]:
    """Add an output for each input that the model writes into, such as a cache of keys, and return their names."""
    specs = program.graph_signature.output_specs
    returned = {item.arg.name for item in specs if item.kind is OutputKind.USER_OUTPUT and hasattr(item.arg, "name")}
    values = {value.name: value for node in graph for value in node.outputs} | {x.name: x for x in graph.inputs}
    nodes = {node.name: node for node in program.graph.nodes}
    written: dict[str, str] = {}
    for item in specs:
        if item.kind is not OutputKind.USER_INPUT_MUTATION or item.arg.name in returned:
            continue
        made = nodes[item.arg.name]
        while made.name not in values and made.target is torch.ops.aten.copy.default:
            made = made.args[1]  # what is copied: torch.onnx makes no node of the copy
        name, value = f"{item.target}_out", values.get(made.name)
        if value is None or name in output_names:
            raise ExportError(f"the model writes into its input {item.target}; return it as an output instead")
        node = ir.node("Identity", [value], name=name)
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, value.shape
        graph.append(node)
        graph.outputs.append(node.outputs[0])
        written[str(item.target)] = name
    return written


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    def square_root(self: Any) -> Any:  # of a size, as in math.sqrt(x.shape[-1])
        return onnxscript.opset18.Sqrt(onnxscript.opset18.Cast(self, to=ir.DataType.FLOAT))

    ops = {getattr(torch.ops.adaattn, name).default: _translation(op) for name, op in OPS.items()}
    attention = ops[torch.ops.adaattn.adaptive_attention.default]

    def planned(query: Any, key: Any, value: Any, *args: Any) -> Any:
        opset = onnxscript.opset18
        batch, one = opset.Shape(query, start=0, end=1), opset.Constant(value_ints=[1])
        expanded = (opset.Expand(x, opset.Concat(batch, *[one] * (len(x.shape) - 1), axis=0)) for x in args[:4])
        return attention(query, key, value, *expanded, *args[4:])

    return {
        torch._sym_sqrt: square_root,  # type: ignore[attr-defined]
        torch.ops.adaattn.planned_attention.default: planned,
        **ops,
    }


def _translation(op: Signature) -> Callable[..., Any]:
    """Return what makes a node of a call of an op: of the variant for its mask, with attributes by their names."""
    domain = onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION)
    masks = {x.name for x in op.masks.values()}

    def node(*args: Any, **kwargs: Any) -> Any:
        given = op.bound(args, kwargs)  # `impl`, which is among them, says who computes in eager mode
        mask = next((given[name] for name in masks if given[name] is not None), None)
        variant = op.variant(None if mask is None else to_torch_dtype(mask.dtype))
        named = {name: int(given[name]) if isinstance(x, bool) else given[name] for name, x in op.attributes.items()}
        return getattr(domain, variant.name)(*(given[x.name] for x in variant.inputs), **named, **PLUGIN)

    return node


@functools.cache
def _register_schemas() -> None:
    """Tell onnx the ops' signatures, so that the exporter emits nodes instead of inlining the functions."""
    schema = onnx.defs.OpSchema
    for variant in VARIANTS.values():
        inputs, outputs = (
            [schema.FormalParameter(x.name, x.like or x.name) for x in xs] for xs in (variant.inputs, variant.outputs)
        )
        own = [x for x in (*variant.inputs, *variant.outputs) if x.like is None]
        types = [(x.name, [f"tensor({from_torch_dtype(t).name.lower()})" for t in x.types], "") for x in own]
        schema_attributes = [schema.Attribute(x.name, x) for x in attributes(variant)]
        onnx.defs.register_schema(
            schema(
                variant.name,
                DOMAIN,
                DOMAIN_VERSION,
                inputs=inputs,
                outputs=outputs,
                type_constraints=types,
                attributes=schema_attributes,
            )
        )


def _store_parts(graph: ir.Graph) -> bool:
    """Store the parts of a weight that is split, as of queries, keys and values, as a weight each.

    The optimizer leaves nodes with several outputs alone, and what is made of them.

    Returns:
        Whether there were any.
    """
    found = False
    for node in [each for each in graph if each.op_type == "Split"]:
        source, *rest = node.inputs
        sizes = ir.convenience.get_const_tensor(rest[0]) if rest and rest[0] is not None else None
        known = (sizes is not None or not rest) and not any(x in graph.outputs for x in node.outputs)
        if source is None or source.name not in graph.initializers or source.const_value is None or not known:
            continue
        x, axis, count = source.const_value.numpy(), node.attributes.get_int("axis", 0), len(node.outputs)
        length = -(-x.shape[axis] // count)
        lengths = [length] * (count - 1) if sizes is None else sizes.numpy()[:-1]
        for output, part in zip(node.outputs, np.split(x, np.cumsum(lengths), axis), strict=True):
            name, kind = f"{source.name}_{output.name}", source.const_value.dtype
            stored = ir.Value(name=name, shape=ir.Shape(part.shape), type=ir.TensorType(kind))
            stored.const_value = ir.tensor(np.ascontiguousarray(part), dtype=kind, name=name)
            graph.initializers.add(stored)
            output.replace_all_uses_with(stored)
        graph.remove(node, safe=True)
        found = True
    return found


def _is_narrow(program: torch.export.ExportedProgram) -> bool:
    """Return whether a program computes in 16 bits anywhere."""
    values = tree_leaves([node.meta.get("val") for node in program.graph.nodes])
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16) for x in values)


def _transpose_after_products(graph: ir.Graph) -> None:
    """Write a product of a transposed tensor and a matrix as the transposed product, in 16 bits.

    ONNX Runtime 1.32 crashes where it fuses the transposition of batch dimensions into a product that it computes in
    float32.
    """
    for node in [each for each in graph if each.op_type == "MatMul"]:
        x, matrix, result = *node.inputs, node.outputs[0]
        before = None if x is None else x.producer()
        if x is None or before is None or before.op_type != "Transpose" or result.dtype not in sdpa.NARROW:
            continue
        perm = before.attributes.get_ints("perm", ())
        flat = matrix is not None and matrix.shape is not None and len(matrix.shape) == 2
        if not flat or len(perm) < 3 or perm[-1] != len(perm) - 1:
            continue
        product = ir.node("MatMul", [before.inputs[0], matrix], name=f"{node.name}_before")
        after = ir.node("Transpose", [product.outputs[0]], {"perm": perm}, name=node.name)
        for made in (product, after):
            made.metadata_props.update(node.metadata_props)
            made.outputs[0].type = result.type
        after.outputs[0].shape, after.outputs[0].name = result.shape, result.name
        product.outputs[0].name = f"{result.name}_before"
        ir.convenience.replace_nodes_and_values(graph, node, [node], [product, after], [result], [after.outputs[0]])
        if not x.uses() and x not in graph.outputs:
            graph.remove(before, safe=True)


def _name_dims(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Give symbols of torch the names that the user gave, in expressions of them too."""
    if not names:
        return
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    nodes = ir.traversal.RecursiveGraphIterator(graph)
    values = [*graph.inputs, *graph.outputs, *(value for node in nodes for value in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            ir.SymbolicDim(symbol.sub(lambda match: names[match[0]], dim.value))
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None
            else dim
            for dim in value.shape
        )


def _unused(name: str, taken: set[str]) -> str:
    """Return a free name and mark it as taken."""
    unused, count = name, 1
    while unused in taken:
        count += 1
        unused = f"{name}_{count}"
    taken.add(unused)
    return unused


def _module_path(node: ir.Node) -> str:
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    return scopes[-2] if len(scopes) > 1 else ""


def innermost_cause(error: BaseException) -> BaseException:
    """Return the innermost cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
