"""Check the arguments of `adaattn::adaptive_attention`, for callers with their own plan."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaattn.checks import as_bool, as_choice, as_float
from adaattn.errors import DtypeError, ShapeError
from adaattn.ops.adaptive_attention.ops import adaptive_attention as op
from adaattn.ops.dispatch import IMPLEMENTATIONS
from adaattn.tensor_checks import check_device, check_float, check_mask, check_tensor


def adaptive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    value_peak: Tensor,
    precision: Tensor,
    rank: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Compute attention in which each head follows its plan.

    Keys are centred, dimensions of the query from `rank` on are zeroed, q, k and v are rounded as the head's precision
    says, products accumulate in float32, softmax is float32, and the un-normalised probabilities are rounded before the
    product with v. A query that may attend to nothing gives zeros. `adaattn.adaptive_attention` makes the plan itself.

    Args:
        query: (B, H, Sq, D).
        key, value: (B, Hk, Sk, D), H a multiple of Hk.
        key_mean: (B, Hk, D), subtracted from the keys; any value is exact, the mean rounds best.
        value_peak: (B, Hk, D), largest magnitude of each value channel, the scale of int8_fp8.
        precision: (B, H) int32, codes of `adaattn.planning.precision.PRECISIONS`.
        rank: (B, H) int32, 1 to D.
        attn_mask: (B or 1, H or 1, Sq or 1, Sk or 1), boolean (True attends) or added to the scores.
        scale: softmax scale; 1/√D by default.
        is_causal: query i attends to keys j ≤ i, aligned at the top left.
        impl: "auto" (Triton on CUDA, else SDPA at each head's rank, which rounds nothing), "reference", which emulates
            the rounding, or "triton".

    Returns:
        (B, H, Sq, D), of the query's type.

    Example:
        >>> q = k = v = torch.ones(1, 1, 2, 4)
        >>> fp32, full = torch.tensor([[0]], dtype=torch.int32), torch.tensor([[4]], dtype=torch.int32)
        >>> adaptive_attention(q, k, v, k.mean(2), v.amax(2), fp32, full).shape
        torch.Size([1, 1, 2, 4])

    Raises:
        ShapeError: shapes that do not go together.
        DtypeError: types that do not go together, or an argument that is not a tensor.
        DeviceError: operands on different devices.
        ConfigError: an unknown `impl`, or "triton" where it cannot run.
    """
    check_attention_inputs(query, key, value, attn_mask)
    batch, heads, _, head_dim = query.shape
    for name, got, want in (
        ("key_mean", key_mean, (batch, key.shape[1], head_dim)),
        ("value_peak", value_peak, (batch, key.shape[1], head_dim)),
        ("precision", precision, (batch, heads)),
        ("rank", rank, (batch, heads)),
    ):
        check_tensor(name, got)
        check_device(name, got, query.device)
        if tuple(got.shape) != want:
            raise ShapeError(f"{name} has shape {tuple(got.shape)}; expected {want}")
    for name, got in (("key_mean", key_mean), ("value_peak", value_peak)):
        check_float(name, got)
    for name, got in (("precision", precision), ("rank", rank)):
        if got.dtype != torch.int32:
            raise DtypeError(f"{name} is {got.dtype}; expected int32")
    as_choice("impl", impl, IMPLEMENTATIONS)
    scale, is_causal = as_scale(scale, head_dim), as_bool("is_causal", is_causal)
    output: Tensor = op(query, key, value, key_mean, value_peak, precision, rank, attn_mask, scale, is_causal, impl)
    return output


def as_scale(scale: float | None, head_dim: int) -> float:
    """Return the softmax scale, 1/√D by default."""
    if scale is None:
        return float(head_dim**-0.5)
    return as_float("scale", scale, "a finite number, or None for 1/√D", math.isfinite)


def check_attention_inputs(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    """Raise ShapeError, DtypeError or DeviceError where (B, H, S, D) operands do not go together."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
        if x.dim() != 4:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; expected (batch, heads, tokens, head_dim)")
        check_float(name, x)
        check_device(name, x, query.device)
        if x.dtype != query.dtype:
            raise DtypeError(f"{name} is {x.dtype} and query {query.dtype}; give all three one type")
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ShapeError(f"key has shape {tuple(key.shape)}; expected ({batch}, kv heads, keys, {head_dim}) as query's")
    if value.shape != key.shape:
        raise ShapeError(f"value has shape {tuple(value.shape)}; expected that of key, {tuple(key.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ShapeError(f"query has {heads} heads and key {kv_heads}; the first must be a multiple of the second")
    if keys == 0 or queries == 0 or head_dim == 0:
        raise ShapeError(
            f"query has {queries} tokens and key {keys}, of {head_dim} dimensions; at least one of each is needed"
        )
    if attn_mask is not None:
        scores = {"batch": batch, "heads": heads, "queries": queries, "keys": keys}
        check_mask("attn_mask", attn_mask, scores, device=query.device)
