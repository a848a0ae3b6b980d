"""Bring attention masks into one form, and read from them which keys are attended to."""

from __future__ import annotations

import torch
from torch import Tensor

from adaattn.tensor_checks import check_mask


def expand_mask(
    mask: Tensor, batch: int, heads: int, queries: int, keys: int, device: torch.device | None = None
) -> Tensor:
    """Return a module's mask as (B or 1, H or 1, Sq or 1, Sk or 1), without copying it.

    Args:
        mask: (batch, keys), (batch, queries, keys) or (batch, heads, queries, keys).

    Raises:
        ShapeError, DtypeError, DeviceError: a mask of another shape, of another type, or on another device.
    """
    of_keys, scores = {"batch": batch, "keys": keys}, {"batch": batch, "queries": queries, "keys": keys}
    of_heads = {"batch": batch, "heads": heads, "queries": queries, "keys": keys}
    check_mask("attention_mask", mask, of_keys, scores, of_heads, device=device)
    if mask.dim() == 2:
        return mask[:, None, None, :]
    return mask.unsqueeze(1) if mask.dim() == 3 else mask


def attended_keys(mask: Tensor | None, kv_heads: int) -> Tensor | None:
    """Return the keys that any query attends to, boolean (B or 1, Hk or 1, Sk), or None for all.

    A key that an additive mask puts more than 100 below the best of its row has a probability under e⁻¹⁰⁰: none.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        mask = (mask > -torch.inf) & (mask >= mask.amax(-1, keepdim=True) - 100)
    keys = mask.any(dim=2)
    return keys if keys.shape[1] in (1, kv_heads) else keys.unflatten(1, (kv_heads, -1)).any(dim=2)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return a boolean mask (Sq, Sk) by which query i attends to keys j ≤ i."""
    return torch.arange(keys, device=device) <= torch.arange(queries, device=device).unsqueeze(1)


def with_four_axes(x: Tensor, grouped: bool) -> Tensor:
    """Return (…, H, S, D) as (B, H, S, D), without copying it where it has four axes or fewer.

    Args:
        x: any number of axes from two; (N, S, D) has one head in each of N batch entries.
        grouped: whether query heads share those of keys: then (H, S, D) is one batch entry.
    """
    if x.dim() == 3 and not grouped:
        return x.unsqueeze(1)
    return x[(None,) * (4 - x.dim())] if x.dim() <= 4 else x.flatten(0, -4)


def mask_with_four_axes(mask: Tensor, query: Tensor, grouped: bool) -> Tensor:
    """Return a mask that broadcasts to (…, H, Sq, Sk) as one that broadcasts to (B, H, Sq, Sk)."""
    if query.dim() == mask.dim() == 3 and not grouped:
        return mask.unsqueeze(1)
    if query.dim() <= 4 or mask.dim() <= 3:
        return mask[(None,) * (4 - mask.dim())]
    return mask.expand(*query.shape[:-3], *mask.shape[-3:]).flatten(0, -4)
