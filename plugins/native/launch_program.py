"""List what the library launches for a node: the launches of eager mode, with sizes as C++ expressions.

Other than a kernel that an engine embeds, a library may have a workspace and launch more than once, so nothing differs
from eager mode: keys and values are packed, and precisions that share no kernel have one each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaattn.ops.adaptive_attention.impl.triton import launches, pack_spec, scratch
from adaattn.ops.kernel_spec import KernelSpec
from adaattn.ops.plan.impl.triton import plan_spec
from adaattn.ops.token_moments.impl.triton import LEAST_TOKENS, PROGRAMS, finish_spec, reduce_spec
from adaattn.plugins import op_variants
from adaattn.plugins.native.node_kinds import Kind, Symbol, text_of
from adaattn.plugins.op_variants import USUAL, Node


@dataclass(frozen=True)
class Step:
    """A launch. Its kernel is compiled for the architecture of the program."""

    spec: KernelSpec
    arguments: Sequence[str]
    programs: str


@dataclass(frozen=True)
class Program:
    """The launches of a kind of node on an architecture."""

    kind: Kind
    capability: int
    steps: Sequence[Step]
    scratch_bytes: Sequence[str]


def program(kind: Kind, capability: int) -> Program:
    """Return the launches of a kind of node."""
    signature = kind.variant.signature
    shapes: dict[str, list[Any]] = {}
    for place, argument in enumerate(signature.inputs):
        shape: list[Any] = [Symbol(f"call.size({place}, {axis})") for axis in range(len(argument.axes))]
        if argument.broadcasts:
            shape = [1 if one else size for one, size in zip(kind.ones, shape, strict=True)]
        shapes[argument.name] = [
            kind.head_dim if axis == "head_dim" else size for axis, size in zip(argument.axes, shape, strict=True)
        ]
    attributes = {} if kind.variant.flag is None else {kind.variant.flag: kind.flag}
    node = Node(dict(zip(shapes, kind.types, strict=True)), shapes, attributes, capability, tactic=USUAL)
    pointers = {x.name: f"call.inputs[{place}]" for place, x in enumerate(signature.inputs)}
    pointers |= {x.name: f"call.outputs[{place}]" for place, x in enumerate(signature.outputs)}
    pointers["mask"] = "" if signature.mask is None else pointers[signature.mask.name]
    if signature.op == "plan":
        step = _step(plan_spec(kind.head_dim), op_variants.plan_sizes(shapes), pointers)
        return Program(kind, capability, [step], [])
    return (_moments if signature.op == "token_moments" else _attention)(kind, node, pointers)


def _moments(kind: Kind, node: Node, pointers: dict[str, str]) -> Program:
    sizes = op_variants.moments_sizes(node.shapes)
    heads = text_of(sizes["batch"] * sizes["heads"])
    tokens = text_of(sizes["tokens"])
    chunks = f"std::min(ceilDiv({PROGRAMS}, {heads}), ceilDiv({tokens}, {LEAST_TOKENS}))"
    sizes["chunk"] = Symbol(f"ceilDiv({tokens}, {chunks})")
    sizes["chunks"] = Symbol(f"ceilDiv({tokens}, {sizes['chunk'].text})")
    pointers |= {"center": pointers["mean"], "partial": "scratch_0"}
    masked = kind.variant.signature.mask is not None
    steps = []
    for center in (False, True) if kind.flag else (False,):
        steps.append(_step(reduce_spec(kind.types[0], kind.head_dim, masked, center), sizes, pointers))
        steps.append(_step(finish_spec(kind.head_dim), sizes, pointers))
    partial = sizes["batch"] * sizes["heads"] * sizes["chunks"] * (4 * (3 * kind.head_dim + 2))
    return Program(kind, node.capability, steps, [text_of(partial)])


def _attention(kind: Kind, node: Node, pointers: dict[str, str]) -> Program:
    dtype, sizes = kind.types[0], op_variants.attention_sizes(node.shapes)
    steps: list[Step] = []
    scratch_bytes: list[str] = []
    of_memory = (sizes["batch"], sizes["kv_heads"], sizes["keys"])
    for name, (shape, kept) in scratch(dtype, kind.head_dim, node.capability, *of_memory).items():
        count: Any = kept.itemsize
        for size in shape:
            count = size * count
        pointers[name] = f"scratch_{len(scratch_bytes)}"
        scratch_bytes.append(text_of(count))
    steps.append(_step(pack_spec(dtype, kind.head_dim, node.capability), sizes, pointers))
    mask = kind.variant.signature.mask
    of_queries = mask is not None and not kind.ones[mask.axes.index("queries")]
    for rows in launches(dtype, kind.head_dim, node.capability, of_queries):
        steps.append(_step(op_variants.attention_spec(node, rows, packed=True), sizes, pointers))
    return Program(kind, node.capability, steps, scratch_bytes)


def _step(spec: KernelSpec, sizes: Mapping[str, Any], pointers: Mapping[str, str]) -> Step:
    arguments = []
    for name in spec.parameters:
        kind = spec.arguments[name]
        if kind == "i32":
            arguments.append(f"static_cast<int32_t>({text_of(sizes[name])})")
        else:
            arguments.append(pointers[name] if kind != "fp32" else f"call.{name}")
    return Step(spec, arguments, text_of(spec.grid(sizes)))
