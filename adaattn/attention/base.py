"""Define what all attention modules share: projections, checks, masks, dropout and weights.

Every constructor argument stays readable as an attribute of the same name; `adaattn.save` relies on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaattn.checks import as_bool, as_float, as_int, described
from adaattn.errors import ConfigError, DeviceError, DtypeError, ShapeError, first_line
from adaattn.functional import attend_by_plan, operand_moments
from adaattn.heads import per_query_head
from adaattn.input_spec import InputSpec
from adaattn.masks import expand_mask
from adaattn.ops.adaptive_attention.impl.reference import attention_weights
from adaattn.ops.plan.api import plan_within
from adaattn.planning.budget import POLICIES, Budget, as_tolerance, resolve_tolerance
from adaattn.planning.error_model import Moments, Plan
from adaattn.planning.ladder import ladder_table_for
from adaattn.planning.statistics import PlanStatistics
from adaattn.tensor_checks import check_device, check_float, check_tensor


class AttentionBase(nn.Module, ABC):
    """Multi-head attention; a subclass says how one set of heads attends (`_attend`)."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        causal: bool,
        bias: bool,
        kdim: int | None,
        vdim: int | None,
        num_kv_heads: int | None,
    ) -> None:
        super().__init__()
        embed_dim = as_int("embed_dim", embed_dim, "a width of at least 1")
        num_heads = as_int("num_heads", num_heads, "a number of heads of at least 1")
        if embed_dim % num_heads:
            raise ConfigError(f"embed_dim {embed_dim} is not a positive multiple of num_heads {num_heads}")
        if num_kv_heads is not None:
            num_kv_heads = as_int("num_kv_heads", num_kv_heads, f"a divisor of num_heads {num_heads}, or None for it")
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % kv_heads:
            raise ConfigError(f"num_heads {num_heads} is not a multiple of num_kv_heads {kv_heads}")
        wanted = f"a width of at least 1, or None for embed_dim {embed_dim}"
        self.kdim, self.vdim = (
            None if width is None else as_int(name, width, wanted) for name, width in (("kdim", kdim), ("vdim", vdim))
        )
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.dropout = as_float(
            "dropout", dropout, "a probability from 0 up to, not including, 1", lambda x: 0 <= x < 1
        )
        self.causal, self.bias = as_bool("causal", causal), as_bool("bias", bias)
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5

        try:
            self.q_proj = nn.Linear(embed_dim, embed_dim, bias=self.bias)
            self.k_proj = nn.Linear(self.kdim or embed_dim, kv_heads * self.head_dim, bias=self.bias)
            self.v_proj = nn.Linear(self.vdim or embed_dim, kv_heads * self.head_dim, bias=self.bias)
            self.out_proj = nn.Linear(embed_dim, embed_dim, bias=self.bias)
        except (RuntimeError, MemoryError) as error:  # of sizes that no memory holds
            raise ConfigError(
                f"weights for embed_dim {embed_dim}, kdim {self.kdim}, vdim {self.vdim} cannot be made: "
                f"{first_line(error)}"
            ) from error

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        need_weights: bool | Literal["per head"] = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query over key and value.

        Args:
            query: (batch, seq_q, embed_dim).
            key: (batch, seq_k, kdim).
            value: (batch, seq_k, vdim).
            attention_mask: boolean (True attends) or added to the scores, of shape (batch, seq_k),
                (batch, seq_q, seq_k) or (batch, heads, seq_q, seq_k).
            need_weights: also return the attention weights, averaged over heads or "per head".

        Returns:
            The output (batch, seq_q, embed_dim), and the weights (batch, seq_q, seq_k), or (batch, heads, seq_q, seq_k)
            per head, or None. Weights are those of the unrounded formula at the plan's rank.

        Raises:
            ShapeError, DtypeError, DeviceError: inputs that do not go together.
            ConfigError: an unknown `need_weights`.
        """
        if not isinstance(need_weights, bool) and not (isinstance(need_weights, str) and need_weights == "per head"):
            raise ConfigError(f'need_weights is {described(need_weights)}; give True, False or "per head"')
        self._check_inputs(query, key, value)
        batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        mask = attention_mask
        if mask is not None:
            mask = expand_mask(mask, batch, self.num_heads, queries, keys, query.device)
        q, k, v = self._project(query, key, value)
        weights: Tensor | None
        if self.training and self.dropout > 0:
            output, weights = self._attend_with_dropout(q, k, v, mask)
        else:
            output, rank = self._attend(q, k, v, mask)
            weights = attention_weights(q, k, rank, mask, self.scale, self.causal) if need_weights else None
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if weights is None or not need_weights:
            return output, None
        return output, (weights if need_weights == "per head" else weights.mean(dim=1)).to(query.dtype)

    def input_specs(self) -> tuple[InputSpec, ...]:
        """Return the inputs of an export: query of B×S tokens, key and value of B×K."""
        widths = {"query": self.embed_dim, "key": self.kdim or self.embed_dim, "value": self.vdim or self.embed_dim}
        return tuple(InputSpec(name, ("B", "S" if name == "query" else "K", width)) for name, width in widths.items())

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to q (B, H, Sq, D), k and v (B, Hk, Sk, D)."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        return q, k, v

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the output (B, H, Sq, D) and, where a plan cut it, the rank (B, H)."""

    def _attend_with_dropout(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        # Rounding would drown in dropout's noise, and the gradient is that of the unrounded formula anyway.
        weights = attention_weights(q, k, None, mask, self.scale, self.causal)
        v = per_query_head(v, self.num_heads)
        return F.dropout(weights, self.dropout).to(v.dtype) @ v, weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        widths = (self.embed_dim, self.kdim or self.embed_dim, self.vdim or self.embed_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        for name, x, width, projection in zip(
            ("query", "key", "value"), (query, key, value), widths, projections, strict=True
        ):
            check_tokens(name, x, width, projection)
            check_device(name, x, query.device)
        if key.shape[0] != query.shape[0] or value.shape[0] != query.shape[0]:
            raise ShapeError(
                f"batch sizes are {query.shape[0]}, {key.shape[0]} and {value.shape[0]} for query, key and value; "
                "they must be the same"
            )
        if value.shape[1] != key.shape[1]:
            raise ShapeError(f"key has {key.shape[1]} tokens and value {value.shape[1]}; both need the same number")
        if query.shape[1] == 0 or key.shape[1] == 0:
            raise ShapeError(
                f"query has {query.shape[1]} tokens and key {key.shape[1]}; at least one of each is needed"
            )

    def extra_repr(self) -> str:
        """Describe the module in `repr`, as torch's modules do."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, causal={self.causal}"


class PlannedAttention(AttentionBase):
    """Attention whose heads follow plans; a subclass makes them (`_make_plan`).

    What was chosen is counted on the device, and read only by `get_…_statistics`.
    """

    # Statistics are no buffers: they belong to this run, and what treats buffers as part of the model (`to_empty`,
    # `type`, the broadcasts of DistributedDataParallel) would spoil them.
    _statistics: PlanStatistics
    low_rank = True  # whether this class cuts the rank

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        causal: bool,
        bias: bool,
        kdim: int | None,
        vdim: int | None,
        num_kv_heads: int | None,
        *,
        tolerance: float | None,
        policy: str | None,
        safety: float,
        precisions: tuple[str, ...],
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, causal, bias, kdim, vdim, num_kv_heads)
        if tolerance is not None and policy is None:
            tolerance = as_tolerance(tolerance)
        self.tolerance, self.policy = tolerance, policy
        resolve_tolerance(tolerance, policy)
        checked = Budget(POLICIES["balanced"], safety, precisions, self.low_rank)
        self.safety, self.precisions = checked.safety, checked.precisions
        self._statistics = PlanStatistics(num_heads, self.head_dim)

    @property
    def budget(self) -> Budget | None:
        """What decides a plan: of `tolerance` or `policy`, `safety` and `precisions`; None where a method does."""
        tolerance = resolve_tolerance(self.tolerance, self.policy)
        if tolerance is None:
            tolerance = self._default_tolerance()
        return None if tolerance is None else Budget(tolerance, self.safety, self.precisions, self.low_rank)

    def _default_tolerance(self) -> float | None:
        """Return the tolerance where none was given; None where the plan is made by another rule."""
        return POLICIES["balanced"]

    def set_tolerance(self, tolerance: float) -> None:
        """Let the error budget decide from now on, with this tolerance.

        Raises:
            ConfigError: the tolerance is out of range, or the module's plan is fixed.
        """
        self.tolerance, self.policy = as_tolerance(tolerance), None

    def _plan_within(self, budget: Budget, q: Moments, k: Moments, v: Moments) -> Plan:
        table = ladder_table_for(budget, self.head_dim, q.token_peak.device)
        return plan_within(budget, table, q, k, v, self.scale)

    @abstractmethod
    def _make_plan(self, q: Moments, k: Moments, v: Moments, dtype: torch.dtype) -> Plan:
        """Make the plan of each head from the moments of q, k (centred) and v, whose type is dtype."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():  # a decision has no gradient
            moments = operand_moments(q, k, v, mask)
            plan = self._make_plan(*moments, q.dtype)
        output = attend_by_plan(q, k, v, moments, plan, mask, self.causal, self.scale)
        if not torch.compiler.is_exporting() and q.shape[0] and not q.is_meta:
            self._statistics.record(plan)
        return output, plan.rank

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the statistics with the weights: `to`, `cuda`, `to_empty` and their like call this."""
        super()._apply(fn, recurse)
        weight = self.q_proj.weight
        if isinstance(weight, Tensor) and not weight.is_meta:
            self._statistics.move(weight.device)
        return self

    def reset_statistics(self) -> None:
        """Forget all plans so far."""
        self._statistics.reset()

    def get_precision_statistics(self) -> dict[str, object]:
        """Return how often each precision was chosen since the last reset. Reading waits for the device.

        Returns:
            `plans`, the number of (batch, head) plans; `share`, of each precision; `per_head`, a list of such shares;
            `predicted_error`, the largest predicted relative error of each head.
        """
        return self._statistics.precisions()

    def get_rank_statistics(self) -> dict[str, object]:
        """Return which ranks were chosen since the last reset. Reading waits for the device.

        Returns:
            `plans`, the number of (batch, head) plans; `head_dim`; `mean_rank`; `per_head`, the mean rank of each head;
            `low_rank_share`, the share of plans below head_dim; `predicted_error` as in `get_precision_statistics`.
        """
        return self._statistics.ranks()


def check_tokens(name: str, x: Tensor, width: int, layer: nn.Module) -> None:
    """Raise an error where x is not (batch, tokens, width) of the type, and on the device, of a layer's weight."""
    check_tensor(name, x)
    if x.dim() != 3 or x.shape[2] != width:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; expected (batch, tokens, {width})")
    check_float(name, x)
    weight = layer.weight
    if not isinstance(weight, Tensor):  # a quantised layer has a method of this name
        return
    if x.dtype != weight.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
        raise DtypeError(
            f"{name} is {x.dtype} and the module {weight.dtype}; convert one of them, or use torch.autocast"
        )
    # Layers whose weights are kept elsewhere bring them by a hook or their own forward.
    if x.device != weight.device and "forward" not in vars(layer) and not layer._forward_pre_hooks:
        hint = "; load or initialise its weights first" if weight.is_meta else ""
        raise DeviceError(f"{name} is on {x.device} and the module on {weight.device}; move them to one device{hint}")
