"""Predict the error of a plan from moments.

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

from adaattn.heads import per_query_head
from adaattn.planning.precision import (
    BF16_MAX,
    BF16_U,
    FP8_STEP,
    FP8_U,
    FP16_MAX,
    FP16_STEP,
    FP16_U,
    FP32_U,
)


class Moments(NamedTuple):
    """What `adaattn.ops.token_moments` returns for one tensor of shape (B, H, S, D)."""

    mean: Tensor  # (B, H, D)
    second_moment: Tensor  # (B, H, D)
    channel_peak: Tensor  # (B, H, D)
    token_peak: Tensor  # (B, H), mean over tokens of the token's squared peak


def for_query_heads(x: Moments, query: Moments) -> Moments:
    """Return moments of keys or values with each kv head repeated for the query heads that share it."""
    return Moments(*(per_query_head(moment, query.token_peak.shape[1]) for moment in x))


class Plan(NamedTuple):
    """Precision code (int32), rank (int32) and predicted error (float32) of each head, all of shape (B, H)."""

    precision: Tensor
    rank: Tensor
    predicted_error: Tensor


def energy(query: Moments, key: Moments, scale: float) -> Tensor:
    """Return w_d = scale²·E[q_d²]·E[k_d²], the score variance of each dimension of a query head, (B, H, D)."""
    return query.second_moment * for_query_heads(key, query).second_moment * (scale * scale)


def noise(query: Moments, key: Moments, value: Moments, scale: float) -> Tensor:
    """Return the predicted squared error of each precision at full rank, (B, H, 5); inf where values do not fit.

    The terms are those of the table in docs/error-model.md. The fp16 and fp8 rows also count what underflow adds: to
    values, a uniform error of one subnormal step; to probabilities that one key makes small and alike, half a step.
    """
    energies = energy(query, key, scale)
    key, value = for_query_heads(key, query), for_query_heads(value, query)
    # How far the mean query can put the loudest key of one dimension above all others. If that key has no value, they
    # make the output: each is off by the rounding of this score, and its probability is exp(-gap) of the largest.
    gap = (scale * query.mean * key.channel_peak).abs().amax(-1)
    rarity2 = 3 * (2 * gap).exp()  # (½ step / exp(-gap))², in units of a uniform error's step²/12
    total = energies.sum(-1) + gap.square()
    q_power = query.second_moment.sum(-1)
    k_power = key.second_moment.sum(-1)
    v_power = value.second_moment.mean(-1).clamp_min(1e-30)
    v_peak2 = value.channel_peak.square().mean(-1)
    v_peak = value.channel_peak.amax(-1)
    peak = torch.maximum(torch.maximum(query.channel_peak.amax(-1), key.channel_peak.amax(-1)), v_peak)

    integer = (query.token_peak * k_power + key.token_peak * q_power) * (scale * scale / (12 * 127**2))
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


def plan_of(precision: Tensor, rank: Tensor, query: Moments, key: Moments, value: Moments, scale: float) -> Plan:
    """Return the plan that a given precision and rank (B, H) make, with its predicted error."""
    if torch.compiler.is_exporting():  # nothing in a program reads the error; tracing its formula would take a second
        return Plan(precision, rank, torch.full_like(rank, torch.inf, dtype=torch.float32))
    dims = torch.arange(query.second_moment.shape[-1], device=rank.device)
    tail = torch.where(dims >= rank.unsqueeze(-1), energy(query, key, scale), 0).sum(-1)
    rounding = noise(query, key, value, scale).gather(-1, precision.long().unsqueeze(-1)).squeeze(-1)
    return Plan(precision, rank, square_root(rounding + tail))


def square_root(squared: Tensor) -> Tensor:
    """Return the root of a predicted squared error; NaN gives inf."""
    # NaN (moments that overflowed to inf, times zero) means unknown, and unknown must not look small.
    return torch.where(squared >= 0, squared, torch.inf).sqrt()
