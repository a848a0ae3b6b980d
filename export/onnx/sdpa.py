"""Translate `scaled_dot_product_attention` to ONNX, with the results of eager PyTorch in every runtime.

torch.onnx's own translation differs from eager in three ways: a query that may attend to nothing gets a mean of all
values or NaN where eager gives zeros, scores of float16 overflow, and ONNX Runtime's `Attention` does not broadcast a
mask over queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from onnxscript import opset23

from adaattn.errors import ExportError
from adaattn.export.formats import BF16, FORMATS, FP16, FP32
from adaattn.export.targets import take_attention

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


FORMS = {ir.DataType.FLOAT: FP32, ir.DataType.FLOAT16: FP16, ir.DataType.BFLOAT16: BF16}


def translations(opset: int, targets: Collection[str] = ("onnx",)) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return, for `torch.onnx.export`, the translations of torch's attention operators at an opset, for some targets.

    Programs that were decomposed before they were saved hold the second one.
    """

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        _refuse_dropout(dropout_p)
        scale = _scale(query, scale)
        # In 16-bit types the scores of one node overflow, and eager's do not.
        if query.dtype not in NARROW and fits_one_node(opset, targets, query, key, value, attn_mask, scale):
            return one_node(query, key, value, attn_mask, is_causal, scale)
        return formula(query, key, value, attn_mask, is_causal, scale, _score_type(query))[0]

    def flash_attention_for_cpu(
        query: Any,
        key: Any,
        value: Any,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        attn_mask: Any = None,
        scale: float | None = None,
    ) -> Any:
        _refuse_dropout(dropout_p)
        output, scores = formula(query, key, value, attn_mask, is_causal, _scale(query, scale), _score_type(query))
        return output, op.ReduceLogSumExp(scores, _ints(-1), keepdims=0)

    aten = torch.ops.aten
    return {
        aten.scaled_dot_product_attention.default: attention,
        aten._scaled_dot_product_flash_attention_for_cpu.default: flash_attention_for_cpu,
    }


def _refuse_dropout(p: float) -> None:
    if p:
        raise ExportError(
            f"the model calls scaled_dot_product_attention with dropout_p={p:g} in evaluation mode, which makes its "
            "results random; pass dropout_p=0.0 unless self.training is true"
        )


def _scale(query: Any, scale: float | None) -> Any:
    """Return the softmax scale: a number, or a value of the graph where the head size is dynamic."""
    if scale is not None:
        return scale
    if isinstance(query.shape[-1], int):
        return 1 / math.sqrt(query.shape[-1])
    return op.Reciprocal(op.Sqrt(op.Cast(op.Shape(query, start=-1), to=_score_type(query))))


def fits_one_node(
    opset: int, targets: Collection[str], query: Any, key: Any, value: Any, mask: Any, scale: Any
) -> bool:
    """Return whether all targets take ONNX's `Attention`, and it computes what eager does.

    It broadcasts nothing. ONNX Runtime takes the square root of the scale, and gives zeros to a query whose mask is all
    the least number of its type, for which eager gives the mean of the values.
    """
    operands = (query, key, value)
    heads, kv_heads = query.shape[1:2], key.shape[1:2]
    return (
        opset >= 23
        and all(x.dtype == query.dtype and len(x.shape) == 4 for x in operands)
        and query.dtype in FORMS
        and take_attention(targets, FORMS[query.dtype], [x.shape[-1] for x in operands], query is key is value)
        and _same(query.shape[0], key.shape[0], value.shape[0])
        and _same(*kv_heads, value.shape[1])
        and (_same(*heads, *kv_heads) or all(isinstance(size, int) for size in (*heads, *kv_heads)))
        and (mask is None or mask.dtype == ir.DataType.BOOL)
        and isinstance(scale, float)
        and scale > 0
    )


def one_node(query: Any, key: Any, value: Any, mask: Any, causal: bool, scale: float) -> Any:
    """Return the output of ONNX's `Attention`, with zeros for a query that may attend to nothing."""
    queries, keys = query.shape[2], key.shape[2]
    # Providers of ONNX Runtime align a causal mask differently where there are more keys than queries.
    if mask is None and (not causal or _same(queries, keys)):
        return opset23.Attention(query, key, value, is_causal=int(causal), scale=scale)[0]
    mask, some = _allowed(query, key, mask, causal)
    one = _ints(1)
    sizes = op.Concat(one, one, op.Shape(query, start=2, end=3), op.Shape(key, start=2, end=3), axis=0)
    attended = opset23.Attention(query, key, value, op.Expand(mask, sizes), scale=scale)[0]
    return attended if some is None else op.Where(some, attended, _number(0.0, query.dtype))


