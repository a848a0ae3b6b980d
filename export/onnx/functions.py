"""Make the ONNX functions of the ops, which a runtime without a plugin for them computes.

`plan` and `token_moments` are made from their references. `adaptive_attention` is a text in ONNX's own syntax: its
reference works in blocks of queries and rounds to types that a graph cannot hold, fp8 above all. Its low precisions are
emulated in float32 by operators that every opset from 18 on and every TensorRT knows; tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx.parser

from adaattn.export.onnx.reference_function import over_onnx, reference_function
from adaattn.ops.plan.impl.reference import choose
from adaattn.ops.signatures import VARIANTS, Signature
from adaattn.ops.token_moments.impl.reference import token_moments
from adaattn.planning.error_model import Moments, Plan
from adaattn.plugins import NAMESPACE, VERSION

DOMAIN, DOMAIN_VERSION = "adaattn", 1
PLUGIN = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}
"""Attributes by which TensorRT finds the plugin of a node."""

# Rounding half to even, of x of either sign, to fp16 and fp8-e4m3 with saturation, and of p from 0 to 448 to e4m3.
#
# For p of exponent e the spacing of float32 near t = 2²⁰p is 2^(e-3), which is that of e4m3 near p; so t - p rounds p
# to it, and t - (t - p) is exact. For small p, t is held at 1.5·2¹⁴, whose spacing is 2⁻⁹, that of e4m3's subnormal
# numbers. No fp8 type: TensorRT-RTX takes none below sm_89, and cannot compile two calls of a function that holds
# QuantizeLinear.
_SIGNED_FP8 = """
    {x}_sign = Sign({x})
    {x}_magnitude = Abs({x})
    {x}_limited = Min({x}_magnitude, fp8_max)
    {x}_far = Mul({x}_limited, two_20)
    {x}_anchor = Max({x}_far, fp8_floor)
    {x}_near = Sub({x}_anchor, {x}_limited)
    {x}_rounded = Sub({x}_anchor, {x}_near)
    {x}_fp8 = Mul({x}_rounded, {x}_sign)
"""

_SIGNED_HALF = """
    {x}_above = Max({x}, fp16_min)
    {x}_within = Min({x}_above, fp16_max)
    {x}_half = Cast <to: int = 10> ({x}_within)
    {x}_fp16 = Cast <to: int = 1> ({x}_half)
    {x}_brain = Cast <to: int = 16> ({x})
    {x}_bf16 = Cast <to: int = 1> ({x}_brain)
"""

_SCORES_OPERAND = (
    _SIGNED_HALF
    + """
    {x}_magnitude = Abs({x})
    {x}_peak = ReduceMax <keepdims: int = 1> ({x}_magnitude, last_axis)
    {x}_step_raw = Div({x}_peak, int8_max)
    {x}_step = Max({x}_step_raw, tiny)
    {x}_steps = Div({x}, {x}_step)
    {x}_round = Round({x}_steps)
    {x}_round_above = Max({x}_round, int8_min)
    {x}_int8 = Min({x}_round_above, int8_max)
    {x}_if_bf16 = Where(is_bf16, {x}_bf16, {x})
    {x}_if_fp16 = Where(is_fp16, {x}_fp16, {x}_if_bf16)
    {x}_rounded = Where(is_integer, {x}_int8, {x}_if_fp16)
    {x}_unit = Where(is_integer, {x}_step, one)
