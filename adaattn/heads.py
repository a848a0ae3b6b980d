"""Repeat each kv head for the query heads that share it (grouped-query attention)."""

from __future__ import annotations

from torch import Tensor


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """Return x (B, Hk, ...) as (B, heads, ...): query heads h·G to h·G + G − 1 share kv head h, G = heads / Hk.

    Example:
        >>> import torch
        >>> per_query_head(torch.tensor([[1, 2]]), 4)
        tensor([[1, 1, 2, 2]])
    """
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
