"""Choose the plan of each head in plain torch: the specification of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from adaattn.planning.error_model import Moments, Plan, energy, noise, square_root


def choose(query: Moments, key: Moments, value: Moments, table: Tensor, scale: float, limit: float) -> Plan:
    """Choose for each head the first step of the ladder whose predicted error is at most the limit, else the last."""
    codes, ranks = table.unbind(0)
    dims = torch.arange(query.second_moment.shape[-1], device=table.device)
    tails = torch.where(dims >= ranks.unsqueeze(-1), energy(query, key, scale).unsqueeze(-2), 0).sum(-1)
    error = square_root(noise(query, key, value, scale).index_select(-1, codes) + tails)
    last = error.shape[-1] - 1
    step = torch.arange(last + 1, device=error.device)
    choice = torch.where(error <= limit, step, last).amin(-1)
    return Plan(
        codes[choice].to(torch.int32),
        ranks[choice].to(torch.int32),
        error.gather(-1, choice.unsqueeze(-1)).squeeze(-1),
    )