def formula(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    causal: bool,
    scale: Any,
    kind: int,
    quantize: Sequence[Callable[[Any], Any]] | None = None,
) -> tuple[Any, Any]:
    """Return the output, and the scores.

    Args:
        kind: type of the scores.
        quantize: what rounds the scaled queries, the transposed keys, the values and the softmax weights, if they are.
    """
    round_query, round_key, round_value, round_weights = quantize or [lambda x: x] * 4
    some = None
    q, k = (op.Cast(x, to=kind) if x.dtype != kind else x for x in (query, key))
    rank = len(key.shape)
    scaled = op.Mul(q, _number(scale, kind) if isinstance(scale, float) else scale)
    columns = op.Transpose(_per_query_head(k, key, query), perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(round_query(scaled), round_key(columns))
    if mask is not None or causal:
        added, some = _safe_mask(query, key, mask, causal, kind)
        scores = op.Add(scores, added)
        if mask is not None and mask.dtype == kind and kind in NARROW:
            # The least number stands for one of float32, beside which a score is nothing.
            least = _number(-FORMATS[FORMS[ir.DataType(kind)]].largest, kind)
            scores = op.Where(op.Equal(added, least), least, scores)
    weights = op.Softmax(scores, axis=-1)
    if kind != query.dtype:
        weights = op.Cast(weights, to=query.dtype)
    attended = op.MatMul(round_weights(weights), round_value(_per_query_head(value, value, query)))
    return attended if some is None else op.Where(some, attended, _number(0.0, query.dtype)), scores


def _safe_mask(query: Any, key: Any, mask: Any, causal: bool, kind: int) -> tuple[Any, Any]:
    """Return what to add to the scores, with no row that hides all keys, and which queries may attend to a key.

    A query without a key attends to all of them here, so that no runtime meets a softmax of nothing; the second result,
    or None where there is no such query, is there to set its output to zero.
    """
    zero, hidden = _number(0.0, kind), _number(-math.inf, kind)
    if mask is None or mask.dtype == ir.DataType.BOOL:
        allowed, some = _allowed(query, key, mask, causal)
        return op.Where(allowed, zero, hidden), some
    bias = mask if mask.dtype == kind else op.Cast(mask, to=kind)
    if causal:
        bias = op.Where(_causal(query, key), bias, hidden)
    some = op.Not(op.Equal(op.ReduceMax(bias, _ints(-1), keepdims=1), hidden))
    return op.Where(some, bias, zero), some


def _allowed(query: Any, key: Any, mask: Any, causal: bool) -> tuple[Any, Any]:
    """Return the boolean `_safe_mask` where nothing is added to the scores."""
    if mask is None:
        return _causal(query, key), None  # the first key is for all
    allowed = op.And(mask, _causal(query, key)) if causal else mask
    some = op.Cast(op.ReduceMax(op.Cast(allowed, to=ir.DataType.FLOAT), _ints(-1), keepdims=1), to=ir.DataType.BOOL)
    return op.Or(allowed, op.Not(some)), some


def _causal(query: Any, key: Any) -> Any:
    """Return a boolean (Sq, Sk): query i attends to keys j ≤ i."""
    zero, one = (op.Constant(value=ir.tensor(number, dtype=ir.DataType.INT64)) for number in (0, 1))
    rows, columns = (op.Range(zero, op.Squeeze(op.Shape(x, start=-2, end=-1)), one) for x in (query, key))
    return op.LessOrEqual(columns, op.Unsqueeze(rows, _ints(-1)))


def _per_query_head(x: Any, original: Any, query: Any) -> Any:
    """Return keys or values (..., Hk, S, D) with each head repeated for its query heads; one head is broadcast."""
    if len(original.shape) < 3:
        return x
    heads, kv_heads = query.shape[-3], original.shape[-3]
    if kv_heads == 1 or _same(heads, kv_heads):
        return x
    front, group = len(original.shape) - 2, op.Div(*(op.Shape(y, start=-3, end=-2) for y in (query, original)))
    ones = _ints(*[1] * front) if front else None
    repeats = op.Concat(*(y for y in (ones, group, _ints(1, 1)) if y is not None), axis=0)
    repeated = op.Expand(op.Unsqueeze(x, _ints(front)), repeats)
    shape = [op.Shape(original, start=-2), op.Shape(query, start=-3, end=-2)]
    if front > 1:
        shape.append(op.Shape(original, end=-3))
    return op.Reshape(repeated, op.Concat(*reversed(shape), axis=0))


def _score_type(query: Any) -> int:
    return ir.DataType.FLOAT if query.dtype in NARROW else query.dtype


def _same(first: Any, *others: Any) -> bool:
    """Return whether dimensions are known to be the same."""
    known = isinstance(first, int) or first.value is not None
    return known and all(first == other for other in others)


def _number(value: float, kind: int) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=ir.DataType(kind)))


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))
