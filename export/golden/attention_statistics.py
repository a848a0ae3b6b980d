"""Summarise what each planned attention did over all cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adaattn.attention.base import PlannedAttention
from adaattn.export.golden.eager import Expected
from adaattn.integrations.transformers import tolerance_of
from adaattn.planning.precision import PRECISIONS


def attention_statistics(
    names: Sequence[str], expected: Sequence[Expected], module: nn.Module | None, asked: float | None
) -> list[dict[str, Any]]:
    """Return each planned attention's usual precision, mean rank and worst errors of each head over all cases.

    Args:
        names: of the planned attentions.
        expected: the cases.
        module: that was captured, if any.
        asked: the tolerance of the export, if one was given.
    """
    found = []
    for index, name in enumerate(names):
        modes = [want.mode for want in expected if len(want.mode.plans) == len(names)]
        calls = [(mode.plans[index], mode.errors[index]) for mode in modes]
        if not calls:
            continue
        precision = torch.cat([plan[0] for plan, _ in calls])
        rank = torch.cat([plan[1] for plan, _ in calls]).double()
        attention = dict(module.named_modules()).get(name) if module is not None else None
        if isinstance(attention, PlannedAttention):
            tolerance = attention.budget.tolerance if attention.budget is not None else None
        else:
            tolerance = tolerance_of(attention) if attention is not None else None
            tolerance = asked if asked is not None else tolerance
        found.append(
            {
                "name": name,
                "tolerance": tolerance,
                "head_dim": calls[0][1].head_dim,
                "precision": [PRECISIONS[int(code)] for code in precision.mode(dim=0).values],
                "rank": rank.mean(dim=0).tolist(),
                "predicted": torch.cat([error.predicted for _, error in calls]).amax(0).tolist(),
                "measured": torch.cat([error.measured for _, error in calls]).amax(0).tolist(),
            }
        )
    return found
