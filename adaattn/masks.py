"""What an attention mask says about keys and queries. Masks are boolean (True attends) or added to the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from adaattn.errors import ShapeError
from adaattn.tensor_checks import check_mask_dtype, check_tensor


def expand_mask(mask: Tensor, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """A module's mask as (B or 1, H or 1, Sq or 1, Sk): axes are added, nothing is copied.

    Args:
        mask: (batch, keys), (batch, queries, keys) or (batch, heads, queries, keys).

    Raises:
        ShapeError, DtypeError: a mask of another shape or type.
    """
    check_tensor("attention_mask", mask)
    check_mask_dtype("attention_mask", mask)
    shapes = {2: (batch, keys), 3: (batch, queries, keys), 4: (batch, heads, queries, keys)}
    want = shapes.get(mask.dim())
    if want is None or any(got != size and got != 1 for got, size in zip(mask.shape, want, strict=True)):
        raise ShapeError(
            f"attention_mask has shape {tuple(mask.shape)}; expected (batch, keys) = {shapes[2]}, "
            f"(batch, queries, keys) = {shapes[3]} or (batch, heads, queries, keys) = {shapes[4]}"
        )
    if mask.dim() == 2:
        return mask[:, None, None, :]
    return mask.unsqueeze(1) if mask.dim() == 3 else mask


def attended_keys(mask: Tensor | None, kv_heads: int) -> Tensor | None:
    """Which keys any query attends to, boolean (B or 1, Hk or 1, Sk), or None for all: the tokens statistics count.

    A key that an additive mask puts more than 100 below the best of its row has a probability under e⁻¹⁰⁰: none.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        mask = (mask > -torch.inf) & (mask >= mask.amax(-1, keepdim=True) - 100)
    keys = mask.any(dim=2)
    return keys if keys.shape[1] in (1, kv_heads) else keys.unflatten(1, (kv_heads, -1)).any(dim=2)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Boolean (Sq, Sk): query i attends to keys j ≤ i."""
    return torch.arange(keys, device=device) <= torch.arange(queries, device=device).unsqueeze(1)
