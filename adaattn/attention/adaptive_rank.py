"""Attention that chooses the rank of each head: how many leading dimensions of q and k its scores use."""

from __future__ import annotations

import torch
from torch import Tensor

from adaattn.attention.base import PlannedAttention
from adaattn.budget import Moments, Plan, effective_rank, energy, plan_of, plan_within, power_rank
from adaattn.config import BF16, FP16, FP32, Budget
from adaattn.errors import ConfigError

METHODS = ("entropy", "power", "random")
DUST = 2.0**-17  # of its mean: a dimension of the keys that varies less is constant, and what varies is rounding
NATIVE = {torch.bfloat16: BF16, torch.float16: FP16}  # this module leaves the precision as the input has it


class AdaptiveRankAttention(PlannedAttention):
    """Multi-head attention of low rank where that suffices.

    Without a tolerance the method decides. "entropy": the effective rank, exp of the Shannon entropy of the normalised
    energies scale²·E[q_d²]·E[k_d²]. "power": the smallest rank that keeps `adaptive_threshold` of the energy. Both use
    low rank only where theirs is at most `rank_ratio`·head_dim. "random": always `rank_ratio`·head_dim, after a fixed
    random orthogonal rotation of q and k. None of these bounds the error of the output; a tolerance does, and then the
    error budget decides instead.

    Args:
        rank_ratio: largest rank that counts as low, as a share of head_dim, above 0 and at most 1.
        rank_estimation_method: "entropy", "power" or "random".
        adaptive_threshold: share of the energy that "power" keeps, above 0 and at most 1.
        tolerance, policy, safety: as in `AdaptiveAttention`.
        embed_dim, num_heads, dropout, causal, bias, kdim, vdim, num_kv_heads: as in `DenseAttention`.

    Example:
        >>> attention = AdaptiveRankAttention(64, 4, rank_ratio=0.5, rank_estimation_method="random")
        >>> x = torch.randn(2, 10, 64)
        >>> output, _ = attention(x, x, x)
        >>> attention.get_rank_statistics()["mean_rank"]
        8.0

    Raises:
        ConfigError: an argument out of range.
    """

    rotation: Tensor  # (D, D), of the method "random"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        rank_ratio: float = 0.5,
        rank_estimation_method: str = "entropy",
        adaptive_threshold: float = 0.95,
        dropout: float = 0.0,
        causal: bool = False,
        *,
        tolerance: float | None = None,
        policy: str | None = None,
        safety: float = Budget.safety,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        if not 0 < rank_ratio <= 1:
            raise ConfigError(f"rank_ratio is {rank_ratio}; give a share of head_dim above 0 and at most 1")
        if rank_estimation_method not in METHODS:
            raise ConfigError(f"rank_estimation_method is {rank_estimation_method!r}; choose {', '.join(METHODS)}")
        if not 0 < adaptive_threshold <= 1:
            raise ConfigError(f"adaptive_threshold is {adaptive_threshold}; give a share above 0 and at most 1")
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            causal,
            bias,
            kdim,
            vdim,
            num_kv_heads,
            tolerance=tolerance,
            policy=policy,
            safety=safety,
            precisions=("fp32",),
        )
        self.rank_ratio, self.rank_estimation_method = rank_ratio, rank_estimation_method
        self.adaptive_threshold = adaptive_threshold
        if rank_estimation_method == "random":
            gaussian = torch.randn(self.head_dim, self.head_dim, generator=torch.Generator().manual_seed(0))
            self.register_buffer("rotation", torch.linalg.qr(gaussian.double())[0].to(self.q_proj.weight.dtype))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._project(query, key, value)
        if self.rank_estimation_method == "random":
            q, k = q @ self.rotation, k @ self.rotation
        return q, k, v

    def _make_plan(self, q: Moments, k: Moments, v: Moments, dtype: torch.dtype) -> Plan:
        code = NATIVE.get(dtype, FP32)
        if self.budget is not None:
            codes, *rest = self._ladder.unbind(0)
            native = torch.stack([torch.full_like(codes, code), *rest])
            return plan_within(self.budget, native, q, k, v, self.scale)
        precision = torch.full_like(q.token_peak, code, dtype=torch.int32)
        return plan_of(precision, self._rank_by_method(q, k), q, k, v, self.scale)

    def _rank_by_method(self, q: Moments, k: Moments) -> Tensor:
        low = max(1, int(self.rank_ratio * self.head_dim))
        if self.rank_estimation_method == "random":
            return torch.full_like(q.token_peak, low, dtype=torch.int32)
        second_moment = torch.where(k.second_moment > (DUST * k.mean).square(), k.second_moment, 0)
        weights = energy(q, k._replace(second_moment=second_moment), self.scale)
        if self.rank_estimation_method == "entropy":
            rank = effective_rank(weights)
        else:
            rank = power_rank(weights, self.adaptive_threshold)
        return torch.where(rank <= low, rank, self.head_dim)
