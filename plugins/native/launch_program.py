"""What the library runs for a node: the launches of eager mode, with sizes as C++ that is computed when they are known.

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
from adaattn.plugins.native.node_kinds import Kind, Symbol, axes, text_of
from adaattn.plugins.op_variants import VARIANTS, Node


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
    """The launches of a kind of node."""
    names = tuple(VARIANTS[kind.op].inputs)
    shapes: dict[str, list[Any]] = {}
    for place, name in enumerate(names):
        shapes[name] = [Symbol(f"call.size({place}, {axis})") for axis in range(axes(name))]
        if name.endswith("mask"):
            shapes[name] = [1 if one else size for one, size in zip(kind.ones, shapes[name], strict=True)]
        elif axes(name) > 2:
            shapes[name][-1] = kind.head_dim
    attributes = {} if kind.flag_name is None else {kind.flag_name: kind.flag}
    node = Node(dict(zip(names, kind.types, strict=True)), shapes, attributes, capability, tactic=1)
    pointers = {name: f"call.inputs[{place}]" for place, name in enumerate(names)}
    pointers |= {name: f"call.outputs[{place}]" for place, name in enumerate(VARIANTS[kind.op].outputs)}
    if kind.op == "plan":
        step = _step(plan_spec(kind.head_dim), op_variants.plan_sizes(shapes), pointers)
        return Program(kind, capability, [step], [])
    if kind.op.startswith("token_moments"):
        return _moments(kind, node, pointers)
    return _attention(kind, node, pointers)


def _moments(kind: Kind, node: Node, pointers: dict[str, str]) -> Program:
    sizes = op_variants.moments_sizes(node.shapes)
    heads = text_of(sizes["batch"] * sizes["heads"])
    tokens = text_of(sizes["tokens"])
    chunks = f"std::min(quotient({PROGRAMS}, {heads}), quotient({tokens}, {LEAST_TOKENS}))"
    sizes["chunk"] = Symbol(f"quotient({tokens}, {chunks})")
    sizes["chunks"] = Symbol(f"quotient({tokens}, {sizes['chunk'].text})")
    pointers |= {"mask": pointers.get("key_mask", ""), "center": pointers["mean"], "partial": "scratch_0"}
    masked = "key_mask" in node.shapes
    steps = []
    for center in (False, True) if kind.flag else (False,):
        steps.append(_step(reduce_spec(kind.types[0], kind.head_dim, masked, center), sizes, pointers))
        steps.append(_step(finish_spec(kind.head_dim), sizes, pointers))
    partial = sizes["batch"] * sizes["heads"] * sizes["chunks"] * (4 * (3 * kind.head_dim + 2))
    return Program(kind, node.capability, steps, [text_of(partial)])


def _attention(kind: Kind, node: Node, pointers: dict[str, str]) -> Program:
    dtype, sizes = kind.types[0], op_variants.attention_sizes(node.shapes)
    pointers |= {"mask": pointers.get("attn_mask", "")}
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
    of_queries = len(kind.ones) == 4 and not kind.ones[2]
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
