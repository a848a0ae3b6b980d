"""The error model, and the plans made from it.

Noise of standard deviation e on the scores q·k is a relative error of about e on the output of attention, whether it
comes from rounding or from dimensions that were left out. So one budget buys both:

    predicted_error² = scores²(precision) + values²(precision) + Σ_{d ≥ rank} w_d,    w_d = scale²·E[q_d²]·E[k_d²]

with k centred on its mean over the attended keys. Everything here is ordinary torch arithmetic on the moments of one
pass over q, k and v, without a synchronisation. An exported program holds it as one node, `adaattn::plan`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from adaattn.config import PRECISIONS, Budget

RMS = 0.42  # rms of a rounding error, in units of the largest possible: averaged over a mantissa's range
FP32_U, BF16_U, FP16_U, FP8_U = (RMS * 2.0**-bits for bits in (21, 8, 11, 4))  # fp32's sums err 2³ times its operands
FP16_STEP = 2.0**-24  # spacing of fp16's subnormal numbers
FP8_STEP = 2.0**-9 / 448  # the same of fp8-e4m3, relative to the peak that is scaled to 448
FP16_MAX, BF16_MAX = 65504.0, 3.3895e38

# Tensor-core time of q·k and of P·v, fp16 being 2: fp32 is three tf32 products at half the rate, 8 bits run at twice.
COST = {"fp32": (12, 12), "bf16": (2, 2), "fp16": (2, 2), "int8": (1, 2), "int8_fp8": (1, 1)}
# Of equally cheap precisions the first is taken; the first that is allowed is also the fallback, at full rank.
BY_ACCURACY = ("fp32", "fp16", "bf16", "int8", "int8_fp8")


class Moments(NamedTuple):
    """What `adaattn.ops.token_moments` returns for one tensor of shape (B, H, S, D)."""

    mean: Tensor  # (B, H, D)
    second_moment: Tensor  # (B, H, D)
    channel_peak: Tensor  # (B, H, D)
    token_peak: Tensor  # (B, H), mean over tokens of the token's squared peak


class Plan(NamedTuple):
    """Precision code (int32), rank (int32) and predicted error (float32) of each head, all of shape (B, H).

    The error of a plan that no budget made is left out of exported programs: nothing there reads it.
    """

    precision: Tensor
    rank: Tensor
    predicted_error: Tensor | None


def rank_classes(head_dim: int, low_rank: bool = True) -> tuple[int, ...]:
    """Ranks that kernels are compiled for: quarters of the head dimension, rounded up.

    Example:
        >>> rank_classes(64)
        (16, 32, 48, 64)
    """
    return tuple(sorted({-(-head_dim * i // 4) for i in (1, 2, 3, 4)})) if low_rank else (head_dim,)


def ladder(budget: Budget, head_dim: int) -> list[tuple[int, int]]:
    """All (precision code, rank) that a budget allows, cheapest first; the last is the fallback.

    Example:
        >>> ladder(Budget(1e-2, precisions=("fp32", "fp16")), 64)[:2]
        [(2, 16), (2, 32)]
    """
    allowed = [PRECISIONS.index(name) for name in BY_ACCURACY if name in budget.precisions]
    steps = [(code, rank) for code in allowed for rank in rank_classes(head_dim, budget.low_rank)]
    fallback = (allowed[0], head_dim)

    def cost(step: tuple[int, int]) -> int:
        scores, values = COST[PRECISIONS[step[0]]]
        return scores * step[1] + values * head_dim

    # Sorting keeps the order of equals; a key of several parts would keep torch.compile out.
    return [step for step in sorted(steps, key=cost) if step != fallback] + [fallback]


def ladder_table(budget: Budget, head_dim: int, device: torch.device | None = None) -> Tensor:
    """`ladder` as a tensor (2, steps) of int64, codes and ranks."""
    codes, ranks = zip(*ladder(budget, head_dim), strict=True)
    return torch.tensor([codes, ranks], device=device)


_tables: dict[tuple[tuple[str, ...], bool, int, torch.device], Tensor] = {}


def ladder_table_for(budget: Budget, head_dim: int, device: torch.device) -> Tensor:
    """Return `ladder_table` on a device: kept between calls, made anew where tensors are not plain ones.

    It follows from the configuration, so modules make it here: as a buffer, it would be lost in `Module.to_empty`.
    """
    if torch.compiler.is_compiling():
        # By operators, not as a constant: torch cannot decompose a constant in a branch of torch.cond, and a CUDA graph
        # would copy it from the host.
        codes, ranks = zip(*ladder(budget, head_dim), strict=True)
        numbers = {n: torch.full((), n, dtype=torch.int64, device=device) for n in (*codes, *ranks)}
        return torch.stack([torch.stack([numbers[n] for n in row]) for row in (codes, ranks)])
    if is_in_torch_dispatch_mode() or torch._C._functorch.peek_interpreter_stack() is not None:
        return ladder_table(budget, head_dim, device)
    key = (budget.precisions, budget.low_rank, head_dim, device)  # a ladder does not depend on the tolerance
    if key not in _tables:
        with torch.inference_mode(False):
            _tables[key] = ladder_table(budget, head_dim, device)
    return _tables[key]


def energy(query: Moments, key: Moments, scale: float) -> Tensor:
    """w_d = scale²·E[q_d²]·E[k_d²] of each query head, shape (B, H, D): the score variance that a dimension carries."""
    return query.second_moment * _per_query_head(key.second_moment, query) * (scale * scale)


def noise(query: Moments, key: Moments, value: Moments, scale: float) -> Tensor:
    """Predicted squared error of each precision at full rank, shape (B, H, 5); inf where the values do not fit it.

    The terms are those of the table in docs/error-model.md. The fp16 and fp8 rows also count what underflow adds: to
    values, a uniform error of one subnormal step; to probabilities that one key makes small and alike, half a step.
    """
    # How far the mean query can put the loudest key of one dimension above all others. If that key has no value, they
    # make the output: each errs by the rounding of this score, and its probability is exp(-gap) of the largest.
    gap = (scale * query.mean * _per_query_head(key.channel_peak, query)).abs().amax(-1)
    rarity2 = 3 * (2 * gap).exp()  # (½ step / exp(-gap))², in units of a uniform error's step²/12
    total = energy(query, key, scale).sum(-1) + gap.square()
    q_power = query.second_moment.sum(-1)
    k_power = _per_query_head(key.second_moment.sum(-1), query)
    k_token_peak = _per_query_head(key.token_peak, query)
    v_power = _per_query_head(value.second_moment.mean(-1), query).clamp_min(1e-30)
    v_peak2 = _per_query_head(value.channel_peak.square().mean(-1), query)
    v_peak = _per_query_head(value.channel_peak.amax(-1), query)
    peak = torch.maximum(query.channel_peak.amax(-1), _per_query_head(key.channel_peak.amax(-1), query))
    peak = torch.maximum(peak, v_peak)

    integer = (query.token_peak * k_power + k_token_peak * q_power) * (scale * scale / (12 * 127**2))
    fp16_values = 2 * FP16_U**2 + (FP16_STEP**2 / 12) * (1 / v_power + rarity2)
    fp8_values = 2 * FP8_U**2 + (FP8_STEP**2 / 12) * (v_peak2 / v_power + rarity2)
    fp16_scores = 2 * FP16_U**2 * total + (scale * scale * FP16_STEP**2 / 12) * (q_power + k_power)
    relative = total + 1
    return torch.stack(
        [
            relative * (2 * FP32_U**2),
            torch.where(peak <= BF16_MAX, relative * (2 * BF16_U**2), torch.inf),
            torch.where(peak <= FP16_MAX, fp16_scores + fp16_values, torch.inf),
            torch.where(v_peak <= FP16_MAX, integer + fp16_values, torch.inf),
            integer + fp8_values,
        ],
        dim=-1,
    )


def plan_within(
    budget: Budget, table: Tensor, query: Moments, key: Moments, value: Moments, scale: float, impl: str = "auto"
) -> Plan:
    """The cheapest plan of each head whose predicted error, times the budget's safety, fits its tolerance.

    Args:
        table: `ladder_table_for(budget, head_dim, device)`, on the device of the moments.
        query, key, value: moments of shape (B, H, ·), (B, Hk, ·), (B, Hk, ·); H a multiple of Hk.
        scale: softmax scale.
        impl: "auto" (Triton on CUDA, else the reference), "reference" or "triton".

    Returns:
        A plan; heads that nothing cheaper fits take the fallback, the most precise row at full rank, and their
        predicted error says what that costs (inf where moments overflow float32).
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return choose(query, key, value, table, scale, budget.limit)  # arithmetic that the compiler fuses
    from adaattn.ops.plan.ops import plan  # stands on this module

    # One node instead of some eighty: exports are twice as fast, and a GPU launches one kernel.
    return Plan(*plan(*query, *key[1:], *value[1:3], table, scale, budget.limit, impl))


