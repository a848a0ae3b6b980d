"""Define attention that chooses precision and rank of each head within a tolerance."""

from __future__ import annotations

import torch

from adaattn.attention.base import PlannedAttention
from adaattn.planning.budget import Budget
from adaattn.planning.error_model import Moments, Plan
from adaattn.planning.precision import PRECISIONS


class AdaptiveAttention(PlannedAttention):
    """Multi-head attention, each head as cheap in precision and rank as the tolerance allows.

    Args:
        tolerance: accepted relative error (root mean square) of a head's attention output.
        policy: a named tolerance, "quality" (1e-3), "balanced" (1e-2, the default) or "speed" (5e-2).
        safety: the predicted error times this must fit the tolerance.
        precisions: those the target allows, of fp32, bf16, fp16, int8, int8_fp8.
        embed_dim, num_heads, dropout, causal, bias, kdim, vdim, num_kv_heads: as in `DenseAttention`.

    Example:
        >>> attention = AdaptiveAttention(64, 4, tolerance=1e-2)
        >>> x = torch.randn(2, 10, 64)
        >>> output, _ = attention(x, x, x)
        >>> attention.get_precision_statistics()["plans"]
        8

    Raises:
        ConfigError: an argument out of range.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        causal: bool = False,
        *,
        tolerance: float | None = None,
        policy: str | None = None,
        safety: float = Budget.safety,
        precisions: tuple[str, ...] = PRECISIONS,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
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
            precisions=precisions,
        )

    def _make_plan(self, q: Moments, k: Moments, v: Moments, dtype: torch.dtype) -> Plan:
        budget = self.budget
        assert budget is not None
        return self._plan_within(budget, q, k, v)
