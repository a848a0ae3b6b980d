"""Specify `adaptive_attention` in plain torch: low precisions are emulated by rounding.

Sums accumulate in float32 (float64 for float64 inputs), where the integers of int8 products are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from adaattn.heads import per_query_head
from adaattn.planning.precision import BF16, FP16, INT8, INT8_FP8

FP16_MAX = torch.finfo(torch.float16).max
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
TINY = torch.finfo(torch.float32).tiny
SCORES_AT_ONCE = 1 << 25  # scores of a block of queries that exist at one time


def adaptive_attention(
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
    """Compute attention in which each head follows its plan; see `adaattn.ops.adaptive_attention`."""
    compute = torch.promote_types(query.dtype, torch.float32)
    heads, head_dim = query.shape[1], query.shape[3]
    code = precision[:, :, None, None]

    dims = torch.arange(head_dim, device=query.device)
    q = torch.where(dims < rank[:, :, None, None], query.to(compute), 0)
    k = per_query_head(key.to(compute) - key_mean.to(compute).unsqueeze(2), heads)
    v = per_query_head(value.to(compute), heads)

    present = code.unique().tolist()
    q, q_step = _round_scores_operand(q, code, present)
    k, k_step = _round_scores_operand(k, code, present)
    v_step = (per_query_head(value_peak.to(compute), heads).unsqueeze(2) / FP8_MAX).clamp_min(TINY)
    v = _rounded(v, code, present, {**_HALF, INT8: _fp16, INT8_FP8: lambda x: _fp8(x / v_step)})
    unit = torch.where(code == INT8_FP8, v_step / FP8_MAX, 1)

    queries, keys = q.shape[2], k.shape[2]
    block = max(1, SCORES_AT_ONCE // max(1, q.shape[0] * heads * keys))
    outputs = []
    for start in range(0, queries, block):
        rows = slice(start, min(start + block, queries))
        scores = (q[:, :, rows] @ k.mT) * (q_step[:, :, rows] * scale) * k_step.mT
        scores = _masked(scores, attn_mask, is_causal, start)
        p, total = _exponentials(scores)
        p = _rounded(p, code, present, {**_HALF, INT8: _fp16, INT8_FP8: lambda x: _fp8(x * FP8_MAX)})
        outputs.append((p @ v) * unit / total)
    return torch.cat(outputs, dim=2).to(query.dtype)


def attention_weights(
    query: Tensor, key: Tensor, rank: Tensor | None, attn_mask: Tensor | None, scale: float, is_causal: bool
) -> Tensor:
    """Return probabilities (B, H, Sq, Sk) of the unrounded formula, at the plan's rank (None: full)."""
    compute = torch.promote_types(query.dtype, torch.float32)
    q = query.to(compute)
    if rank is not None:
        q = torch.where(torch.arange(q.shape[3], device=q.device) < rank[:, :, None, None], q, 0)
    k = per_query_head(key.to(compute), query.shape[1])
    scores = _masked((q * scale) @ k.mT, attn_mask, is_causal, 0)
    p, total = _exponentials(scores)
    return p / total


def _exponentials(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(score − row maximum) and its sum; zeros and 1 for a row that is -inf throughout."""
    peak = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    p = (scores - peak).exp()
    return p, p.sum(-1, keepdim=True).clamp_min(1)  # the maximum alone contributes exp(0) = 1


def _masked(scores: Tensor, attn_mask: Tensor | None, is_causal: bool, start: int) -> Tensor:
    """Return the scores of the queries from `start` on, with -inf where a query must not attend."""
    queries, keys = scores.shape[2], scores.shape[3]
    if attn_mask is not None:
        mask = attn_mask if attn_mask.shape[2] == 1 else attn_mask[:, :, start : start + queries]
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if is_causal:
        row = torch.arange(start, start + queries, device=scores.device).unsqueeze(1)
        scores = torch.where(torch.arange(keys, device=scores.device) <= row, scores, -torch.inf)
    return scores


def _round_scores_operand(x: Tensor, code: Tensor, present: list[int]) -> tuple[Tensor, Tensor]:
    """Return x rounded as the head's precision says, and the int8 scale (B, H, S, 1); 1 for other precisions."""
    step = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(TINY)

    def integers(x: Tensor) -> Tensor:
        return (x / step).round().clamp(-127, 127)

    rounded = _rounded(x, code, present, {**_HALF, INT8: integers, INT8_FP8: integers})
    return rounded, torch.where(code >= INT8, step, 1)


def _rounded(
    x: Tensor, code: Tensor, present: list[int], roundings: Mapping[int, Callable[[Tensor], Tensor]]
) -> Tensor:
    """Return x with each head rounded as its precision says.

    Args:
        present: the precisions of some head: the harness would spend most of its time on the others.
    """
    made = x
    for precision in present:
        if precision in roundings:
            rounded = roundings[precision](x)
            made = rounded if len(present) == 1 else torch.where(code == precision, rounded, made)
    return made


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def _fp16(x: Tensor) -> Tensor:
    # Saturating: a masked token may lie outside the range, and its inf times a probability of 0 would be NaN.
    return x.clamp(-FP16_MAX, FP16_MAX).to(torch.float16).to(x.dtype)


def _fp8(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)


_HALF = {BF16: _bf16, FP16: _fp16}
