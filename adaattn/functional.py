"""Compute attention within an error budget in one call, and in the steps that the modules share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from adaattn.checks import as_bool, as_choice, as_float
from adaattn.errors import ShapeError
from adaattn.masks import attended_keys
from adaattn.ops.adaptive_attention.api import as_scale, check_attention_inputs
from adaattn.ops.adaptive_attention.ops import adaptive_attention as attention_op
from adaattn.ops.dispatch import IMPLEMENTATIONS
from adaattn.ops.plan.api import plan_within
from adaattn.ops.token_moments.ops import token_moments as moments_op
from adaattn.planning.budget import Budget
from adaattn.planning.error_model import Moments, Plan
from adaattn.planning.ladder import ladder_table_for
from adaattn.planning.precision import PRECISIONS
from adaattn.tensor_checks import check_tensor

_as_exported = False


@contextmanager
def as_exported() -> Iterator[None]:
    """Let eager code that chooses between dense and adaptive attention choose as an exported program does.

    What verifies a program runs the model so, since a program has no sizes to choose by.
    """
    global _as_exported
    before, _as_exported = _as_exported, True
    try:
        yield
    finally:
        _as_exported = before


def chooses_as_exported() -> bool:
    """Return whether the choice is that of an exported program: while it is captured, or within `as_exported`."""
    return torch.compiler.is_exporting() or _as_exported


def adaptive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    tolerance: float,
    safety: float = Budget.safety,
    precisions: tuple[str, ...] = PRECISIONS,
    low_rank: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Compute `scaled_dot_product_attention` with each head as cheap as a tolerance allows.

    Args:
        query: (B, H, Sq, D).
        key, value: (B, H, Sk, D), or fewer heads with `enable_gqa`, H a multiple of theirs.
        attn_mask: boolean (True attends) or added to the scores, broadcastable to (B, H, Sq, Sk).
        dropout_p: only 0.0; it is here for the argument order of `scaled_dot_product_attention`.
        is_causal: query i attends to keys j ≤ i, aligned at the top left; goes together with `attn_mask`.
        scale: softmax scale; 1/√D by default.
        enable_gqa: allow fewer heads of key and value than of query.
        tolerance: accepted relative error (root mean square) of the output of a head.
        safety, precisions, low_rank: see `adaattn.planning.budget.Budget`.
        impl: "auto" (Triton on CUDA, else SDPA at each head's rank, which rounds nothing), "reference", which emulates
            the rounding, or "triton".

    Returns:
        (B, H, Sq, D), of the query's type. A query that may attend to nothing gives zeros.

    Example:
        >>> q = k = v = torch.randn(1, 8, 100, 64)
        >>> adaptive_attention(q, k, v, is_causal=True, tolerance=1e-2).shape
        torch.Size([1, 8, 100, 64])

    Raises:
        ConfigError: an option out of range.
        ShapeError, DtypeError, DeviceError: operands that do not go together.
    """
    budget = Budget(tolerance, safety, precisions, low_rank)
    wanted = "0.0: adaptive attention has no dropout; to train with it, use a module of this package"
    as_float("dropout_p", dropout_p, wanted, lambda x: x == 0)
    is_causal, enable_gqa = as_bool("is_causal", is_causal), as_bool("enable_gqa", enable_gqa)
    as_choice("impl", impl, IMPLEMENTATIONS)
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask)
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    check_attention_inputs(query, key, value, attn_mask)
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise ShapeError(f"query has {query.shape[1]} heads and key {key.shape[1]}; pass enable_gqa=True to share keys")
    scale = as_scale(scale, query.shape[-1])
    return attend_within(budget, query, key, value, attn_mask, is_causal, scale, impl)[0]


def attend_within(
    budget: Budget,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    impl: str = "auto",
    table: Tensor | None = None,
) -> tuple[Tensor, Plan]:
    """Return `adaptive_attention` of checked operands, and the plan that it followed.

    Args:
        table: `ladder_table` of the budget, where the caller has made it.
    """
    if table is None:
        table = ladder_table_for(budget, query.shape[-1], query.device)
    with torch.no_grad():  # a decision has no gradient
        moments = operand_moments(query, key, value, attn_mask, impl)
        plan = plan_within(budget, table, *moments, scale, impl)
    return attend_by_plan(query, key, value, moments, plan, attn_mask, is_causal, scale, impl), plan


def in_autocast_type(*operands: Tensor) -> tuple[Tensor, ...]:
    """Return operands of float32 in the type of `torch.autocast` where that is on, as SDPA takes them."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return operands
    low = torch.get_autocast_dtype(device)
    return tuple(x.to(low) if x.dtype == torch.float32 else x for x in operands)


def operand_moments(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, impl: str = "auto"
) -> tuple[Moments, Moments, Moments]:
    """Return the moments of query, key (centred) and value that a plan is made from.

    Args:
        query, key, value: (B, H, S, D), already checked.
        attn_mask: with four axes; keys that no query attends to do not count.
    """
    keys = attended_keys(attn_mask, key.shape[1])
    return (
        Moments(*moments_op(query, None, False, impl)),
        Moments(*moments_op(key, keys, True, impl)),
        Moments(*moments_op(value, keys, False, impl)),
    )


def attend_by_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    moments: tuple[Moments, Moments, Moments],
    plan: Plan,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    impl: str = "auto",
) -> Tensor:
    """Return attention in which each head follows its plan, from operands and their `operand_moments`."""
    _, k, v = moments
    output: Tensor = attention_op(
        query, key, value, k.mean, v.channel_peak, plan.precision, plan.rank, attn_mask, scale, is_causal, impl
    )
    return output
