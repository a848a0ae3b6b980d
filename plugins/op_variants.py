"""Describe the ops' variants for plugins: the table of `adaattn.ops.signatures`, and the launch of each.

Python plugins, the native library and the tests read this. Sizes are integers, or the symbols by which TensorRT writes
a launch down before it knows them; +, -, * and // with an integer on the right serve both. Tensors are contiguous: a
plugin asks for the linear format.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaattn.errors import ConfigError
from adaattn.ops.adaptive_attention.impl.triton import MASK_STRIDES, attend_spec, launches
from adaattn.ops.dispatch import LARGEST_HEAD_DIM
from adaattn.ops.kernel_spec import KernelSpec
from adaattn.ops.plan.impl.triton import plan_spec
from adaattn.ops.signatures import VARIANTS as SIGNATURES
from adaattn.ops.signatures import Signature
from adaattn.ops.token_moments.impl.triton import moments_spec

Size = Any
Shape = Sequence[Size]

USUAL, SMALL = 1, 2
"""Tactics of attention: blocks as in eager mode, and blocks in 48 KiB of shared memory, which every launcher grants."""


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
        """The number of programs."""
        return self.spec.grid(self.sizes)

    @property
    def integers(self) -> list[Size]:
        """The kernel's integer arguments, in order, between its inputs and its outputs."""
        return [self.sizes[name] for name in self.spec.parameters if self.spec.arguments[name] == "i32"]


@dataclass(frozen=True)
class Variant:
    """An op with one set of inputs, as `adaattn.export` writes it into ONNX."""

    signature: Signature
    launch: Callable[[Node], Launch]
    tactics: tuple[int, ...] = (USUAL,)

    @property
    def name(self) -> str:
        """The name, which is the type of the ONNX node."""
        return self.signature.name

    @property
    def inputs(self) -> dict[str, tuple[torch.dtype, ...]]:
        """The types that each input may have: those that the kernels read."""
        return {x.name: tuple(t for t in x.types if t != torch.float64) for x in self.signature.inputs}

    @property
    def outputs(self) -> dict[str, torch.dtype | None]:
        """The type of each output; None is that of the first input."""
        return {x.name: None if x.like else x.types[0] for x in self.signature.outputs}

    @property
    def attributes(self) -> dict[str, type]:
        """The type of each attribute, float or int."""
        return {name: int if isinstance(x, bool) else float for name, x in self.signature.attributes.items()}

    @property
    def flag(self) -> str | None:
        """The attribute that a kernel is compiled for: `center` or `is_causal`."""
        return next((name for name, kind in self.attributes.items() if kind is int), None)

    def output_shapes(self, shapes: Mapping[str, Shape]) -> list[tuple[Size, ...]]:
        """Return the shapes of the outputs for those of the inputs."""
        sizes = self.signature.sizes(shapes)
        return [tuple(sizes[axis] for axis in x.axes) for x in self.signature.outputs]


def constant(size: Size) -> int | None:
    """Return a size that is known, None for a dynamic one."""
    if isinstance(size, int):
        return size
    return int(size.constant_value()) if size.is_constant else None


def _strides(shape: Shape) -> list[Size]:
    """Return the strides of a contiguous tensor; 0 for a dimension of 1, which may be broadcast."""
    strides: list[Size] = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, size * strides[0])
    return [0 if constant(size) == 1 else stride for size, stride in zip(shape, strides, strict=True)]


def head_dim(shape: Shape) -> int:
    """Return the last dimension, which a kernel is compiled for."""
    width = constant(shape[-1])
    if width is None or not 0 < width <= LARGEST_HEAD_DIM:
        said = "dynamic" if width is None else width
        raise ConfigError(f"head_dim is {said}; the plugins take a fixed one of at most {LARGEST_HEAD_DIM}")
    return width


def moments_sizes(shapes: Mapping[str, Shape]) -> dict[str, Size]:
    """Return the integer arguments of the kernels of `token_moments`."""
    sizes, mask = SIGNATURES["token_moments"].sizes(shapes), shapes.get("key_mask")
    sizes |= dict(zip(("x_b", "x_h", "x_s", "x_d"), _strides(shapes["x"]), strict=True))
    return sizes if mask is None else sizes | dict(zip(("m_b", "m_h", "m_s"), _strides(mask), strict=True))


def plan_sizes(shapes: Mapping[str, Shape]) -> dict[str, Size]:
    """Return the integer arguments of the kernel of `plan`."""
    return SIGNATURES["plan"].sizes(shapes)


def attention_sizes(shapes: Mapping[str, Shape]) -> dict[str, Size]:
    """Return the integer arguments of the kernels of `adaptive_attention`."""
    sizes, mask = SIGNATURES["adaptive_attention"].sizes(shapes), shapes.get("attn_mask")
    for name in ("query", "key", "value"):
        sizes |= dict(zip((f"{name[0]}_{axis}" for axis in "bhsd"), _strides(shapes[name]), strict=True))
    of_mask = (0, 0, 0, 0) if mask is None else _strides(mask)
    return sizes | dict(zip(MASK_STRIDES, of_mask, strict=True))


def attention_spec(node: Node, rows: tuple[int, ...], packed: bool, small: bool = False) -> KernelSpec:
    """Return the kernel of a node for some precisions, its scale left open."""
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
    spec = attention_spec(node, rows, packed=False, small=node.tactic == SMALL)
    return Launch(spec.bound(scale=scale), attention_sizes(node.shapes))


_OPS: dict[str, tuple[Callable[[Node], Launch], tuple[int, ...]]] = {
    "token_moments": (_moments, (USUAL,)),
    "plan": (_plan, (USUAL,)),
    "adaptive_attention": (_attention, (USUAL, SMALL)),
}

VARIANTS = {name: Variant(signature, *_OPS[signature.op]) for name, signature in SIGNATURES.items()}
"""By name, which is the type of the ONNX node."""
