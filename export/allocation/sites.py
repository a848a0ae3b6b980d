"""Find the operators of a program that may have a type each, and which of them exchange numbers."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from adaattn.errors import ConfigError
from adaattn.export.allocation.heads import HeadPlan, head_plans
from adaattn.export.capture.captured import with_graph
from adaattn.export.formats import BF16, FORMATS, FP8, FP16, FP32, PLUGIN
from adaattn.export.rewrite.match import SDPA, path_of
from adaattn.export.targets import take_attention
from adaattn.ops.dispatch import LARGEST_HEAD_DIM
from adaattn.ops.signatures import OPS

aten = torch.ops.aten
# Products, each of a first and a second operand; these are what tensor cores compute.
LINEAR = aten.linear.default
PRODUCTS = (LINEAR, aten.matmul.default, aten.mm.default, aten.bmm.default)
OTHER_PRODUCTS = (
    *(aten.addmm.default, aten.baddbmm.default, aten.einsum.default),
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
)
# One ONNX node each, whose inner sums, if any, are in float32 whatever the type of the operands.
NEIGHBOURS = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.abs.default),
    *(aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar),
    *(aten.relu.default, aten.gelu.default, aten.sigmoid.default, aten.tanh.default),
    *(aten.layer_norm.default, aten.softmax.int, aten._softmax.default, aten.where.self, aten.cat.default),
    *(aten.embedding.default, aten.masked_fill.Scalar),
)
# What moves numbers and computes none, beside views.
MOVES = (
    *(aten.clone.default, aten._unsafe_view.default, aten.repeat.default, aten.flip.default, aten.roll.default),
    *(aten.index_select.default, aten.index.Tensor, aten.gather.default, aten.contiguous.default),
    *(aten.max_pool1d.default, aten.max_pool2d.default, operator.getitem),
)
# Of sizes, which the capture knows, and of types, which are not those of before.
ASSERTIONS = (aten._assert_scalar.default, aten._assert_tensor_metadata.default)
# Composites that would be several ONNX nodes, each with a rounding: they are decomposed first.
DECOMPOSED = {
    aten.silu.default: lambda x: x * x.sigmoid(),
    aten.copy.default: lambda x, given, non_blocking=False: given.to(x.dtype).expand(x.shape).clone(),  # no derivative
}


@dataclass(frozen=True)
class Site:
    """An operator that may have a type.

    Args:
        node: of the program.
        path: of its module.
        operands: the nodes of its floating-point operands, in order.
        candidates: formats that it may have, fp32 first.
        product: whether it is attention, a product or a convolution.
        heads: plans that each head of an attention may have, where it may become the op `adaptive_attention`.
    """

    node: Node
    path: str
    operands: tuple[Node, ...]
    candidates: tuple[str, ...]
    product: bool
    heads: tuple[HeadPlan, ...] = ()

    @property
    def name(self) -> str:
        """The name of the node, which the file of an allocation knows it by."""
        return self.node.name

    def head_sizes(self) -> tuple[int, int, set[int]]:
        """Return the numbers of heads and kv heads of an attention, and its head size, as `PlannedHeads.sizes`."""
        query, key = (each.meta["val"].shape for each in attention_arguments(self.node)[:2])
        return query[1], key[1], {query[3]}

    @property
    def op(self) -> str:
        """The name of the operator, without its overload."""
        return str(cast(torch._ops.OpOverload, self.node.target).overloadpacket).removeprefix("aten.")


@dataclass(frozen=True)
class Network:
    """The sites of a program, and where the numbers of each come from.

    Args:
        program: functional, with attention as single nodes.
        sites: in the order of the program.
        constants: for each node that is a weight, or a part or view of one, the weight.
        folded: nodes that depend on weights alone, which compilers compute once.
    """

    program: ExportedProgram
    sites: Mapping[Node, Site]
    constants: Mapping[Node, Node]
    folded: Collection[Node]

    def root(self, node: Node) -> Node:
        """Return what made the numbers of a node, past views and moves."""
        while node not in self.sites and _moves(node):
            node = _floats(node)[0]
        return node

    def operands(self) -> dict[Node, list[Node | None]]:
        """Return what takes each floating-point value that is no weight: sites, or None for all that have no type.

        What only moves numbers takes none: its own value is in the result.
        """
        found: dict[Node, list[Node | None]] = {}
        for node in self.program.graph.nodes:
            if node.op not in ("call_function", "output") or (node not in self.sites and _moves(node)):
                continue
            for operand in dict.fromkeys(node.all_input_nodes):
                if is_float(operand) and operand not in self.constants and operand not in self.folded:
                    found.setdefault(operand, []).append(node if node in self.sites else None)
        return found


def network(
    program: ExportedProgram, formats: Sequence[str], targets: Collection[str] = ("onnx",), plugin: bool = False
) -> Network:
    """Return the sites of a program.

    Args:
        program: captured, whose attention is one node each.
        formats: what sites may have.
        targets: that take the operators.
        plugin: whether attention that is not fp32 becomes the op `adaptive_attention`, where that takes it.

    Raises:
        ConfigError: it is not a program of float32.
    """
    program = with_reshapes(_dense(program).run_decompositions(DECOMPOSED))
    for node in list(program.graph.nodes):
        if node.target in ASSERTIONS:
            program.graph.erase_node(node)
    program.graph_module.recompile()
    narrow = [str(x.dtype).removeprefix("torch.") for x in program.state_dict.values() if _narrow(x)]
    if narrow:
        raise ConfigError(f"the model has weights of {narrow[0]}; an output tolerance takes a model of float32")
    held = {
        item.arg.name
        for item in program.graph_signature.input_specs
        if item.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    sites, constants, folded = dict[Node, Site](), dict[Node, Node](), set[Node]()
    for node in program.graph.nodes:
        weight = node.op == "placeholder" and node.name in held
        if weight or (node.op == "call_function" and all(each in folded for each in node.all_input_nodes)):
            folded.add(node)
        if weight and is_float(node):
            constants[node] = node
        elif node.op == "call_function" and is_float(node):
            if _moves(node) and _floats(node)[0] in constants:
                constants[node] = constants[_floats(node)[0]]
            elif node in folded:
                continue
            elif (candidates := _candidates(node, formats, targets)) and node.meta["val"].dtype == torch.float32:
                product, heads = node.target not in NEIGHBOURS, tuple[HeadPlan, ...]()
                if plugin and FP16 in formats and _fits_op(node):
                    heads, candidates = head_plans(node.meta["val"].shape[-1], formats), (FP32, PLUGIN)
                sites[node] = Site(node, path_of(node), tuple(_floats(node)), candidates, product, heads)
    return Network(program, sites, constants, folded)


def with_reshapes(program: ExportedProgram) -> ExportedProgram:
    """Return the program with views as reshapes: a view counts on strides, such as those of torch's own attention."""
    for node in program.graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default
    program.graph_module.recompile()
    return program


