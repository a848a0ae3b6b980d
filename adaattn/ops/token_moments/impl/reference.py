"""Specify `token_moments` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def token_moments(x: Tensor, key_mask: Tensor | None, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the moments of x, (B, H, D) and a token peak (B, H); see `adaattn.ops.token_moments`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if key_mask is None:
        tokens = x.new_full((1, 1, 1), x.shape[2])
    else:
        key_mask = key_mask.unsqueeze(-1)
        counted = key_mask.to(x.dtype).expand(x.shape[0], x.shape[1], x.shape[2], 1)
        tokens = counted.sum(dim=2).clamp_min(1)

    def attended(y: Tensor) -> Tensor:
        return y if key_mask is None else torch.where(key_mask, y, 0)

    y = attended(x)
    mean = y.sum(dim=2) / tokens
    if center is not False:  # an ONNX function learns it from the node that calls it: there a tensor decides
        about = torch.where(torch.full((1,), center, device=x.device), mean, 0)
        y = attended(x - about.unsqueeze(2))
    second_moment = y.square().sum(dim=2) / tokens
    channel_peak = _peak(y, 2)
    token_peak = _peak(y, 3).square().sum(dim=2) / tokens.squeeze(-1)
    return mean, second_moment, channel_peak, token_peak


def _peak(x: Tensor, dim: int) -> Tensor:
    """Return the largest magnitude along a dimension, without the copy of x that `abs` makes."""
    return torch.maximum(x.amax(dim=dim), -x.amin(dim=dim))