"""
)

_ADAPTIVE_ATTENTION = f"""
    last_axis = Constant <value_ints: ints = [-1]> ()
    token_axis = Constant <value_ints: ints = [2]> ()
    head_axes = Constant <value_ints: ints = [2, 3]> ()
    zero_index = Constant <value_int: int = 0> ()
    one_index = Constant <value_int: int = 1> ()
    nothing = Constant <value_float: float = 0.0> ()
    one = Constant <value_float: float = 1.0> ()
    minus_infinity = Constant <value_float: float = -inf> ()
    lowest = Constant <value_float: float = -3.4028234e38> ()
    tiny = Constant <value_float: float = 1.1754943508222875e-38> ()
    int8_max = Constant <value_float: float = 127.0> ()
    int8_min = Constant <value_float: float = -127.0> ()
    fp16_max = Constant <value_float: float = 65504.0> ()
    fp16_min = Constant <value_float: float = -65504.0> ()
    fp8_max = Constant <value_float: float = 448.0> ()
    fp8_floor = Constant <value_float: float = 24576.0> ()
    two_20 = Constant <value_float: float = 1048576.0> ()
    scale_value = Constant <value_float: float = @scale> ()
    causal_value = Constant <value_int: int = @is_causal> ()
    bf16_code = Constant <value_int: int = 1> ()
    fp16_code = Constant <value_int: int = 2> ()
    int8_code = Constant <value_int: int = 3> ()
    fp8_code = Constant <value_int: int = 4> ()

    code_int32 = Unsqueeze(precision, head_axes)
    code = Cast <to: int = 7> (code_int32)
    is_bf16 = Equal(code, bf16_code)
    is_fp16 = Equal(code, fp16_code)
    is_int8 = Equal(code, int8_code)
    is_fp8 = Equal(code, fp8_code)
    is_integer = Or(is_int8, is_fp8)
    is_half = Or(is_fp16, is_int8)

    batch = Shape <start: int = 0, end: int = 1> (query)
    heads = Shape <start: int = 1, end: int = 2> (query)
    queries = Shape <start: int = 2, end: int = 3> (query)
    width = Shape <start: int = 3, end: int = 4> (query)
    kv_heads = Shape <start: int = 1, end: int = 2> (key)
    keys = Shape <start: int = 2, end: int = 3> (key)
    single = Constant <value_ints: ints = [1]> ()
    group = Div(heads, kv_heads)
    grouped = Concat <axis: int = 0> (batch, kv_heads, group, keys, width)
    repeated = Concat <axis: int = 0> (batch, heads, keys, width)
    grouped_row = Concat <axis: int = 0> (batch, kv_heads, group, width)
    repeated_row = Concat <axis: int = 0> (batch, heads, single, width)

    query_float = Cast <to: int = 1> (query)
    width_index = Squeeze(width)
    dims = Range(zero_index, width_index, one_index)
    rank_int32 = Unsqueeze(rank, head_axes)
    rank_index = Cast <to: int = 7> (rank_int32)
    kept = Less(dims, rank_index)
    q = Where(kept, query_float, nothing)

    key_float = Cast <to: int = 1> (key)
    key_mean_float = Cast <to: int = 1> (key_mean)
    key_mean_row = Unsqueeze(key_mean_float, token_axis)
    key_centered = Sub(key_float, key_mean_row)
    key_groups = Unsqueeze(key_centered, token_axis)
    key_expanded = Expand(key_groups, grouped)
    k = Reshape(key_expanded, repeated)

    value_float = Cast <to: int = 1> (value)
    value_groups = Unsqueeze(value_float, token_axis)
    value_expanded = Expand(value_groups, grouped)
    v = Reshape(value_expanded, repeated)
    value_peak_float = Cast <to: int = 1> (value_peak)
    peak_groups = Unsqueeze(value_peak_float, token_axis)
    peak_expanded = Expand(peak_groups, grouped_row)
    v_peak = Reshape(peak_expanded, repeated_row)

    {_SCORES_OPERAND.format(x="q")}
    {_SCORES_OPERAND.format(x="k")}
    v_step_raw = Div(v_peak, fp8_max)
    v_step = Max(v_step_raw, tiny)
    v_scaled = Div(v, v_step)
    {_SIGNED_HALF.format(x="v")}
    {_SIGNED_FP8.format(x="v_scaled")}
    v_if_bf16 = Where(is_bf16, v_bf16, v)
    v_if_half = Where(is_half, v_fp16, v_if_bf16)
    v_rounded = Where(is_fp8, v_scaled_fp8, v_if_half)
    fp8_unit = Div(v_step, fp8_max)
    v_unit = Where(is_fp8, fp8_unit, one)

    k_columns = Transpose <perm: ints = [0, 1, 3, 2]> (k_rounded)
    k_unit_columns = Transpose <perm: ints = [0, 1, 3, 2]> (k_unit)
    products = MatMul(q_rounded, k_columns)
    q_scale = Mul(q_unit, scale_value)
    products_q = Mul(products, q_scale)
    scores_raw = Mul(products_q, k_unit_columns)

    queries_index = Squeeze(queries)
    keys_index = Squeeze(keys)
    rows = Range(zero_index, queries_index, one_index)
    rows_column = Unsqueeze(rows, last_axis)
    columns = Range(zero_index, keys_index, one_index)
    columns_if_causal = Mul(columns, causal_value)
    may_attend = LessOrEqual(columns_if_causal, rows_column)
    {{mask}}

    row_max = ReduceMax <keepdims: int = 1> (scores, last_axis)
    row_peak = Max(row_max, lowest)
    distance = Sub(scores, row_peak)
    p = Exp(distance)
    total = ReduceSum <keepdims: int = 1> (p, last_axis)
    normalizer = Max(total, one)
    p_half = Cast <to: int = 10> (p)
    p_fp16 = Cast <to: int = 1> (p_half)
    p_brain = Cast <to: int = 16> (p)
    p_bf16 = Cast <to: int = 1> (p_brain)
    p_scaled = Mul(p, fp8_max)
    p_far = Mul(p_scaled, two_20)
    p_anchor = Max(p_far, fp8_floor)
    p_near = Sub(p_anchor, p_scaled)
    p_fp8 = Sub(p_anchor, p_near)
    p_if_bf16 = Where(is_bf16, p_bf16, p)
    p_if_half = Where(is_half, p_fp16, p_if_bf16)
    p_rounded = Where(is_fp8, p_fp8, p_if_half)
    sums = MatMul(p_rounded, v_rounded)
    sums_unit = Mul(sums, v_unit)
    attended = Div(sums_unit, normalizer)
    output = CastLike(attended, query)
