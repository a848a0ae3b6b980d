"""Say how an operator is computed at a format, once for what runs it and for what writes it into a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

import adaattn.export.onnx.typed  # noqa: F401  defines the operators
from adaattn.export.allocation.sites import LINEAR, attention_arguments
from adaattn.export.formats import FORMATS, FP8, FP32, PLUGIN, stored
from adaattn.export.rewrite.match import SDPA

Call = Callable[..., Any]
_WHOLE = torch.ops.aten.layer_norm.default, torch.ops.aten.embedding.default  # no number of theirs is an operand


def compute(
    call: Call,
    node: Node,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    form: str,
    constants: Sequence[Any],
    typed: bool,
) -> Any:
    """Compute an operator at a format.

    Args:
        call: runs an operator, or writes it into a graph.
        node: the operator in its program.
        args, kwargs: its operands, in the carrier of the format; a mask of attention is as the program has it.
        form: of FORMATS.
        constants: at fp8 the scales of the operands, numbers for attention, else for each operand a tensor. Of
            attention whose heads are planned, what `PlannedHeads.tensors` returns.
        typed: whether operands have the type of the carrier; if not, results are rounded to it.
    """
    carrier = FORMATS[form].carrier

    def convert(x: Any) -> Any:
        if typed:
            return call(torch.ops.aten.to.dtype, x, FORMATS[carrier].dtype)
        return call(torch.ops.adaattn.rounded.default, x, carrier)

    if node.target is SDPA and (typed or form != FP32):
        query, key, value, mask, causal, scale = attention_arguments(node, args, kwargs)
        if form == PLUGIN:
            op = torch.ops.adaattn.planned_attention.default
            result = call(op, query, key, value, *constants, mask, scale, causal)
            return result if typed else call(torch.ops.adaattn.rounded.default, result, carrier)
        mask = narrow_mask(call, mask, form, convert)
        scales = constants or (1.0, 1.0, 1.0)
        return call(torch.ops.adaattn.typed_attention.default, query, key, value, mask, causal, scale, form, *scales)
    if form == FP8:
        first, second, *rest = args
        first, second = (
            call(torch.ops.adaattn.quantize_dequantize.default, x, scale, axis)
            for x, scale, axis in zip((first, second), constants, (0, 0), strict=True)
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


def narrow_mask(call: Call, mask: Any, form: str, convert: Callable[[Any], Any]) -> Any:
    """Return a mask in the carrier of a format, whose finite numbers stay finite.

    The least number of float32 often stands for -inf, but a query that has it for every key attends to all of them.

    Args:
        convert: rounds it.
    """
    kind = mask.meta["val"] if isinstance(mask, Node) else mask
    if mask is None or form in (FP32, PLUGIN) or kind.dtype == torch.bool:
        return mask
    aten, largest = torch.ops.aten, FORMATS[FORMATS[form].carrier].largest
    infinite, finite = call(aten.isinf.default, mask), call(aten.clamp.default, mask, -largest, largest)
    return convert(call(aten.where.self, infinite, mask, finite))


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
