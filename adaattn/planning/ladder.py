"""List the plans that a budget allows, cheapest first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from adaattn.planning.budget import Budget
from adaattn.planning.precision import BY_ACCURACY, COST, PRECISIONS


def rank_classes(head_dim: int, low_rank: bool = True) -> tuple[int, ...]:
    """Return the ranks that kernels are compiled for: quarters of the head dimension, rounded up.

    Example:
        >>> rank_classes(64)
        (16, 32, 48, 64)
    """
    return tuple(sorted({-(-head_dim * i // 4) for i in (1, 2, 3, 4)})) if low_rank else (head_dim,)


def ladder(budget: Budget, head_dim: int) -> list[tuple[int, int]]:
    """Return all (precision code, rank) that a budget allows, cheapest first; the last is the fallback.

    Example:
        >>> ladder(Budget(1e-2, precisions=("fp32", "fp16")), 64)[:2]
        [(2, 16), (2, 32)]
    """
    allowed = [PRECISIONS.index(name) for name in BY_ACCURACY if name in budget.precisions]
    steps = [(code, rank) for code in allowed for rank in rank_classes(head_dim, budget.low_rank)]
    fallback = (allowed[0], head_dim)

    def cost(step: tuple[int, int]) -> int:
        scores, values = COST[PRECISIONS[step[0]]]
        return scores * step[1] + values * head_dim

    # Sorting keeps the order of equals; a key of several parts would keep torch.compile out.
    return [step for step in sorted(steps, key=cost) if step != fallback] + [fallback]


def ladder_table(budget: Budget, head_dim: int, device: torch.device | None = None) -> Tensor:
    """Return `ladder` as a tensor (2, steps) of int64, codes and ranks."""
    codes, ranks = zip(*ladder(budget, head_dim), strict=True)
    return torch.tensor([codes, ranks], device=device)


def ladder_by_operators(budget: Budget, head_dim: int, device: torch.device) -> Tensor:
    """Return `ladder_table` as a trace takes it: by operators, not as a constant.

    Torch cannot decompose a constant in a branch of torch.cond, and a CUDA graph would copy it from the host.
    """
    codes, ranks = zip(*ladder(budget, head_dim), strict=True)
    numbers = {n: torch.full((), n, dtype=torch.int64, device=device) for n in (*codes, *ranks)}
    return torch.stack([torch.stack([numbers[n] for n in row]) for row in (codes, ranks)])


_tables: dict[tuple[tuple[str, ...], bool, int, torch.device], Tensor] = {}


def ladder_table_for(budget: Budget, head_dim: int, device: torch.device) -> Tensor:
    """Return `ladder_table` on a device: cached, but rebuilt where tensors are not plain.

    It follows from the configuration, so modules make it here: as a buffer, it would be lost in `Module.to_empty`.
    """
    if torch.compiler.is_compiling():
        return ladder_by_operators(budget, head_dim, device)
    if is_in_torch_dispatch_mode() or torch._C._functorch.peek_interpreter_stack() is not None:
        return ladder_table(budget, head_dim, device)
    key = (budget.precisions, budget.low_rank, head_dim, device)  # a ladder does not depend on the tolerance
    if key not in _tables:
        with torch.inference_mode(False):
            _tables[key] = ladder_table(budget, head_dim, device)
    return _tables[key]
