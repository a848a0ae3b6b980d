"""Define the torch operators of a typed program that no operator of torch says, and translate them to ONNX.

Each is computed in the type of its operands, float64 included, and rounds as the ONNX operators do that it becomes: so
a program runs in eager PyTorch and in float64 with the roundings of its ONNX file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset19 as op
from torch import Tensor

from adaattn.export.formats import FORMATS, FP8, FP32, PROBABILITY_SCALE, quantized, rounded, stored
from adaattn.export.onnx import sdpa
from adaattn.ops.adaptive_attention.impl import reference

QUANTIZE, ATTENTION, ROUND = "adaattn::quantize_dequantize", "adaattn::typed_attention", "adaattn::rounded"
PLANNED = "adaattn::planned_attention"


@torch.library.custom_op(ROUND, mutates_args=())
def round_to(x: Tensor, form: str) -> Tensor:
    """Round numbers to a format and keep their type: what a cast to that format's type is in the emulated program."""
    made = rounded(x, form)
    return made.clone() if made is x else made  # an operator's result is never its argument


@torch.library.custom_op(QUANTIZE, mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Round numbers to fp8, as QuantizeLinear and DequantizeLinear do.

    Args:
        scale: one number, or one for each index of the axis.
    """
    return quantized(x, _along(scale, axis, x))


def _along(scale: Tensor, axis: int, x: Tensor) -> Tensor:
    """Return a scale of one number, or of one for each index of an axis, as it is broadcast to a tensor."""
    return scale.reshape([-1 if place == axis else 1 for place in range(x.dim())]) if scale.dim() else scale


@torch.library.custom_op(ATTENTION, mutates_args=())
def typed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    form: str,
    query_scale: float,
    key_scale: float,
    value_scale: float,
) -> Tensor:
    """Compute attention with scores, softmax weights and output in a format, as its decomposed ONNX form does.

    Args:
        form: of FORMATS; fp8 quantizes the operands of both products.
        query_scale, key_scale, value_scale: of fp8: queries are multiplied by the softmax scale before.
    """
    carrier = FORMATS[form].carrier

    def operand(x: Tensor, of: float) -> Tensor:
        x = rounded(x, carrier)
        return quantized(x, x.new_tensor(of)) if form == FP8 else x

    if query.dim() > 3 and query.shape[-3] != key.shape[-3]:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    query = query * rounded(query.new_tensor(scale), carrier)
    scores = rounded(operand(query, query_scale) @ operand(key, key_scale).mT, carrier)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        # float32 has such numbers for -inf, beside which a score is nothing.
        least = -FORMATS[carrier].largest
        scores = torch.where(attn_mask <= least, least, rounded(scores + attn_mask, carrier))
    weights = operand(scores.softmax(-1).nan_to_num(0.0), PROBABILITY_SCALE)  # NaN: a query that attends to nothing
    return rounded(weights @ operand(value, value_scale), carrier)


@torch.library.custom_op(PLANNED, mutates_args=())
def planned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    value_peak: Tensor,
    precision: Tensor,
    rank: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Compute `adaptive_attention` with constants for a batch of 1, which hold for every batch."""
    return reference.adaptive_attention(
        query, key, value, key_mean, value_peak, precision, rank, attn_mask, scale, is_causal
    )


@round_to.register_fake
def _(x: Tensor, form: str) -> Tensor:
    return torch.empty_like(x)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x)


@planned_attention.register_fake
@typed_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def translations(opset: int, targets: Collection[str] = ("onnx",)) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the translations for `torch.onnx.export` at an opset, for some targets."""
    plain = sdpa.translations(opset, targets)[torch.ops.aten.scaled_dot_product_attention.default]

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any,
        is_causal: bool,
        scale: float,
        form: str,
        query_scale: float,
        key_scale: float,
        value_scale: float,
    ) -> Any:
        if form == FP32:
            return plain(query, key, value, attn_mask, 0.0, is_causal, scale)
        if form != FP8 and sdpa.fits_one_node(opset, targets, query, key, value, attn_mask, scale):
            return sdpa.one_node(query, key, value, attn_mask, is_causal, stored(scale, form))
        scales = (query_scale, key_scale, value_scale, PROBABILITY_SCALE)
        quantize = [partial(_with_scale, kind=query.dtype, scale=each) for each in scales] if form == FP8 else None
        return sdpa.formula(query, key, value, attn_mask, is_causal, scale, query.dtype, quantize)[0]

    def quantize(x: Any, scale: Any, axis: int) -> Any:
        return _in_fp8(x, scale, axis)

    return {
        torch.ops.adaattn.typed_attention.default: attention,
        torch.ops.adaattn.quantize_dequantize.default: quantize,
    }


def _with_scale(x: Any, kind: int, scale: float) -> Any:
    return _in_fp8(x, op.Constant(value=ir.tensor(scale, dtype=ir.DataType(kind))))


def _in_fp8(x: Any, scale: Any, axis: int = 0) -> Any:
    # The zero point says the type, in the shape of the scale.
    zeros = np.zeros(() if scale.shape is None else tuple(scale.shape), ml_dtypes.float8_e4m3fn)
    zero = op.Constant(value=ir.tensor(zeros))
    given = {"axis": axis} if zeros.ndim else {}
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero, **given), scale, zero, **given)


def fold_weights(model: ir.Model) -> None:
    """Store weights as the numbers that QuantizeLinear makes of them."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "QuantizeLinear":
            continue
        source = node.inputs[0]
        numbers = [None if value is None else value.const_value for value in node.inputs[:2]]
        if source is None or source.name not in graph.initializers or any(each is None for each in numbers):
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        x, scale = (torch.from_numpy(np.asarray(each.numpy(), np.float32)) for each in numbers if each is not None)
        form = FORMATS[FP8]
        steps = (x / _along(scale, axis, x)).clamp(-form.largest, form.largest).to(form.dtype)
        name = f"{source.name}_{FP8}"
        stored = ir.Value(name=name, shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT8E4M3FN))
        stored.const_value = ir.tensor(steps.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), name=name)
        graph.initializers.add(stored)
        node.outputs[0].replace_all_uses_with(stored)
        graph.remove(node, safe=True)
    used = {value for node in ir.traversal.RecursiveGraphIterator(graph) for value in node.inputs}
    for name, value in list(graph.initializers.items()):
        if value not in used and value not in graph.outputs:
            del graph.initializers[name]
