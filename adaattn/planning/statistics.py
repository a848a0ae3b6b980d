"""Count the plans that were made, on the device where they are made; only reading waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

from adaattn.planning.error_model import Plan
from adaattn.planning.precision import PRECISIONS

# Statistics are integers, which `.half()` leaves alone: errors count in units far below float32's own rounding.
ERROR_UNIT, ERROR_END = 2.0**-40, 2**62


class PlanStatistics:
    """How often each plan was made for each head, and the largest predicted error.

    Args:
        heads: of the attention.
        head_dim: the largest rank.
        device: of the plans.

    Example:
        >>> statistics = PlanStatistics(2, 64)
        >>> both = torch.tensor([[3, 3]], dtype=torch.int32)  # int8, for one sequence and two heads
        >>> statistics.record(Plan(both, torch.full_like(both, 16), torch.full((1, 2), 4e-3)))
        >>> statistics.ranks()["mean_rank"], statistics.precisions()["share"]["int8"]
        (16.0, 1.0)
    """

    def __init__(self, heads: int, head_dim: int, device: torch.device | str = "cpu") -> None:
        self.head_dim = head_dim
        # By head, precision and rank.
        self.counts = torch.zeros(heads, len(PRECISIONS), head_dim + 1, dtype=torch.int64, device=device)
        self.largest_error = torch.zeros(heads, dtype=torch.int64, device=device)

    def record(self, plan: Plan) -> None:
        """Count a plan of (B, H)."""
        self.move(plan.rank.device)
        place = (plan.precision * (self.head_dim + 1) + plan.rank).T.long()
        one = self.counts.new_ones(1, 1)
        self.counts.flatten(1).scatter_add_(1, place, one.expand(place.shape))
        error = (plan.predicted_error.amax(0) / ERROR_UNIT).clamp(max=ERROR_END).long()
        self.largest_error.copy_(torch.maximum(self.largest_error, error))

    def move(self, device: torch.device) -> None:
        """Move the counts to a device."""
        if self.counts.device != device:
            with torch.inference_mode(False):  # they are written outside of it, too
                self.counts, self.largest_error = self.counts.to(device), self.largest_error.to(device)

    def reset(self) -> None:
        """Forget all plans so far."""
        self.counts.zero_()
        self.largest_error.zero_()

    def precisions(self) -> dict[str, object]:
        """Return `plans`, the share of each precision in them, the same `per_head`, and `predicted_error` per head."""
        counts = self.counts.sum(-1).cpu()
        return {
            "plans": int(counts.sum()),
            "share": _shares(counts.sum(0)),
            "per_head": [_shares(head) for head in counts],
            "predicted_error": self.predicted_errors(),
        }

    def ranks(self) -> dict[str, object]:
        """Return `plans`, `head_dim`, `mean_rank`, the same `per_head`, `low_rank_share`, and `predicted_error`."""
        counts = self.counts.sum(1).cpu()
        ranks = torch.arange(self.head_dim + 1)
        plans = int(counts.sum())
        return {
            "plans": plans,
            "head_dim": self.head_dim,
            "mean_rank": float((counts.sum(0) * ranks).sum()) / max(plans, 1),
            "per_head": ((counts * ranks).sum(1) / counts.sum(1).clamp_min(1)).tolist(),
            "low_rank_share": float(counts[:, :-1].sum()) / max(plans, 1),
            "predicted_error": self.predicted_errors(),
        }

    def predicted_errors(self) -> list[float]:
        """Return the largest predicted relative error of each head."""
        return [float("inf") if n >= ERROR_END else n * ERROR_UNIT for n in self.largest_error.tolist()]


def _shares(counts: Tensor) -> dict[str, float]:
    total = max(int(counts.sum()), 1)
    return {name: int(count) / total for name, count in zip(PRECISIONS, counts, strict=True)}
