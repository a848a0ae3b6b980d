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

    mean = attended(x).sum(dim=2) / tokens
    # A tensor decides, not a branch: an ONNX function learns `center` from the node that calls it.
    about = torch.where(torch.full((1,), center, device=x.device), mean, 0)
    y = attended(x - about.unsqueeze(2))
    second_moment = y.square().sum(dim=2) / tokens
    size = y.abs()
    channel_peak = size.amax(dim=2)
    token_peak = size.amax(dim=3).square().sum(dim=2) / tokens.squeeze(-1)
    return mean, second_moment, channel_peak, token_peak
