"""Plan each head within a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from adaattn.ops.plan.impl.reference import choose
from adaattn.ops.plan.ops import plan
from adaattn.planning.budget import Budget
from adaattn.planning.error_model import Moments, Plan


def plan_within(
    budget: Budget, table: Tensor, query: Moments, key: Moments, value: Moments, scale: float, impl: str = "auto"
) -> Plan:
    """Return the cheapest plan of each head whose predicted error, times the budget's safety, fits its tolerance.

    Args:
        table: `ladder_table_for(budget, head_dim, device)`, on the device of the moments.
        query, key, value: moments of shape (B, H, ·), (B, Hk, ·), (B, Hk, ·); H a multiple of Hk.
        scale: softmax scale.
        impl: "auto" (Triton on CUDA, else the reference), "reference" or "triton".

    Returns:
        A plan; heads that nothing cheaper fits take the fallback, the most precise row at full rank, and their
        predicted error says what that costs (inf where moments overflow float32).
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return choose(query, key, value, table, scale, budget.limit)  # arithmetic that the compiler fuses
    # One node instead of some eighty: exports are twice as fast, and a GPU launches one kernel.
    return Plan(*plan(*query, *key[1:], *value[1:3], table, scale, budget.limit, impl))
