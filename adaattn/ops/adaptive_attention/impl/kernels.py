"""Define the fused kernels of `adaptive_attention`: `pack` rounds keys and values once, `attend` does the rest.

`attend` is a flash-attention loop [Dao, arXiv:2307.08691], compiled for each precision and each class of rank; a
program reads the plan of its head and takes one of them. What a precision rounds keys and values to, `pack` has written
before: int8 keys and their steps, e4m3 values transposed as Hopper's tensor cores read them, fp16 copies of inputs of
another type. Without packed operands `attend` rounds tiles on its way, again for every block of queries: right for a
few queries, and where there is no scratch memory.

float32 is made of what tensor cores have: tf32x3 for float32 inputs; for 16-bit ones, whose products are exact, P is
split into parts of their type.

Three liberties, each no further from float64 than the reference: keys of the head's own type are not centred, since
only the difference would be rounded; probabilities are rounded relative to the running maximum of their row; where the
hardware has no e4m3 products (before sm_89), int8_fp8 runs as int8.

Suffixes _b, _h, _s and _d are strides of a batch, head, token and dimension. The file is long because the loop is one
idea.

One file, though long: Triton compiles a kernel with all the functions that it calls, read from top to bottom.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adaattn.planning.precision import PRECISIONS

PADDING = tl.constexpr(128)  # packed values have a multiple of this many tokens, the largest block of keys

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1.1754943508222875e-38)
HUGE = tl.constexpr(3.0e38)
NO_FRACTION = tl.constexpr(12582912.0)  # 1.5·2²³: a float32 this large has no room for one

FP32_ROW, BF16_ROW, FP16_ROW, INT8_ROW, INT8_FP8_ROW = (tl.constexpr(code) for code in range(len(PRECISIONS)))
BOOLEAN, ADDITIVE = tl.constexpr(1), tl.constexpr(2)


@triton.constexpr_function
def first_piece(width, least):
    """Return the first piece of a width: tensors are powers of two wide, and two may cover it more tightly."""
    whole = max(triton.next_power_of_2(width), least)
    half = whole // 2
    rest = max(triton.next_power_of_2(max(width - half, 1)), least)
    return half if least <= half and half + rest < whole else whole


@triton.constexpr_function
def second_piece(width, least):
    """Return the width of a block's second piece: what a width leaves beyond the largest power of two."""
    rest = width - first_piece(width, least)
    return max(triton.next_power_of_2(rest), least) if rest > 0 else 0


