"""What the library runs for a node: the launches of eager mode, with sizes as C++ that is computed when they are known.

Other than a kernel that an engine embeds, a library may have a workspace and launch more than once, so nothing differs
from eager mode: keys and values are packed, and precisions that share no kernel have one each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaattn.errors import ConfigError
from adaattn.ops.adaptive_attention.impl.triton import launches, pack_spec, scratch
from adaattn.ops.kernel_spec import KernelSpec
from adaattn.ops.plan.impl.triton import INPUTS as MOMENTS
from adaattn.ops.plan.impl.triton import plan_spec
from adaattn.ops.token_moments.impl.triton import LEAST_TOKENS, PROGRAMS, finish_spec, reduce_spec
from adaattn.plugins import NAMESPACE, onnx_file, variants
from adaattn.plugins.variants import VARIANTS, Node
from adaattn.system.atomic_file import write


class Symbol:
    """A size that C++ will know, as C++ text."""

    is_constant = False

    def __init__(self, text: str) -> None:
        self.text = text

    def _operation(self, operator: str, other: Any) -> Symbol:
        return Symbol(f"({self.text} {operator} {text_of(other)})")

    def __add__(self, other: Any) -> Symbol:
        return self._operation("+", other)

    def __sub__(self, other: Any) -> Symbol:
        return self._operation("-", other)

    def __mul__(self, other: Any) -> Symbol:
        return self._operation("*", other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Symbol:
        return self._operation("/", other)


def text_of(size: Any) -> str:
    """C++ of a size."""
    return size.text if isinstance(size, Symbol) else str(size)


def axes(name: str) -> int:
    """Dimensions of an input: tokens of heads, heads with or without their dimensions, masks, the ladder of a plan."""
    if name in ("x", "query", "key", "value", "attn_mask"):
        return 4
    return 2 if name in ("ladder", "precision", "rank") or name.endswith("token_peak") else 3


@dataclass(frozen=True)
class Kind:
    """What distinguishes the programs of an op: nodes of one kind share one, whatever their sizes and scales."""

    op: str
    types: tuple[torch.dtype, ...]
    """Of the inputs."""
    head_dim: int
    flag: int
    """`center` or `is_causal`; 0 for an op that has neither."""
    ones: tuple[bool, ...] = ()
    """Which dimensions of the mask are 1, to be repeated."""

    @property
    def flag_name(self) -> str | None:
        return next((name for name, kind in VARIANTS[self.op].attributes.items() if kind is int), None)


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


def kinds(model: Path) -> list[Kind]:
    """The kinds of our nodes in an ONNX file.

    Raises:
        ConfigError: it is not an ONNX file, has none, or a node whose types and shapes it does not tell.
    """
    import onnx

    graph = onnx_file.load(model).graph
    values = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input, *graph.output)}
    values |= {x.name: onnx.helper.make_tensor_type_proto(x.data_type, x.dims).tensor_type for x in graph.initializer}
    found: dict[Kind, None] = {}
    for node in graph.node:
        if node.domain != NAMESPACE:
            continue
        unknown = [name for name in node.input if name not in values]
        if unknown:
            raise ConfigError(f"{model}: nothing says what type and shape {unknown[0]} of {node.op_type} has")
        tensors = [values[name] for name in node.input]
        dims = [[d.dim_value for d in x.shape.dim] for x in tensors]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        found[_kind(node.op_type, [_torch_type(x.elem_type) for x in tensors], dims, attributes)] = None
    if not found:
        raise ConfigError(f"{model} has no op of ours: no node of domain {NAMESPACE!r}")
    return list(found)


def for_onnxruntime(model: Path) -> Path:
    """Write a copy of a model whose ops ONNX Runtime's TensorRT provider takes for plugins: of domain `trt.plugins`.

    The copy, `<model>.trt.onnx`, lies beside the model, where its external data is, and runs with that provider alone.

    Raises:
        ConfigError: it is not an ONNX file, or has no op of ours.
    """
    import onnx

    copy = onnx_file.load(model)
    ours = [node for node in copy.graph.node if node.domain == NAMESPACE]
    if not ours:
        raise ConfigError(f"{model} has no op of ours: no node of domain {NAMESPACE!r}")
    for node in ours:
        node.domain = "trt.plugins"
    others = [function for function in copy.functions if function.domain != NAMESPACE]
    opsets = [opset for opset in copy.opset_import if opset.domain != NAMESPACE]
    for field, kept in ((copy.functions, others), (copy.opset_import, opsets)):
        del field[:]
        field.extend(kept)
    copy.opset_import.append(onnx.helper.make_opsetid("trt.plugins", 1))
    out = model.with_suffix(".trt.onnx")
    write(out, copy.SerializeToString())
    return out


def common_kinds() -> list[Kind]:
    """For no model in particular: fp16, head_dim 64 and 128, causal or not, without a mask or with one of padding."""
    half, attention = (torch.float16,) * 3, (torch.float32,) * 2 + (torch.int32,) * 2
    found = []
    for head_dim in (64, 128):
        found += [Kind("plan", (torch.float32,) * len(MOMENTS) + (torch.int64,), head_dim, 0)]
        for flag in (0, 1):
            found += [
                Kind("token_moments", half[:1], head_dim, flag),
                Kind("token_moments_masked", (half[0], torch.bool), head_dim, flag, (False, True, False)),
                Kind("adaptive_attention", half + attention, head_dim, flag),
                Kind(
                    "adaptive_attention_masked",
                    (*half, *attention, torch.bool),
                    head_dim,
                    flag,
                    (False, True, True, False),
                ),
            ]
    return found


def _torch_type(elem_type: int) -> torch.dtype:
    import onnx

    name = onnx.TensorProto.DataType.Name(elem_type).lower()
    return {"float": torch.float32, "double": torch.float64}.get(name) or getattr(torch, name)


def _kind(op: str, types: Sequence[torch.dtype], dims: Sequence[Sequence[int]], attributes: Mapping[str, Any]) -> Kind:
    variant = VARIANTS[op]
    for (name, takes), dtype in zip(variant.inputs.items(), types, strict=True):
        if dtype not in takes:
            raise ConfigError(f"{name} of {op} is {dtype}; the plugins take {', '.join(map(str, takes))}")
    head_dim = variants.head_dim([width or Symbol("dynamic") for width in dims[0]])
    flag = next((int(attributes[name]) for name, kind in variant.attributes.items() if kind is int), 0)
    masked = [shape for name, shape in zip(variant.inputs, dims, strict=True) if name.endswith("mask")]
    return Kind(op, tuple(types), head_dim, flag, tuple(size == 1 for shape in masked for size in shape))


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
        step = _step(plan_spec(kind.head_dim), variants.plan_sizes(shapes), pointers)
        return Program(kind, capability, [step], [])
    if kind.op.startswith("token_moments"):
        return _moments(kind, node, pointers)
    return _attention(kind, node, pointers)


def _moments(kind: Kind, node: Node, pointers: dict[str, str]) -> Program:
    sizes = variants.moments_sizes(node.shapes)
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
    dtype, sizes = kind.types[0], variants.attention_sizes(node.shapes)
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
        steps.append(_step(variants.attention_spec(node, rows, packed=True), sizes, pointers))
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
