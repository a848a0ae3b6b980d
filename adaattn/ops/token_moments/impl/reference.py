"""The specification of `token_moments`, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def token_moments(x: Tensor, key_mask: Tensor | None, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, second moment and peak per dimension, mean squared peak per token; see `adaattn.ops.token_moments`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    attended = x.new_ones(1, 1, 1, 1) if key_mask is None else key_mask.to(x.dtype).unsqueeze(-1)
    attended = attended.expand(x.shape[0], x.shape[1], x.shape[2], 1)
    tokens = attended.sum(dim=2).clamp_min(1)

    mean = torch.where(attended > 0, x, 0).sum(dim=2) / tokens
    if center:
        x = x - mean.unsqueeze(2)
    x = torch.where(attended > 0, x, 0)
    second_moment = x.square().sum(dim=2) / tokens
    channel_peak = x.abs().amax(dim=2)
    token_peak = x.abs().amax(dim=3).square().sum(dim=2) / tokens.squeeze(-1)
    return mean, second_moment, channel_peak, token_peak