"""

_MASK = {
    "adaptive_attention": "scores = Where(may_attend, scores_raw, minus_infinity)",
    "adaptive_attention_masked": """both = And(may_attend, attn_mask)
    scores = Where(both, scores_raw, minus_infinity)""",
    "adaptive_attention_biased": """bias = Cast <to: int = 1> (attn_mask)
    biased = Add(scores_raw, bias)
    scores = Where(may_attend, biased, minus_infinity)""",
}


def function(name: str, opset: int) -> onnx.FunctionProto:
    """Return the ONNX function of one variant of an op.

    Args:
        name: one of `adaattn.ops.signatures.VARIANTS`.
        opset: of the model that it goes into, 18 or newer.

    Example:
        >>> function("token_moments", 22).input
        ['x']

    Raises:
        KeyError: no such variant.
    """
    signature = VARIANTS[name]
    if signature.op in _REFERENCES:
        made = reference_function(signature, _REFERENCES[signature.op], DOMAIN, opset)
    else:
        inputs, outputs = (", ".join(x.name for x in xs) for xs in (signature.inputs, signature.outputs))
        made = onnx.parser.parse_function(
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]> {name} ({inputs}) => ({outputs}) '
            f"{{ {_ADAPTIVE_ATTENTION.format(mask=_MASK[name])} }}"
        )
    made.attribute_proto.extend(attributes(signature))
    return made


def attributes(signature: Signature) -> list[onnx.AttributeProto]:
    """Return the attributes of a node with their defaults: those of the op, and those that name its plugin."""
    of_op = {name: int(x) if isinstance(x, bool) else x for name, x in signature.attributes.items()}
    return [onnx.helper.make_attribute(name, x) for name, x in (of_op | PLUGIN).items()]


def _plan(given: Mapping[str, Any]) -> Sequence[Any]:
    # The error model reads neither the means of keys and values nor the token peaks of values.
    query, key, value = (
        Moments(*(given.get(f"{tensor}_{moment}", given["query_mean"]) for moment in Moments._fields))
        for tensor in ("query", "key", "value")
    )
    plan: Plan = over_onnx(choose)(query, key, value, given["ladder"], given["scale"], given["limit"])
    return plan


def _token_moments(given: Mapping[str, Any]) -> Sequence[Any]:
    moments: Sequence[Any] = over_onnx(token_moments)(given["x"], given.get("key_mask"), given["center"])
    return moments


_REFERENCES = {"plan": _plan, "token_moments": _token_moments}
