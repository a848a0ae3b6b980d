"""Define attention that chooses the precision of each head."""

from __future__ import annotations

import torch

from adaattn.attention.base import PlannedAttention
from adaattn.checks import as_choice
from adaattn.errors import ConfigError
from adaattn.planning.budget import Budget
from adaattn.planning.error_model import Moments, Plan, plan_of
from adaattn.planning.precision import PRECISIONS


class AdaptivePrecisionAttention(PlannedAttention):
    """Multi-head attention at full rank, each head as cheap in precision as the tolerance allows, or all at one.

    Args:
        default_precision: "adaptive", or one of fp32, bf16, fp16, int8, int8_fp8 for every head.
        tolerance, policy, safety, precisions: as in `AdaptiveAttention`; a fixed precision has none of the first two.
        embed_dim, num_heads, dropout, causal, bias, kdim, vdim, num_kv_heads: as in `DenseAttention`.

    Example:
        >>> attention = AdaptivePrecisionAttention(64, 4, default_precision="int8")
        >>> x = torch.randn(2, 10, 64)
        >>> output, _ = attention(x, x, x)
        >>> attention.get_precision_statistics()["share"]["int8"]
        1.0

    Raises:
        ConfigError: an argument out of range, or a tolerance for a fixed precision.
    """

    low_rank = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        default_precision: str = "adaptive",
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
        self._check_precision(default_precision, tolerance is not None or policy is not None)
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
        self.default_precision = default_precision

    def _default_tolerance(self) -> float | None:
        return super()._default_tolerance() if self.default_precision == "adaptive" else None

    def set_tolerance(self, tolerance: float) -> None:
        """Let the error budget decide from now on, with this tolerance.

        Raises:
            ConfigError: the tolerance is out of range, or the precision is fixed.
        """
        self._check_precision(self.default_precision, has_tolerance=True)
        super().set_tolerance(tolerance)

    @staticmethod
    def _check_precision(name: str, has_tolerance: bool) -> None:
        as_choice("default_precision", name, ("adaptive", *PRECISIONS))
        if name != "adaptive" and has_tolerance:
            raise ConfigError(
                f"default_precision {name!r} leaves a tolerance nothing to decide; use 'adaptive' with it"
            )

    def _make_plan(self, q: Moments, k: Moments, v: Moments, dtype: torch.dtype) -> Plan:
        if (budget := self.budget) is not None:
            return self._plan_within(budget, q, k, v)
        code = PRECISIONS.index(self.default_precision)
        precision = torch.full_like(q.token_peak, code, dtype=torch.int32)
        return plan_of(precision, torch.full_like(precision, self.head_dim), q, k, v, self.scale)