@triton.constexpr_function
def rank_class(head_dim, quarters):
    """Return the rank that a number of quarters of head_dim makes, rounded up."""
    return -(-head_dim * quarters // 4)


@triton.constexpr_function
def has(rows, row):
    """Return whether a launch serves a precision."""
    return row in rows


@triton.constexpr_function
def operand_types(row, inputs):
    """Return the types of the operands of q·k and of P·v."""
    return {
        0: (inputs, inputs),  # products of 16-bit numbers are exact
        1: (tl.bfloat16, tl.bfloat16),
        2: (tl.float16, tl.float16),
        3: (tl.int8, tl.float16),
        4: (tl.int8, tl.float8e4nv),
    }[row]


@triton.constexpr_function
def log2_of_scale(row, inputs):
    """Return log2 of the static scale of P, which puts a probability of 1 high in the range of its type."""
    if row == 0 and inputs == tl.float16:
        return 15.0
    return 8.807354922057604 if row == 4 else 0.0  # log2(448)


@triton.jit
def _packed_value(start, row, column, DIM: tl.constexpr):
    """Return where `pack` puts a value: blocks of PADDING tokens, transposed; `row` counts from `start`."""
    start = tl.cast(start, tl.int64)
    return start // PADDING * (PADDING * DIM) + start % PADDING + (row + column * PADDING)


@triton.jit
def _tile(base, start, stride, step, end, FIRST, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Load rows from `start` and columns from FIRST of a matrix of `end` rows and DIM columns; zeros outside it."""
    row = tl.arange(0, ROWS)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    if base.dtype.element_ty == tl.float8e4nv:
        at = base + _packed_value(start, row, column, DIM)
        x = tl.load(at, mask=column < DIM)
    else:
        at = base + tl.cast(start, tl.int64) * stride + (row * stride + column * step)
        x = tl.load(at, mask=(start + row < end) & (column < DIM), other=0)
    return x


@triton.jit
def _vector(base, FIRST, WIDTH: tl.constexpr, DIM: tl.constexpr):
    column = FIRST + tl.arange(0, WIDTH)
    return tl.load(base + column, mask=column < DIM, other=0)


@triton.jit
def _centred(
    base, start, stride, step, end, mean,
    FIRST, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    x = _tile(base, start, stride, step, end, FIRST, WIDTH, DIM, ROWS).to(tl.float32)
    return x - _vector(mean, FIRST, WIDTH, DIM)[None, :]


@triton.jit
def _rounded(x, TYPE: tl.constexpr):
    """Cast with saturation: a masked token may be out of range, and inf times a probability of 0 is NaN."""
    x = x.to(tl.float32)
    if TYPE == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    elif TYPE == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    return x.to(TYPE)


@triton.jit
def _integers(x, step):
    """Round x / step to an integer, half to even."""
    n = (tl.div_rn(x, tl.broadcast_to(step[:, None], x.shape)) + NO_FRACTION) - NO_FRACTION
    return tl.minimum(tl.maximum(n, -127.0), 127.0).to(tl.int8)


@triton.jit
def _int8_step(peak):
    return tl.maximum(peak / 127.0, TINY)


@triton.jit
def _fp8_step(value_peak, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    return tl.maximum(_vector(value_peak, FIRST, WIDTH, DIM) / 448.0, TINY)


@triton.jit
def _key_step(key, start, k_s, k_d, keys, key_mean, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Return the int8 scale of each key, over all its dimensions: heads of different ranks share it."""
    FIRST: tl.constexpr = first_piece(DIM, 16)
    SECOND: tl.constexpr = second_piece(DIM, 16)
    peak = tl.max(tl.abs(_centred(key, start, k_s, k_d, keys, key_mean, 0, FIRST, DIM, ROWS)), 1)
    if SECOND:
        rest = _centred(key, start, k_s, k_d, keys, key_mean, FIRST, SECOND, DIM, ROWS)
        peak = tl.maximum(peak, tl.max(tl.abs(rest), 1))
    return _int8_step(peak)


@triton.jit
def _keys(
    key, start, k_s, k_d, keys, key_mean, k_step,
    FIRST, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    if key.dtype.element_ty == TYPE and TYPE != tl.float32:
        x = _tile(key, start, k_s, k_d, keys, FIRST, WIDTH, DIM, ROWS)
    else:
        x = _centred(key, start, k_s, k_d, keys, key_mean, FIRST, WIDTH, DIM, ROWS)
        if TYPE == tl.int8:
            x = _integers(x, k_step)
        else:
            x = _rounded(x, TYPE)
    return x


@triton.jit
def _values(
    value, start, v_s, v_d, keys, value_peak,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    x = _tile(value, start, v_s, v_d, keys, FIRST, WIDTH, DIM, ROWS)
    if value.dtype.element_ty != TYPE:
        if TYPE == tl.float8e4nv:
            x = tl.div_rn(x.to(tl.float32), tl.broadcast_to(_fp8_step(value_peak, FIRST, WIDTH, DIM)[None, :], x.shape))
        x = _rounded(x, TYPE)
    return x


@triton.jit
def _queries(
    query, start, q_s, q_d, queries, rank,
    FIRST, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Load with zeros from the rank on: only what comes from a load is multiplied from shared memory."""
    row = tl.arange(0, ROWS)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    at = query + tl.cast(start, tl.int64) * q_s + (row * q_s + column * q_d)
    return tl.load(at, mask=(start + row < queries) & (column < rank), other=0)


@triton.jit
def _reloaded(own, x, rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    at = own + (row * DIM + column)
    inside = (row < rows) & (column < DIM)
    tl.store(at, x, mask=inside)
    tl.debug_barrier()
    return tl.load(at, mask=inside, other=0)


@triton.jit
def _product(q, k, scores):
    """Return scores + q·kᵀ."""
    if q.dtype == tl.float32:
        scores = tl.dot(q, tl.trans(k), scores, input_precision="tf32x3")
    elif q.dtype == tl.int8:
        scores = tl.dot(q, tl.trans(k), scores, out_dtype=tl.int32)
    else:
        scores = tl.dot(q, tl.trans(k), scores)
    return scores


@triton.jit
def _weighted(p, v, total, ROW: tl.constexpr):
    """Return total + P·v."""
    if ROW == INT8_FP8_ROW:
        total += tl.dot(p.to(v.dtype), v)  # tensor cores keep few bits of an fp8 sum: the long one is left to float32
    elif ROW != FP32_ROW:
        total = tl.dot(p.to(v.dtype), v, total)
    elif v.dtype == tl.float32:
        total = tl.dot(p, v, total, input_precision="tf32x3")
    else:
        for _ in tl.static_range(2 if v.dtype == tl.float16 else 3):  # parts of 11 or 8 bits, products exact
            part = p.to(v.dtype)
            total = tl.dot(part, v, total)
            p -= part.to(tl.float32)
    return total


@triton.jit
def _store(
    output, start, queries, x, value_peak,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    if TYPE == tl.float8e4nv:
        x = x * _fp8_step(value_peak, FIRST, WIDTH, DIM)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    at = output + tl.cast(start, tl.int64) * DIM + (row * DIM + column)
    tl.store(at, x.to(output.dtype.element_ty), mask=(start + row < queries) & (column < DIM))


@triton.jit
def _attend(
    query, key, value, key_mean, value_peak, key_step, mask, output, rank, first_query, queries, keys,
    q_s, q_d, k_s, k_d, v_s, v_d, m_q, m_k, scale,
    ROW: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    MASK_OF_QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with one block of queries of one head, at one precision, with the first WIDTH dimensions of q and k."""
    QK: tl.constexpr = operand_types(ROW, query.dtype.element_ty)[0]
    PV: tl.constexpr = operand_types(ROW, query.dtype.element_ty)[1]
    LEAST: tl.constexpr = 32 if QK == tl.int8 else 16
    K1: tl.constexpr = first_piece(WIDTH, LEAST)
    K2: tl.constexpr = second_piece(WIDTH, LEAST)
    V1: tl.constexpr = first_piece(DIM, 16)
    V2: tl.constexpr = second_piece(DIM, 16)
    SOME: tl.constexpr = 32 if WIDTH > 32 else first_piece(WIDTH, 16)

    # Scores are in units of log 2. The unit is above 0: -inf times it stays -inf.
    unit = tl.full([BLOCK_M], 1.0, tl.float32) * tl.maximum(scale * LOG2E, 1e-30)
    if QK != tl.float32:
        q1 = _queries(query, first_query, q_s, q_d, queries, rank, 0, K1, DIM, BLOCK_M)
        if K2:
            q2 = _queries(query, first_query, q_s, q_d, queries, rank, K1, K2, DIM, BLOCK_M)
    if QK == tl.int8:
        q1 = q1.to(tl.float32)
        peak = tl.max(tl.abs(q1), 1)
        if K2:
            q2 = q2.to(tl.float32)
            peak = tl.maximum(peak, tl.max(tl.abs(q2), 1))
        q_step = _int8_step(peak)
        unit = tl.maximum(unit * q_step, TINY)
        q1 = _integers(q1, q_step)
        if K2:
            q2 = _integers(q2, q_step)
    elif query.dtype.element_ty != QK:
        q1 = _rounded(q1, QK)
        if K2:
            q2 = _rounded(q2, QK)
    if query.dtype.element_ty != QK:
        # By way of the output, whose rows nobody else writes: only what comes from a load is multiplied from shared
        # memory, and from registers Hopper's products would wait for each other.
        own = (output + tl.cast(first_query, tl.int64) * DIM).to(tl.pointer_type(QK))
        q1 = _reloaded(own, q1, queries - first_query, 0, K1, DIM, BLOCK_M)
        if K2:
            q2 = _reloaded(own, q2, queries - first_query, K1, K2, DIM, BLOCK_M)

    row = first_query + tl.arange(0, BLOCK_M)
    maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sum1 = tl.zeros([BLOCK_M, V1], tl.float32)
    if V2:
        sum2 = tl.zeros([BLOCK_M, V2], tl.float32)
    end = keys
    unchecked = keys // BLOCK_N * BLOCK_N  # blocks before this key are open to all queries
    if CAUSAL:
        end = tl.minimum(keys, first_query + BLOCK_M)
        unchecked = tl.minimum(unchecked, (first_query + 1) // BLOCK_N * BLOCK_N)

    for start in tl.range(0, end, BLOCK_N, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_N)
        k_step = tl.zeros([BLOCK_N], tl.float32)
        if QK == tl.int8:
            if key.dtype.element_ty == tl.int8:
                k_step = tl.load(key_step + column, mask=column < keys, other=0)
            else:
                k_step = _key_step(key, start, k_s, k_d, keys, key_mean, DIM, BLOCK_N)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if QK == tl.int8 else tl.float32)
        if QK == tl.float32:
            # Both halves of a tf32x3 operand live in registers: q comes anew, some dimensions at a time.
            for first in tl.range(0, WIDTH, SOME, num_stages=1, loop_unroll_factor=4 if WIDTH <= 128 else 1):
                q = _queries(query, first_query, q_s, q_d, queries, rank, first, SOME, DIM, BLOCK_M)
                k = _keys(key, start, k_s, k_d, keys, key_mean, k_step, first, SOME, DIM, BLOCK_N, QK)
                scores = _product(q, k, scores)
        else:
            k1 = _keys(key, start, k_s, k_d, keys, key_mean, k_step, 0, K1, DIM, BLOCK_N, QK)
            scores = _product(q1, k1, scores)
            if K2:
                k2 = _keys(key, start, k_s, k_d, keys, key_mean, k_step, K1, K2, DIM, BLOCK_N, QK)
                scores = _product(q2, k2, scores)
        if QK == tl.int8:
            scores = scores.to(tl.float32) * k_step[None, :]

        if MASK:
            inside = (column < keys)[None, :]
            at = mask + tl.cast(start, tl.int64) * m_k + (tl.arange(0, BLOCK_N) * m_k)[None, :]
            if MASK_OF_QUERIES:
                inside = inside & (row < queries)[:, None]
                at += tl.cast(first_query, tl.int64) * m_q + (tl.arange(0, BLOCK_M) * m_q)[:, None]
            bias = tl.load(at, mask=inside, other=0)
            if MASK == BOOLEAN:
                scores = tl.where(bias != 0, scores, -float("inf"))
            else:
                bias = bias.to(tl.float32)
                shut = bias == -float("inf")
                bias = tl.minimum(tl.maximum(bias * LOG2E, -HUGE), HUGE)  # the largest finite masks stay finite
                scores = tl.where(shut, -float("inf"), scores * unit[:, None] + bias)
        if start >= unchecked:
            is_open = (column < keys)[None, :]
            if CAUSAL:
                is_open = is_open & (column[None, :] <= row[:, None])
            scores = tl.where(is_open, scores, -float("inf"))

        peak = tl.max(scores, 1)
        if MASK != ADDITIVE:
            peak *= unit
        peak = tl.maximum(maximum, peak)
        shift = tl.where(peak == -float("inf"), 0.0, peak)  # of a row that has met no key yet
        alpha = tl.exp2(maximum - shift)
        shift -= log2_of_scale(ROW, query.dtype.element_ty)
        if MASK == ADDITIVE:
            p = tl.exp2(scores - shift[:, None])
        else:
            p = tl.exp2(scores * unit[:, None] - shift[:, None])
        maximum = peak
        total = total * alpha + tl.sum(p, 1)
        v1 = _values(value, start, v_s, v_d, keys, value_peak, 0, V1, DIM, BLOCK_N, PV)
        sum1 = _weighted(p, v1, sum1 * alpha[:, None], ROW)
        if V2:
            v2 = _values(value, start, v_s, v_d, keys, value_peak, V1, V2, DIM, BLOCK_N, PV)
            sum2 = _weighted(p, v2, sum2 * alpha[:, None], ROW)

    total = tl.where(total == 0, 1.0, total)[:, None]
    _store(output, first_query, queries, sum1 / total, value_peak, 0, V1, DIM, BLOCK_M, PV)
    if V2:
        _store(output, first_query, queries, sum2 / total, value_peak, V1, V2, DIM, BLOCK_M, PV)


@triton.jit(do_not_specialize=["heads", "kv_heads", "queries", "keys"])
def attend(
    query, key, value, key_mean, value_peak, precision, rank, mask, key8, key_step, value8, key16, value16,
    heads, kv_heads, queries, keys, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, m_b, m_h, m_q, m_k,
    scale, output,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, MASK_OF_QUERIES: tl.constexpr,
    PACKED: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, PROGRAM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend with one block of queries of one head, by the head's plan.

    Of heads whose precision is not among ROWS, which another launch serves, nothing is written.
    """
    blocks = tl.cdiv(queries, PROGRAM)
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest first
    head = tl.program_id(0) // blocks
    b, h = tl.cast(head // heads, tl.int64), head % heads
    g = h // (heads // kv_heads)
    of_kv = b * kv_heads + g
    # Whatever the plan says, some loop serves every head.
    LAST: tl.constexpr = INT8_FP8_ROW if FP8 else INT8_ROW
    code = tl.minimum(tl.maximum(tl.load(precision + head), FP32_ROW), LAST)
    r = tl.minimum(tl.load(rank + head), DIM)
    quarters = tl.cdiv(tl.maximum(r, 1) * 4, DIM)
    path = code * 4 + quarters  # one number, since what is compared lives in registers

    query += b * q_b + tl.cast(h, tl.int64) * q_h
    key += b * k_b + tl.cast(g, tl.int64) * k_h
    value += b * v_b + tl.cast(g, tl.int64) * v_h
    key_mean += of_kv * DIM
    value_peak += of_kv * DIM
    output += tl.cast(head, tl.int64) * queries * DIM
    if MASK:
        mask += b * m_b + tl.cast(h, tl.int64) * m_h
    for ROW in tl.static_range(5):
        if has(ROWS, ROW):
            k, s, d, v, t, e, steps = key, k_s, k_d, value, v_s, v_d, key_step
            if PACKED:
                if ROW >= INT8_ROW:
                    k, s, d, steps = key8 + of_kv * keys * DIM, DIM, 1, key_step + of_kv * keys
                elif ROW == FP16_ROW and query.dtype.element_ty != tl.float16:
                    k, s, d = key16 + of_kv * keys * DIM, DIM, 1
                if ROW == INT8_FP8_ROW:
                    v = value8 + of_kv * (tl.cdiv(keys, PADDING) * PADDING) * DIM
                elif ROW >= FP16_ROW and query.dtype.element_ty != tl.float16:
                    v, t, e = value16 + of_kv * keys * DIM, DIM, 1
            for Q in tl.static_range(1, 5):
                if path == ROW * 4 + Q:
                    for part in range(PROGRAM // BLOCK_M[ROW]):
                        _attend(
                            query, k, v, key_mean, value_peak, steps, mask, output, r,
                            block * PROGRAM + part * BLOCK_M[ROW], queries, keys,
                            q_s, q_d, s, d, t, e, m_q, m_k, scale, ROW, rank_class(DIM, Q), DIM,
                            CAUSAL, MASK, MASK_OF_QUERIES, BLOCK_M[ROW], BLOCK_N[ROW], STAGES[ROW],
                        )  # fmt: skip


@triton.jit
def _pack(
    key, value, key_mean, value_peak, k_step, start, keys, k_s, k_d, v_s, v_d, key8, value8, key16, value16,
    int8, fp8, key_fp16, value_fp16,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load some of the dimensions of a block of tokens."""
    row = start + tl.arange(0, BLOCK)[:, None]
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    inside = (row < keys) & (column < DIM)
    at = tl.cast(row, tl.int64) * DIM + column
    if int8:
        k = _centred(key, start, k_s, k_d, keys, key_mean, FIRST, WIDTH, DIM, BLOCK)
        tl.store(key8 + at, _integers(k, k_step), mask=inside)
    if key16 is not None:
        if key_fp16:
            k = _centred(key, start, k_s, k_d, keys, key_mean, FIRST, WIDTH, DIM, BLOCK)
            tl.store(key16 + at, _rounded(k, tl.float16), mask=inside)
        if value_fp16:
            v = _values(value, start, v_s, v_d, keys, value_peak, FIRST, WIDTH, DIM, BLOCK, tl.float16)
            tl.store(value16 + at, v, mask=inside)
    if value8 is not None:
        if fp8:
            v = _values(value, start, v_s, v_d, keys, value_peak, FIRST, WIDTH, DIM, BLOCK, tl.float8e4nv)
            place = _packed_value(start, tl.arange(0, BLOCK)[:, None], column, DIM)
            tl.store(value8 + place, v, mask=column < DIM)


@triton.jit(do_not_specialize=["heads", "kv_heads", "keys"])
def pack(
    key, value, key_mean, value_peak, precision, heads, kv_heads, keys, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    key8, key_step, value8, key16, value16,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pack a block of keys and values into the types that the plans of its heads need."""
    padded = tl.cdiv(keys, PADDING) * PADDING
    of_kv = tl.cast(tl.program_id(0) // (padded // BLOCK), tl.int64)
    start = tl.program_id(0) % (padded // BLOCK) * BLOCK
    b, g = of_kv // kv_heads, of_kv % kv_heads
    int8, fp8, key_fp16, value_fp16 = False, False, False, False
    for i in range(heads // kv_heads):
        code = tl.load(precision + of_kv * (heads // kv_heads) + i)
        int8 = int8 | (code >= INT8_ROW)
        fp8 = fp8 | (code == INT8_FP8_ROW)
        key_fp16 = key_fp16 | (code == FP16_ROW)
        value_fp16 = value_fp16 | (code == FP16_ROW) | (code == INT8_ROW)
        if value8 is None:
            value_fp16 = value_fp16 | (code == INT8_FP8_ROW)  # runs as int8

    key += b * k_b + g * k_h
    value += b * v_b + g * v_h
    key_mean += of_kv * DIM
    value_peak += of_kv * DIM
    key8 += of_kv * keys * DIM
    if value8 is not None:
        value8 += of_kv * padded * DIM
    if key16 is not None:
        key16 += of_kv * keys * DIM
        value16 += of_kv * keys * DIM
    row = start + tl.arange(0, BLOCK)
    k_step = tl.full([BLOCK], 1.0, tl.float32)
    if int8:
        k_step = _key_step(key, start, k_s, k_d, keys, key_mean, DIM, BLOCK)
        tl.store(key_step + of_kv * keys + row, k_step, mask=row < keys)
    FIRST: tl.constexpr = first_piece(DIM, 16)
    SECOND: tl.constexpr = second_piece(DIM, 16)
    _pack(
        key, value, key_mean, value_peak, k_step, start, keys, k_s, k_d, v_s, v_d, key8, value8, key16, value16,
        int8, fp8, key_fp16, value_fp16, 0, FIRST, DIM, BLOCK,
    )  # fmt: skip
    if SECOND:
        _pack(
            key, value, key_mean, value_peak, k_step, start, keys, k_s, k_d, v_s, v_d,
            key8, value8, key16, value16, int8, fp8, key_fp16, value_fp16, FIRST, SECOND, DIM, BLOCK,
        )  # fmt: skip