def choose(query: Moments, key: Moments, value: Moments, table: Tensor, scale: float, limit: float) -> Plan:
    """The first step of the ladder whose predicted error is at most the limit, for each head; else the last."""
    codes, ranks = table.unbind(0)
    dims = torch.arange(query.second_moment.shape[-1], device=table.device)
    tails = torch.where(dims >= ranks.unsqueeze(-1), energy(query, key, scale).unsqueeze(-2), 0).sum(-1)
    error = _root(noise(query, key, value, scale).index_select(-1, codes) + tails)
    last = error.shape[-1] - 1
    step = torch.arange(last + 1, device=error.device)
    choice = torch.where(error <= limit, step, last).amin(-1)
    return Plan(
        codes[choice].to(torch.int32),
        ranks[choice].to(torch.int32),
        error.gather(-1, choice.unsqueeze(-1)).squeeze(-1),
    )


def plan_of(precision: Tensor, rank: Tensor, query: Moments, key: Moments, value: Moments, scale: float) -> Plan:
    """The plan that a given precision and rank (B, H) make, with its predicted error."""
    if torch.compiler.is_exporting():
        return Plan(precision, rank, None)
    dims = torch.arange(query.second_moment.shape[-1], device=rank.device)
    tail = torch.where(dims >= rank.unsqueeze(-1), energy(query, key, scale), 0).sum(-1)
    rounding = noise(query, key, value, scale).gather(-1, precision.long().unsqueeze(-1)).squeeze(-1)
    return Plan(precision, rank, _root(rounding + tail))


