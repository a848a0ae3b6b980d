"""Say how an operator is computed at a format, once for what runs it and for what writes it into a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils._pytree import tree_map

import adaattn.export.onnx.typed  # noqa: F401  defines the operators
from adaattn.export.allocation.sites import LINEAR
from adaattn.export.formats import FORMATS, FP8, FP32, stored
from adaattn.export.rewrite.match import SDPA

Call = Callable[..., Any]
_WHOLE = torch.ops.aten.layer_norm.default, torch.ops.aten.embedding.default  # no number of theirs is an operand


def compute(
    call: Call,
    node: Node,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    form: str,
    scales: Sequence[Any],
    typed: bool,
) -> Any:
    """Compute an operator at a format.

    Args:
        call: runs an operator, or writes it into a graph.
        node: the operator in its program.
        args, kwargs: its operands, in the carrier of the format; a mask of attention is as the program has it.
        form: of FORMATS.
        scales: of the operands of fp8: numbers for attention, else for each operand a tensor.
        typed: whether operands have the type of the carrier; if not, results are rounded to it.
    """
    carrier = FORMATS[form].carrier
    if node.target is SDPA and (typed or form != FP32):
        query, key, value, mask, causal, scale = attention_arguments(node, args, kwargs)
        mask = _narrow_mask(call, mask, form, typed)
        scales = scales or (1.0, 1.0, 1.0)
        return call(torch.ops.adaattn.typed_attention.default, query, key, value, mask, causal, scale, form, *scales)
    if form == FP8:
        first, second, *rest = args
        first, second = (
            call(torch.ops.adaattn.quantize_dequantize.default, x, scale, axis)
            for x, scale, axis in zip((first, second), scales, (0, 0), strict=True)
        )
        args = (first, second, *rest)
    elif not typed:
        args = stored_numbers(node, args, form)
    if not typed and node.target is LINEAR and len(args) > 2 and node.meta["val"].dim() != 2:
        # ONNX has a product and a sum, and rounds both.
        product = call(torch.ops.adaattn.rounded.default, call(LINEAR, *args[:2]), carrier)
        result = call(torch.ops.aten.add.Tensor, product, args[2])
    else:
        result = call(node.target, *args, **kwargs)
    return result if typed else call(torch.ops.adaattn.rounded.default, result, carrier)


def mask_of(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the mask among the arguments of a call of scaled_dot_product_attention; None of other nodes."""
    return attention_arguments(node, args, kwargs)[3] if node.target is SDPA else None


def _narrow_mask(call: Call, mask: Any, form: str, typed: bool) -> Any:
    """Return a mask in the carrier of a format, whose finite numbers stay finite.

    The least number of float32 often stands for -inf, but a query that has it for every key attends to all of them.
    """
    kind = mask.meta["val"] if isinstance(mask, Node) else mask
    if mask is None or kind.dtype == torch.bool or form == FP32:
        return mask
    aten, form = torch.ops.aten, FORMATS[form].carrier
    infinite, largest = call(aten.isinf.default, mask), FORMATS[form].largest
    finite = call(aten.clamp.default, mask, -largest, largest)
    mask = call(aten.where.self, infinite, mask, finite)
    return (
        call(aten.to.dtype, mask, FORMATS[form].dtype) if typed else call(torch.ops.adaattn.rounded.default, mask, form)
    )


def attention_arguments(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return query, key, value, mask, causality and scale of a call of scaled_dot_product_attention."""
    target, query = cast(OpOverload, node.target), cast(Node, node.args[0])
    given = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False)) | dict(kwargs)
    head_dim = query.meta["val"].shape[-1]
    scale = given.get("scale")
    scale = float(head_dim) ** -0.5 if scale is None else scale
    return (
        *(given[name] for name in ("query", "key", "value")),
        given.get("attn_mask"),
        bool(given.get("is_causal", False)),
        scale,
    )


def fp8_operands(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return what a node quantizes at fp8."""
    if node.target is SDPA:
        query, key, value, _, _, scale = attention_arguments(node, args, kwargs)
        return query * scale, key, value
    return tuple(args[:2])


def per_channel(node: Node) -> bool:
    """Return whether the second operand of a product has a scale for each index of its first dimension."""
    return node.target is LINEAR


def stored_numbers(node: Node, args: Sequence[Any], form: str) -> Sequence[Any]:
    """Return the arguments of an operator with its numbers as ONNX stores them: in the type of the operands."""
    if form == FP32 or node.target in _WHOLE:
        return args
    found: Sequence[Any] = tree_map(lambda x: stored(x, form) if isinstance(x, float) else x, tuple(args))
    return found
