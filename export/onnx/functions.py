"""The ops' arithmetic as ONNX functions: what a runtime computes that has no plugin of ours.

A FunctionProto has neither optional inputs that every runtime understands nor types to branch on, so an op has one
variant per kind of mask. Variants share their text. Low precisions are emulated in float32, as in the reference
implementations, by operators that every opset from 18 on and every TensorRT knows; tests hold the two together.

The file is long because it is three programs in ONNX's own text, read from top to bottom.
"""

from __future__ import annotations

import onnx
import onnx.parser

from adaattn.planning import precision
from adaattn.plugins import NAMESPACE, VERSION

DOMAIN, DOMAIN_VERSION = "adaattn", 1

PLAN = "plan"
TOKEN_MOMENTS = ("token_moments", "token_moments_masked")
ADAPTIVE_ATTENTION = ("adaptive_attention", "adaptive_attention_masked", "adaptive_attention_biased")

_PLUGIN_ATTRIBUTES = f'plugin_namespace: string = "{NAMESPACE}", plugin_version: string = "{VERSION}"'

_MOMENTS = ("second_moment", "channel_peak", "token_peak")
_PLAN = "precision, rank, predicted_error"

_TOKEN_MOMENTS = """
    token_axis = Constant <value_ints: ints = [2]> ()
    last_axis = Constant <value_ints: ints = [-1]> ()
    nothing = Constant <value_float: float = 0.0> ()
    one = Constant <value_float: float = 1.0> ()
    center_int = Constant <value_int: int = @center> ()
    center_float = Cast <to: int = 1> (center_int)
    everything = Cast <to: int = 1> (x)
    {count}
    total = ReduceSum <keepdims: int = 1> (attended, token_axis)
    mean_row = Div(total, tokens)
    shift = Mul(mean_row, center_float)
    centered_all = Sub(everything, shift)
    {keep_centered}
    square = Mul(centered, centered)
    square_total = ReduceSum <keepdims: int = 0> (square, token_axis)
    tokens_row = Squeeze(tokens, last_axis)
    second_moment = Div(square_total, tokens_row)
    magnitude = Abs(centered)
    channel_peak = ReduceMax <keepdims: int = 0> (magnitude, token_axis)
    peak = ReduceMax <keepdims: int = 0> (magnitude, last_axis)
    peak_square = Mul(peak, peak)
    peak_total = ReduceSum <keepdims: int = 0> (peak_square, token_axis)
    tokens_head = Squeeze(tokens_row, last_axis)
    token_peak = Div(peak_total, tokens_head)
    mean = Squeeze(mean_row, token_axis)
"""

_COUNT = {
    "token_moments": (
        """tokens_int = Shape <start: int = 2, end: int = 3> (x)
    tokens_float = Cast <to: int = 1> (tokens_int)
    column = Constant <value_ints: ints = [1, 1, 1, 1]> ()
    tokens = Reshape(tokens_float, column)
    attended = Identity(everything)""",
        "centered = Identity(centered_all)",
    ),
    "token_moments_masked": (
        """mask_column = Unsqueeze(key_mask, last_axis)
    attended = Where(mask_column, everything, nothing)
    mask_float = Cast <to: int = 1> (mask_column)
    rows = Shape <start: int = 0, end: int = 3> (x)
    single = Constant <value_ints: ints = [1]> ()
    mask_shape = Concat <axis: int = 0> (rows, single)
    mask_full = Expand(mask_float, mask_shape)
    tokens_masked = ReduceSum <keepdims: int = 1> (mask_full, token_axis)
    tokens = Max(tokens_masked, one)""",
        "centered = Where(mask_column, centered_all, nothing)",
    ),
}

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

_PER_QUERY_HEAD = """
    {x}_groups = Unsqueeze({x}, after_head)
    {x}_expanded = Expand({x}_groups, {shape})
    {x}_each = Reshape({x}_expanded, {flat})
"""


