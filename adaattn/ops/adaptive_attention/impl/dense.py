"""Compute `adaptive_attention` by `scaled_dot_product_attention` at the plan's rank.

A plan is a permission: where rounding saves nothing, as on a CPU, nothing is rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adaattn.masks import causal_mask


def adaptive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    value_peak: Tensor,
    precision: Tensor,
    rank: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Compute attention at each head's rank; see `adaattn.ops.adaptive_attention`."""
    head_dim = query.shape[3]
    if query.device.type != "cpu" or bool((rank < head_dim).any()):  # a question costs a GPU more than the copy
        kept = torch.arange(head_dim, device=query.device) < rank[:, :, None, None]
        query = torch.where(kept, query, 0)
    # No plan allows the rounding of 16-bit kernels, whose probabilities are of the type of the inputs.
    compute = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(compute) for x in (query, key, value))
    return dense_attention(q, k, v, attn_mask, is_causal, scale).to(query.dtype)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Compute SDPA with a mask and causality together; a query that may attend to nothing gives zeros."""
    gqa = query.shape[1] != key.shape[1]
    if attn_mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
    if is_causal:
        allowed = allowed & causal_mask(query.shape[2], key.shape[2], query.device)
    some = allowed.any(-1, keepdim=True)
    # A row without a key attends everywhere, so that no backend meets a softmax of nothing, and is zeroed after.
    bias = allowed | ~some
    if attn_mask.dtype != torch.bool:
        lowest = torch.finfo(query.dtype).min
        if torch.finfo(attn_mask.dtype).min < lowest:  # a finite value stays finite in a narrower type
            attn_mask = attn_mask.clamp_min(lowest)
        bias = torch.where(some, torch.where(allowed, attn_mask, -torch.inf), 0).to(query.dtype)
    # Not every runtime broadcasts a mask over queries; here the expansion is a view.
    bias = bias.expand(-1, -1, query.shape[2], key.shape[2])
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=gqa)
    return torch.where(some, output, 0)
