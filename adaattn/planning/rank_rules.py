"""Choose a rank from the energies of dimensions alone."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(weights: Tensor) -> Tensor:
    """Return exp of the Shannon entropy of the normalised energies, rounded up (Roy and Vetterli, EUSIPCO 2007).

    Args:
        weights: energies (..., D).

    Example:
        >>> effective_rank(torch.tensor([1.0, 1.0, 0.0, 0.0])).item()
        2
    """
    total = weights.sum(-1, keepdim=True)
    share = weights / total.clamp_min(torch.finfo(weights.dtype).tiny)
    entropy = -(share * share.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(-1)
    # Equal energies make a whole number: a thousandth of slack keeps rounding from raising it by one.
    rank = (entropy.exp() - 1e-3).ceil().clamp(1, weights.shape[-1])
    return _known(rank, total.squeeze(-1), weights.shape[-1]).to(torch.int32)


def power_rank(weights: Tensor, threshold: float) -> Tensor:
    """Return the smallest rank whose leading dimensions hold `threshold` of the energy, int32.

    Example:
        >>> power_rank(torch.tensor([8.0, 1.0, 0.5, 0.5]), 0.9).item()
        2
    """
    kept = weights.cumsum(-1)
    short = kept < kept[..., -1:] * threshold
    rank = (short.sum(-1) + 1).clamp(max=weights.shape[-1])
    return _known(rank, kept[..., -1], weights.shape[-1]).to(torch.int32)


def _known(rank: Tensor, total: Tensor, full: int) -> Tensor:
    """Return the rank, or all dimensions where the energies overflowed."""
    return torch.where(total < torch.inf, rank, full)