def _plan() -> str:
    """`adaattn.ops.plan.impl.reference.choose`, with its constants."""
    u = {"fp32": precision.FP32_U, "bf16": precision.BF16_U, "fp16": precision.FP16_U, "fp8": precision.FP8_U}
    twice = "\n".join(
        f"    {name}_noise = Constant <value_float: float = {2 * unit**2:.12e}> ()" for name, unit in u.items()
    )
    per_head = "".join(
        _PER_QUERY_HEAD.format(x=x, shape=f"grouped{kind}", flat=f"repeated{kind}")
        for x, kind in (
            ("key_second_moment", "_dims"),
            ("key_channel_peak", "_dims"),
            ("key_token_peak", ""),
            ("value_second_moment", "_dims"),
            ("value_channel_peak", "_dims"),
        )
    )
    return f"""
    last_axis = Constant <value_ints: ints = [-1]> ()
    after_head = Constant <value_ints: ints = [2]> ()
    zero_index = Constant <value_int: int = 0> ()
    one_index = Constant <value_int: int = 1> ()
    nothing = Constant <value_float: float = 0.0> ()
    one = Constant <value_float: float = 1.0> ()
    infinity = Constant <value_float: float = inf> ()
    scale_value = Constant <value_float: float = @scale> ()
    limit_value = Constant <value_float: float = @limit> ()
    scale_square = Mul(scale_value, scale_value)
{twice}
    int8_noise = Constant <value_float: float = {1 / (12 * 127**2):.12e}> ()
    fp16_underflow = Constant <value_float: float = {precision.FP16_STEP**2 / 12:.12e}> ()
    fp8_underflow = Constant <value_float: float = {precision.FP8_STEP**2 / 12:.12e}> ()
    three = Constant <value_float: float = 3.0> ()
    least_power = Constant <value_float: float = 1e-30> ()
    fp16_max = Constant <value_float: float = {precision.FP16_MAX}> ()
    bf16_max = Constant <value_float: float = {precision.BF16_MAX}> ()

    batch = Shape <start: int = 0, end: int = 1> (query_second_moment)
    heads = Shape <start: int = 1, end: int = 2> (query_second_moment)
    width = Shape <start: int = 2, end: int = 3> (query_second_moment)
    kv_heads = Shape <start: int = 1, end: int = 2> (key_second_moment)
    group = Div(heads, kv_heads)
    grouped = Concat <axis: int = 0> (batch, kv_heads, group)
    grouped_dims = Concat <axis: int = 0> (batch, kv_heads, group, width)
    repeated = Concat <axis: int = 0> (batch, heads)
    repeated_dims = Concat <axis: int = 0> (batch, heads, width)
    {per_head}

    query_scaled = Mul(query_mean, scale_value)
    gaps_signed = Mul(query_scaled, key_channel_peak_each)
    gaps = Abs(gaps_signed)
    gap = ReduceMax <keepdims: int = 0> (gaps, last_axis)
    gap_twice = Add(gap, gap)
    rarity = Exp(gap_twice)
    rarity2 = Mul(rarity, three)
    products = Mul(query_second_moment, key_second_moment_each)
    energy = Mul(products, scale_square)
    energy_total = ReduceSum <keepdims: int = 0> (energy, last_axis)
    gap_square = Mul(gap, gap)
    total = Add(energy_total, gap_square)
    q_power = ReduceSum <keepdims: int = 0> (query_second_moment, last_axis)
    k_power = ReduceSum <keepdims: int = 0> (key_second_moment_each, last_axis)
    v_mean = ReduceMean <keepdims: int = 0> (value_second_moment_each, last_axis)
    v_power = Max(v_mean, least_power)
    v_peaks = Mul(value_channel_peak_each, value_channel_peak_each)
    v_peak2 = ReduceMean <keepdims: int = 0> (v_peaks, last_axis)
    v_peak = ReduceMax <keepdims: int = 0> (value_channel_peak_each, last_axis)
    q_peak = ReduceMax <keepdims: int = 0> (query_channel_peak, last_axis)
    k_peak = ReduceMax <keepdims: int = 0> (key_channel_peak_each, last_axis)
    peak = Max(q_peak, k_peak, v_peak)

    q_steps = Mul(query_token_peak, k_power)
    k_steps = Mul(key_token_peak_each, q_power)
    steps = Add(q_steps, k_steps)
    integer_unit = Mul(scale_square, int8_noise)
    integer = Mul(steps, integer_unit)
    fp16_spread = Div(one, v_power)
    fp16_steps = Add(fp16_spread, rarity2)
    fp16_floor = Mul(fp16_steps, fp16_underflow)
    fp16_values = Add(fp16_floor, fp16_noise)
    fp8_spread = Div(v_peak2, v_power)
    fp8_steps = Add(fp8_spread, rarity2)
    fp8_floor = Mul(fp8_steps, fp8_underflow)
    fp8_values = Add(fp8_floor, fp8_noise)
    fp16_relative = Mul(total, fp16_noise)
    powers = Add(q_power, k_power)
    fp16_power_unit = Mul(scale_square, fp16_underflow)
    fp16_absolute = Mul(powers, fp16_power_unit)
    fp16_scores = Add(fp16_relative, fp16_absolute)
    relative = Add(total, one)

    row_fp32 = Mul(relative, fp32_noise)
    bf16_fits = LessOrEqual(peak, bf16_max)
    bf16_error = Mul(relative, bf16_noise)
    row_bf16 = Where(bf16_fits, bf16_error, infinity)
    fp16_fits = LessOrEqual(peak, fp16_max)
    fp16_error = Add(fp16_scores, fp16_values)
    row_fp16 = Where(fp16_fits, fp16_error, infinity)
    int8_fits = LessOrEqual(v_peak, fp16_max)
    int8_error = Add(integer, fp16_values)
    row_int8 = Where(int8_fits, int8_error, infinity)
    row_int8_fp8 = Add(integer, fp8_values)
    column_0 = Unsqueeze(row_fp32, last_axis)
    column_1 = Unsqueeze(row_bf16, last_axis)
    column_2 = Unsqueeze(row_fp16, last_axis)
    column_3 = Unsqueeze(row_int8, last_axis)
    column_4 = Unsqueeze(row_int8_fp8, last_axis)
    noise = Concat <axis: int = -1> (column_0, column_1, column_2, column_3, column_4)

    codes = Gather <axis: int = 0> (ladder, zero_index)
    ranks = Gather <axis: int = 0> (ladder, one_index)
    width_index = Squeeze(width)
    dims = Range(zero_index, width_index, one_index)
    ranks_column = Unsqueeze(ranks, last_axis)
    cut = GreaterOrEqual(dims, ranks_column)
    energy_row = Unsqueeze(energy, after_head)
    energy_cut = Where(cut, energy_row, nothing)
    tails = ReduceSum <keepdims: int = 0> (energy_cut, last_axis)
    rounding = Gather <axis: int = -1> (noise, codes)
    squared = Add(rounding, tails)
    known = GreaterOrEqual(squared, nothing)
    squared_or_inf = Where(known, squared, infinity)
    error = Sqrt(squared_or_inf)

    steps_shape = Shape <start: int = 0, end: int = 1> (codes)
    steps_count = Squeeze(steps_shape)
    last = Sub(steps_count, one_index)
    step = Range(zero_index, steps_count, one_index)
    within = LessOrEqual(error, limit_value)
    candidates = Where(within, step, last)
    choice = ReduceMin <keepdims: int = 0> (candidates, last_axis)
    precision_index = Gather <axis: int = 0> (codes, choice)
    precision = Cast <to: int = 6> (precision_index)
    rank_index = Gather <axis: int = 0> (ranks, choice)
    rank = Cast <to: int = 6> (rank_index)
    choice_column = Unsqueeze(choice, last_axis)
    chosen = GatherElements <axis: int = -1> (error, choice_column)
    predicted_error = Squeeze(chosen, last_axis)
"""