def effective_rank(weights: Tensor) -> Tensor:
    """exp of the Shannon entropy of the normalised energies, rounded up, int32: Roy and Vetterli, EUSIPCO 2007.

    Args:
        weights: energies (..., D).

    Example:
        >>> effective_rank(torch.tensor([1.0, 1.0, 0.0, 0.0])).item()
        2
    """
    total = weights.sum(-1, keepdim=True)
    share = weights / total.clamp_min(torch.finfo(weights.dtype).tiny)
    entropy = -(share * share.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(-1)
    # Equal energies make a whole number: a thousandth of slack keeps rounding from raising it by one.
    rank = (entropy.exp() - 1e-3).ceil().clamp(1, weights.shape[-1])
    return _known(rank, total.squeeze(-1), weights.shape[-1]).to(torch.int32)


def power_rank(weights: Tensor, threshold: float) -> Tensor:
    """Smallest rank whose leading dimensions hold `threshold` of the energy, int32.

    Example:
        >>> power_rank(torch.tensor([8.0, 1.0, 0.5, 0.5]), 0.9).item()
        2
    """
    kept = weights.cumsum(-1)
    short = kept < kept[..., -1:] * threshold
    rank = (short.sum(-1) + 1).clamp(max=weights.shape[-1])
    return _known(rank, kept[..., -1], weights.shape[-1]).to(torch.int32)


def _known(rank: Tensor, total: Tensor, full: int) -> Tensor:
    """The rank where the energies are finite; all dimensions where they overflowed, and say nothing."""
    return torch.where(total < torch.inf, rank, full)


def _root(squared: Tensor) -> Tensor:
    # NaN (moments that overflowed to inf, times zero) means unknown, and unknown must not look small.
    return torch.where(squared >= 0, squared, torch.inf).sqrt()


def _per_query_head(x: Tensor, query: Moments) -> Tensor:
    """x (B, Hk, ...) with each kv head repeated for the query heads that share it."""
    groups = query.token_peak.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
