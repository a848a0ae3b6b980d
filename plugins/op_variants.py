"""The variants of our ops as a plugin sees them: tensors, attributes, and the launch that computes them.

Python plugins, the native library and the tests read this one table. Sizes are integers, or the symbols by which
TensorRT writes a launch down before it knows them; +, -, * and // with an integer on the right serve both. Tensors are
contiguous: a plugin asks for the linear format.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaattn import ops
from adaattn.errors import ConfigError
from adaattn.ops.adaptive_attention.impl.triton import attend_spec, launches
from adaattn.ops.dispatch import LARGEST_HEAD_DIM
from adaattn.ops.kernel_spec import KernelSpec
from adaattn.ops.plan.impl.triton import INPUTS as MOMENTS
from adaattn.ops.plan.impl.triton import plan_spec
from adaattn.ops.token_moments.impl.triton import OUTPUTS as STATISTICS
from adaattn.ops.token_moments.impl.triton import moments_spec

Size = Any
Shape = Sequence[Size]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TACTICS = {1: "the blocks of eager mode", 2: "blocks within 48 KiB of shared memory, which every launcher grants"}


@dataclass(frozen=True)
class Node:
    """An op in a network: what its launch depends on."""

    types: Mapping[str, torch.dtype]
    """Of the inputs."""
    shapes: Mapping[str, Shape]
    """Of the inputs."""
    attributes: Mapping[str, float]
    capability: int
    tactic: int


@dataclass(frozen=True)
class Launch:
    """A kernel and the integers it is given."""

    spec: KernelSpec
    sizes: Mapping[str, Size]

    @property
    def programs(self) -> Size:
        return self.spec.grid(self.sizes)

    @property
    def integers(self) -> list[Size]:
        """The kernel's integer arguments, in order; they stand between its inputs and its outputs."""
        return [self.sizes[name] for name in self.spec.parameters if self.spec.arguments[name] == "i32"]


@dataclass(frozen=True)
class Variant:
    """An op with one set of inputs, as `adaattn.export` writes it into ONNX."""

    name: str
    inputs: Mapping[str, tuple[torch.dtype, ...]]
    """The types that each input may have."""
    outputs: Mapping[str, torch.dtype | None]
    """The type of each output; None is that of the first input."""
    attributes: Mapping[str, type]
    """float or int."""
    output_shapes: Callable[[Mapping[str, Shape]], Sequence[Shape]]
    launch: Callable[[Node], Launch]
    run: Callable[..., Sequence[Tensor]]
    """The op itself, of tensors and then attributes."""
    tactics: tuple[int, ...] = (1,)


def constant(size: Size) -> int | None:
    """A size that is known, None for one that is not yet."""
    if isinstance(size, int):
        return size
    return int(size.constant_value()) if size.is_constant else None


def _strides(shape: Shape) -> list[Size]:
    """Of a contiguous tensor; 0 for a dimension of 1, which may have to be repeated."""
    strides: list[Size] = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, size * strides[0])
    return [0 if constant(size) == 1 else stride for size, stride in zip(shape, strides, strict=True)]


def head_dim(shape: Shape) -> int:
    """The last dimension, which a kernel is compiled for."""
    width = constant(shape[-1])
    if width is None or not 0 < width <= LARGEST_HEAD_DIM:
        said = "dynamic" if width is None else width
        raise ConfigError(f"head_dim is {said}; the plugins take a fixed one of at most {LARGEST_HEAD_DIM}")
    return width


def moments_sizes(shapes: Mapping[str, Shape]) -> dict[str, Size]:
    """Integer arguments of the kernels of `token_moments`."""
    x, mask = shapes["x"], shapes.get("key_mask")
    sizes = {"batch": x[0], "heads": x[1], "tokens": x[2]}
    sizes |= dict(zip(("x_b", "x_h", "x_s", "x_d"), _strides(x), strict=True))
    return sizes if mask is None else sizes | dict(zip(("m_b", "m_h", "m_s"), _strides(mask), strict=True))


def plan_sizes(shapes: Mapping[str, Shape]) -> dict[str, Size]:
    """Integer arguments of the kernel of `plan`."""
    query, key = shapes["query_mean"], shapes["key_second_moment"]
    return {"batch": query[0], "heads": query[1], "kv_heads": key[1], "steps": shapes["ladder"][1]}


def attention_sizes(shapes: Mapping[str, Shape]) -> dict[str, Size]:
    """Integer arguments of the kernels of `adaptive_attention`."""
    query, key, mask = shapes["query"], shapes["key"], shapes.get("attn_mask")
    sizes = {"batch": query[0], "heads": query[1], "kv_heads": key[1], "queries": query[2], "keys": key[2]}
    for letter, shape in zip("qkv", (query, key, shapes["value"]), strict=True):
        sizes |= dict(zip((f"{letter}_{axis}" for axis in "bhsd"), _strides(shape), strict=True))
    of_mask = (0, 0, 0, 0) if mask is None else _strides(mask)
    return sizes | dict(zip(("m_b", "m_h", "m_q", "m_k"), of_mask, strict=True))


