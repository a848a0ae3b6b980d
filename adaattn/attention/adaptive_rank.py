"""Define attention that chooses the rank of each head: how many leading dimensions of q and k its scores use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from adaattn.attention.base import PlannedAttention
from adaattn.checks import as_choice, as_float
from adaattn.planning.budget import Budget
from adaattn.planning.error_model import Moments, Plan, energy, plan_of
from adaattn.planning.precision import BF16, FP16, FP32, PRECISIONS
from adaattn.planning.rank_rules import effective_rank, power_rank

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
        wanted = "a share above 0 and at most 1"
        rank_ratio, adaptive_threshold = (
            as_float(name, given, wanted, lambda x: 0 < x <= 1)
            for name, given in (("rank_ratio", rank_ratio), ("adaptive_threshold", adaptive_threshold))
        )
        as_choice("rank_estimation_method", rank_estimation_method, METHODS)
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
            weight = self.q_proj.weight
            self.register_buffer("rotation", self._make_rotation().to(weight))

    def _make_rotation(self) -> Tensor:
        size, generator = (self.head_dim, self.head_dim), torch.Generator("cpu").manual_seed(0)
        rotation: Tensor = torch.linalg.qr(torch.randn(size, generator=generator, device="cpu").double())[0]
        return rotation

    def reset_parameters(self) -> None:
        """Make the rotation of the method "random" anew; the projections reset themselves, as all layers of torch."""
        if self.rank_estimation_method == "random":
            with torch.no_grad():
                self.rotation.copy_(self._make_rotation())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = getattr(self, "rotation", None)
        super()._apply(fn, recurse)
        # It follows from the configuration, so it outlasts `to_empty`, which looks like any other change here.
        if before is not None and type(self.rotation) is Tensor and not self.rotation.is_meta:
            after = self.rotation.double()
            if before.is_meta or not torch.allclose(after, before.to(after), rtol=0, atol=0.1):
                self.reset_parameters()
        return self

    def _default_tolerance(self) -> float | None:
        return None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._project(query, key, value)
        if self.rank_estimation_method == "random":
            q, k = q @ self.rotation, k @ self.rotation
        return q, k, v

    def _make_plan(self, q: Moments, k: Moments, v: Moments, dtype: torch.dtype) -> Plan:
        code = NATIVE.get(dtype, FP32)
        if (budget := self.budget) is not None:
            return self._plan_within(replace(budget, precisions=(PRECISIONS[code],)), q, k, v)
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