def is_float(node: Any) -> bool:
    """Return whether the value of a node is a tensor, or a list of tensors, of floating-point numbers."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(value, Tensor) and value.is_floating_point()


def _candidates(node: Node, formats: Sequence[str], targets: Collection[str]) -> tuple[str, ...]:
    """Return the formats that a node may have; none where its type stays, as where the program says it."""
    given = (*node.args, *node.kwargs.values())
    if any(isinstance(x, torch.dtype) for x in given) or "alpha" in node.kwargs:
        return ()  # with alpha ONNX has two operators
    if node.target is aten.einsum.default:  # as ONNX has it
        formats = [name for name in formats if name != BF16]
    largest = max((abs(x) for x in given if isinstance(x, (int, float))), default=0)
    formats = [name for name in formats if FORMATS[FORMATS[name].carrier].largest >= largest]
    if node.target is SDPA and not take_attention(targets, FP8, [x.meta["val"].shape[-1] for x in _floats(node)[:3]]):
        formats = [name for name in formats if name != FP8]
    if node.target is SDPA or node.target in PRODUCTS:
        return tuple(formats)
    if node.target in (*OTHER_PRODUCTS, *NEIGHBOURS):
        return tuple(name for name in formats if name != FP8)
    return ()


def _fits_op(node: Node) -> bool:
    """Return whether a node is attention that the op `adaptive_attention` takes."""
    if node.target is not SDPA:
        return False
    query, key, value = (each.meta["val"] for each in attention_arguments(node)[:3])
    mask = attention_arguments(node)[3]
    head_dim, heads, kv_heads = query.shape[-1], query.shape[1:2], key.shape[1:2]
    return (
        all(x.dim() == 4 and x.dtype == torch.float32 for x in (query, key, value))
        and isinstance(head_dim, int)
        and head_dim == key.shape[-1] == value.shape[-1] <= LARGEST_HEAD_DIM
        and all(isinstance(x, int) for x in (*heads, *kv_heads))
        and kv_heads == value.shape[1:2]
        and heads[0] % kv_heads[0] == 0
        and all(str(query.shape[0]) == str(x.shape[0]) for x in (key, value))
        and (mask is None or mask.meta["val"].dim() == 4)
    )


def attention_arguments(
    node: Node, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """Return query, key, value, mask, causality and scale of a call of scaled_dot_product_attention.

    Args:
        node: the call.
        args, kwargs: what stands for its arguments; the arguments themselves where they are left out.
    """
    args, kwargs = node.args if args is None else args, node.kwargs if kwargs is None else kwargs
    target, query = cast(torch._ops.OpOverload, node.target), cast(Node, node.args[0])
    given = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False)) | dict(kwargs)
    scale = given.get("scale")
    scale = float(query.meta["val"].shape[-1]) ** -0.5 if scale is None else scale
    return (
        *(given[name] for name in ("query", "key", "value")),
        given.get("attn_mask"),
        bool(given.get("is_causal", False)),
        scale,
    )


def _floats(node: Node) -> list[Node]:
    return [each for each in node.all_input_nodes if is_float(each)]


def _moves(node: Node) -> bool:
    target = node.target
    if node.op != "call_function" or not is_float(node) or len(_floats(node)) != 1:
        return False
    return target in MOVES or (isinstance(target, torch._ops.OpOverload) and target.is_view)


def _narrow(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float32


def _dense(program: ExportedProgram) -> ExportedProgram:
    """Return a program in which attention that plans at run time is scaled_dot_product_attention."""
    attend = torch.ops.adaattn.adaptive_attention.default
    if not any(node.target is attend for node in program.graph.nodes):
        return program
    module = copy.deepcopy(program.graph_module)
    for node in list(module.graph.nodes):
        if node.target is attend:
            given = OPS["adaptive_attention"].bound(node.args, node.kwargs)
            with module.graph.inserting_before(node):
                dense = module.graph.call_function(
                    SDPA,
                    (given["query"], given["key"], given["value"], given["attn_mask"]),
                    {"is_causal": given["is_causal"], "scale": given["scale"], "enable_gqa": True},
                )
            dense.meta = dict(node.meta)
            node.replace_all_uses_with(dense)
            dense.name = f"attention_of_{node.name}"
    module.graph.eliminate_dead_code()
    module.recompile()
    return with_graph(program, module)