def attention_spec(node: Node, rows: tuple[int, ...], packed: bool, small: bool = False) -> KernelSpec:
    """The kernel of a node for some precisions, its scale left open."""
    mask, mask_type = node.shapes.get("attn_mask"), node.types.get("attn_mask")
    types = {node.types[name] for name in ("query", "key", "value")}
    if len(types) > 1:
        raise ConfigError(f"query, key and value are of types {types}; the plugins take one type for the three")
    spec = attend_spec(
        node.types["query"],
        head_dim(node.shapes["query"]),
        node.capability,
        causal=bool(node.attributes["is_causal"]),
        mask=torch.uint8 if mask_type == torch.bool else mask_type,
        mask_of_queries=mask is not None and constant(mask[2]) != 1,
        packed=packed,
        small=small,
        rows=rows,
    )
    if mask is not None and constant(mask[3]) == 1:
        return spec.bound(m_k=0)  # one column for all keys
    return spec


def _moments(node: Node) -> Launch:
    x, masked, center = node.shapes["x"], "key_mask" in node.shapes, bool(node.attributes["center"])
    return Launch(moments_spec(node.types["x"], head_dim(x), masked, center), moments_sizes(node.shapes))


def _plan(node: Node) -> Launch:
    spec = plan_spec(head_dim(node.shapes["query_mean"]))
    return Launch(spec.bound(**{name: node.attributes[name] for name in ("scale", "limit")}), plan_sizes(node.shapes))


def _attention(node: Node) -> Launch:
    scale = node.attributes["scale"]
    if scale < 0:
        raise ConfigError(f"scale is {scale}; the plugins take one of at least 0: put the sign into the queries")
    rows = tuple(itertools.chain(*launches(node.types["query"], head_dim(node.shapes["query"]), node.capability)))
    # All in one kernel, and nothing packed: TensorRT gives an embedded kernel one launch and no scratch memory.
    spec = attention_spec(node, rows, packed=False, small=node.tactic == 2)
    return Launch(spec.bound(scale=scale), attention_sizes(node.shapes))


def _run_moments(*given: Any) -> Sequence[Tensor]:
    x, *mask, center = given
    return ops.token_moments(x, mask[0] if mask else None, bool(center), impl="triton")


def _run_plan(*given: Any) -> Sequence[Tensor]:
    chosen: Sequence[Tensor] = ops.plan(*given, "triton")
    return chosen


def _run_attention(*given: Any) -> Sequence[Tensor]:
    *tensors, scale, is_causal = given
    return [ops.adaptive_attention(*tensors, scale=scale, is_causal=bool(is_causal), impl="triton")]


def _token_moments(name: str, **mask: tuple[torch.dtype, ...]) -> Variant:
    return Variant(
        name,
        {"x": FLOATS, **mask},
        dict.fromkeys(STATISTICS, torch.float32),
        {"center": int},
        lambda shapes: [(*shapes["x"][:2], shapes["x"][3])] * 3 + [shapes["x"][:2]],
        _moments,
        _run_moments,
    )


def _adaptive_attention(name: str, **mask: tuple[torch.dtype, ...]) -> Variant:
    return Variant(
        name,
        {
            **dict.fromkeys(("query", "key", "value"), FLOATS),
            **dict.fromkeys(("key_mean", "value_peak"), (torch.float32,)),
            **dict.fromkeys(("precision", "rank"), (torch.int32,)),
            **mask,
        },
        {"output": None},
        {"scale": float, "is_causal": int},
        lambda shapes: [tuple(shapes["query"])],
        _attention,
        _run_attention,
        tuple(TACTICS),
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        _token_moments("token_moments"),
        _token_moments("token_moments_masked", key_mask=(torch.bool,)),
        Variant(
            "plan",
            {**dict.fromkeys(MOMENTS, (torch.float32,)), "ladder": (torch.int64,)},
            {"precision": torch.int32, "rank": torch.int32, "predicted_error": torch.float32},
            {"scale": float, "limit": float},
            lambda shapes: [tuple(shapes["query_mean"][:2])] * 3,
            _plan,
            _run_plan,
        ),
        _adaptive_attention("adaptive_attention"),
        _adaptive_attention("adaptive_attention_masked", attn_mask=(torch.bool,)),
        _adaptive_attention("adaptive_attention_biased", attn_mask=FLOATS),
    )
}
"""By name, which is the type of the ONNX node."""
