"""Describe the ops once: names, types and axes of the tensors that they take and return, and their attributes.

ONNX schemas, the signatures of ONNX functions, TensorRT plugins and the tables of the native library are made from OPS,
and arguments of a call are found in it by name. A test holds it to the schemas that torch has of the ops.

An op with an optional mask is a variant for each type of mask in ONNX and TensorRT, where an input is not optional and
a type is not a question to ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FLOAT32, _INT32 = (torch.float32,), (torch.int32,)


@dataclass(frozen=True)
class Argument:
    """A tensor that an op takes or returns.

    Args:
        name: as in Python and in ONNX.
        axes: the name of each dimension; dimensions of one name are of one size.
        types: that it may have.
        like: the first input, where the type must be that of it.
        broadcasts: whether each dimension may be 1 instead.
    """

    name: str
    axes: tuple[str, ...]
    types: tuple[torch.dtype, ...]
    like: str | None = None
    broadcasts: bool = False


@dataclass(frozen=True)
class Signature:
    """An op, or one of its variants.

    Args:
        op: name of the op.
        name: name of the variant: that of the op where it has no mask.
        inputs, outputs: tensors, in order.
        attributes: by name, the default of the ONNX attribute; a bool is an ONNX integer.
        masks: an optional input that follows the others: for the last part of a variant's name the mask that it takes.
    """

    op: str
    name: str
    inputs: tuple[Argument, ...]
    attributes: Mapping[str, float | bool]
    outputs: tuple[Argument, ...]
    masks: Mapping[str, Argument] = field(default_factory=dict)

    @property
    def mask(self) -> Argument | None:
        """The mask that a variant takes."""
        return next((x for x in self.inputs if x.broadcasts), None)

    def place(self, name: str) -> int:
        """Return the position of an input.

        Example:
            >>> OPS["adaptive_attention"].place("rank")
            6
        """
        return [x.name for x in self.inputs].index(name)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The arguments of the op in torch, in order."""
        mask = [x.name for x in self.masks.values()][:1]
        return (*(x.name for x in self.inputs), *mask, *self.attributes, "impl")

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the arguments of a call of the op in torch by their names.

        Example:
            >>> OPS["token_moments"].bound((1, None), {"center": True})
            {'x': 1, 'key_mask': None, 'center': True}
        """
        return dict(zip(self.parameters, args, strict=False)) | dict(kwargs or {})

    def variant(self, mask: torch.dtype | None) -> Signature:
        """Return the variant of an op for a type of mask, or for no mask.

        Raises:
            KeyError: no mask may have this type.
        """
        if mask is None:
            return replace(self, masks={})
        for suffix, argument in self.masks.items():
            if mask in argument.types:
                return replace(self, name=f"{self.op}_{suffix}", inputs=(*self.inputs, argument), masks={})
        raise KeyError(mask)

    def sources(self) -> dict[str, tuple[int, int]]:
        """Return where the size of each axis is found: an input that does not broadcast, and its dimension."""
        found: dict[str, tuple[int, int]] = {}
        for place, argument in enumerate(self.inputs):
            for dim, axis in enumerate(() if argument.broadcasts else argument.axes):
                found.setdefault(axis, (place, dim))
        return found

    def sizes(self, shapes: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Return the size of each axis, from the shapes of the inputs."""
        return {axis: shapes[self.inputs[place].name][dim] for axis, (place, dim) in self.sources().items()}


def _heads(prefix: str, heads: str, names: Sequence[str]) -> tuple[Argument, ...]:
    """Return the moments of one tensor: per head and dimension, or per head alone."""
    axes = {"token_peak": ("batch", heads)}
    return tuple(Argument(prefix + x, axes.get(x, ("batch", heads, "head_dim")), _FLOAT32) for x in names)


def _one_per_head(names: Mapping[str, tuple[torch.dtype, ...]]) -> tuple[Argument, ...]:
    return tuple(Argument(name, ("batch", "heads"), types) for name, types in names.items())


_MOMENTS = ("mean", "second_moment", "channel_peak", "token_peak")
_QUERY = Argument("query", ("batch", "heads", "queries", "head_dim"), FLOATS)
_KEY = Argument("key", ("batch", "kv_heads", "keys", "head_dim"), FLOATS, like="query")
_SCORES = ("batch", "heads", "queries", "keys")

OPS = {
    signature.op: signature
    for signature in (
        Signature(
            "token_moments",
            "token_moments",
            (Argument("x", ("batch", "heads", "tokens", "head_dim"), FLOATS),),
            {"center": False},
            _heads("", "heads", _MOMENTS),
            {"masked": Argument("key_mask", ("batch", "heads", "tokens"), (torch.bool,), broadcasts=True)},
        ),
        Signature(
            "plan",
            "plan",
            (
                *_heads("query_", "heads", _MOMENTS),
                *_heads("key_", "kv_heads", _MOMENTS[1:]),
                *_heads("value_", "kv_heads", _MOMENTS[1:3]),
                Argument("ladder", ("codes and ranks", "steps"), (torch.int64,)),
            ),
            {"scale": 1.0, "limit": 0.0},
            _one_per_head({"precision": _INT32, "rank": _INT32, "predicted_error": _FLOAT32}),
        ),
        Signature(
            "adaptive_attention",
            "adaptive_attention",
            (
                *(_QUERY, _KEY, replace(_KEY, name="value")),
                *(Argument(x, ("batch", "kv_heads", "head_dim"), _FLOAT32) for x in ("key_mean", "value_peak")),
                *_one_per_head({"precision": _INT32, "rank": _INT32}),
            ),
            {"scale": 1.0, "is_causal": False},
            (replace(_QUERY, name="output", like="query"),),
            {
                "masked": Argument("attn_mask", _SCORES, (torch.bool,), broadcasts=True),
                "biased": Argument("attn_mask", _SCORES, FLOATS, broadcasts=True),
            },
        ),
    )
}
"""The ops by name, as torch knows them."""

VARIANTS = {
    variant.name: variant
    for op in OPS.values()
    for variant in (op.variant(None), *(op.variant(mask.types[0]) for mask in op.masks.values()))
}
"""The variants by name, which is the type of an ONNX node and the name of a plugin."""