_MASK = {
    "adaptive_attention": "scores = Where(may_attend, scores_raw, minus_infinity)",
    "adaptive_attention_masked": """both = And(may_attend, attn_mask)
    scores = Where(both, scores_raw, minus_infinity)""",
    "adaptive_attention_biased": """bias = Cast <to: int = 1> (attn_mask)
    biased = Add(scores_raw, bias)
    scores = Where(may_attend, biased, minus_infinity)""",
}


def body(name: str, opset: int) -> onnx.FunctionProto:
    """The function of one op variant.

    Args:
        name: PLAN, or one of TOKEN_MOMENTS or ADAPTIVE_ATTENTION.
        opset: of the model that it goes into, 18 or newer.

    Example:
        >>> body("token_moments", 22).input
        ['x']

    Raises:
        KeyError: no such variant.
    """
    if name == PLAN:
        text = _plan()
        inputs = ", ".join(
            f"{x}_{moment}"
            for x, moments in (("query", ("mean", *_MOMENTS)), ("key", _MOMENTS), ("value", _MOMENTS[:2]))
            for moment in moments
        )
        signature = f"<scale: float = 1.0, limit: float = 0.0, {_PLUGIN_ATTRIBUTES}> ({inputs}, ladder) => ({_PLAN})"
    elif name in TOKEN_MOMENTS:
        count, keep_centered = _COUNT[name]
        text = _TOKEN_MOMENTS.format(count=count, keep_centered=keep_centered)
        inputs = "x" if name == "token_moments" else "x, key_mask"
        signature = (
            f"<center: int = 0, {_PLUGIN_ATTRIBUTES}> ({inputs}) => (mean, second_moment, channel_peak, token_peak)"
        )
    else:
        text = _ADAPTIVE_ATTENTION.format(mask=_MASK[name])
        inputs = "query, key, value, key_mean, value_peak, precision, rank"
        inputs += "" if name == "adaptive_attention" else ", attn_mask"
        signature = f"<scale: float = 1.0, is_causal: int = 0, {_PLUGIN_ATTRIBUTES}> ({inputs}) => (output)"
    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]> {name} {signature} {{ {text} }}'
    )
