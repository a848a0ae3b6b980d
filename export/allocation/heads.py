"""Plan the heads of attention that becomes the op `adaptive_attention`, with a constant plan for each head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaattn.export.formats import FP8, FP16, INT8, Device
from adaattn.planning.ladder import rank_classes
from adaattn.planning.precision import PRECISIONS

HeadPlan = tuple[str, int]
"""Precision and rank of a head."""

# For each precision of a head what its two products run in: scores, and softmax weights by values. The operands are of
# fp16, with which fp32 and bf16 have nothing to add.
PRODUCTS = {"fp16": (FP16, FP16), "int8": (INT8, FP16), "int8_fp8": (INT8, FP8)}
MULTIPLIERS = 48  # of cost and error, over twenty decades, with each of which the heads are planned anew


def head_plans(head_dim: int, formats: Sequence[str]) -> tuple[HeadPlan, ...]:
    """Return the plans that a head may have: int8 where fp16 is allowed, int8_fp8 where fp8 is.

    Example:
        >>> head_plans(4, ["fp32", "fp16"])[3:]
        (('fp16', 1), ('int8', 4), ('int8', 3), ('int8', 2), ('int8', 1))
    """
    known = [name for name, (_, values) in PRODUCTS.items() if values in formats]
    return tuple((name, rank) for name in known for rank in reversed(rank_classes(head_dim)))


@dataclass(frozen=True)
class PlannedHeads:
    """The constants of an attention whose heads are planned.

    Args:
        plans: of each head.
        key_mean: what is subtracted from the keys, for each kv head and dimension: their mean in the samples.
        value_peak: the largest value of each kv head and dimension, by which fp8 is scaled.
    """

    plans: tuple[HeadPlan, ...]
    key_mean: tuple[tuple[float, ...], ...]
    value_peak: tuple[tuple[float, ...], ...]

    def sizes(self) -> tuple[int, int, set[int]]:
        """Return the numbers of heads and kv heads, and the sizes of a head."""
        rows = (*self.key_mean, *self.value_peak)
        return len(self.plans), len(self.key_mean), {len(row) for row in rows}

    def tensors(self) -> dict[str, Tensor]:
        """Return the inputs of the op that they are, for a batch of 1."""
        return {
            "key_mean": torch.tensor([self.key_mean]),
            "value_peak": torch.tensor([self.value_peak]),
            "precision": torch.tensor([[PRECISIONS.index(name) for name, _ in self.plans]], dtype=torch.int32),
            "rank": torch.tensor([[rank for _, rank in self.plans]], dtype=torch.int32),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PlannedHeads:
        """Return what was written as JSON.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        plans = tuple((str(name), int(rank)) for name, rank in content["plans"])
        if any(name not in PRODUCTS for name, _ in plans):
            raise ValueError(f"a head has the precision {plans}")
        rows = (tuple(tuple(map(float, row)) for row in content[name]) for name in ("key_mean", "value_peak"))
        return cls(plans, *rows)


@dataclass
class HeadStatistics:
    """What was measured of the heads of an attention.

    Args:
        energy: of each head, the sum of the squares of its output.
        noise: for each plan, of each head, the sum of the squares of what the plan changes in the output.
        gain: of each head, the sum over samples of the squared relative error of the model's output, for one of the
            head's.
        key_sum: of each kv head and dimension, over `keys` keys.
        value_peak: of each kv head and dimension.
    """

    energy: list[float] = field(default_factory=list)
    noise: list[list[float]] = field(default_factory=list)
    gain: list[float] = field(default_factory=list)
    key_sum: list[list[float]] = field(default_factory=list)
    keys: int = 0
    value_peak: list[list[float]] = field(default_factory=list)

    def see(self, key: Tensor, value: Tensor) -> None:
        """Add keys and values (B, Hk, S, D) to what the constants are made of."""
        self.key_sum = _added(self.key_sum, key.double().sum((0, 2)))
        self.keys += key.shape[0] * key.shape[2]
        peak = value.double().abs().amax((0, 2))
        self.value_peak = torch.maximum(peak, peak.new_tensor(self.value_peak or peak.tolist())).tolist()

    def planned(self, plans: Sequence[HeadPlan]) -> PlannedHeads:
        """Return the constants for plans of the heads."""
        mean = torch.tensor(self.key_sum, dtype=torch.float64) / max(self.keys, 1)
        return PlannedHeads(tuple(plans), _rows(mean.tolist()), _rows(self.value_peak))

    def add(self, exact: Tensor, outputs: Sequence[Tensor]) -> None:
        """Add the exact output (B, H, S, D) of a sample, and those at each plan."""
        self.energy = _added(self.energy, _per_head(exact))
        noise = torch.stack([_per_head(got - exact) for got in outputs])
        self.noise = _added(self.noise, noise.nan_to_num(math.inf))

    def add_gain(self, gain: Tensor) -> None:
        """Add a sample's gain of each head."""
        self.gain = _added(self.gain, gain)

    def choices(
        self, plans: Sequence[HeadPlan], samples: int, flops: float, moved: float, device: Device
    ) -> list[tuple[tuple[HeadPlan, ...], float, float]]:
        """Return sets of plans for all heads, with their seconds and the squared relative error of the model's output.

        Each is the best for a multiplier of the error: the least Σ seconds + multiplier · gain · error².

        Args:
            plans: that a head may have.
            samples: that the gains are of.
            flops: of both products of all heads at full rank.
            moved: numbers of 16 bits that it reads and writes.
        """
        heads, full = len(self.energy), max(rank for _, rank in plans)
        error = torch.tensor(self.noise) / torch.tensor(self.energy).clamp_min(torch.finfo(torch.float32).tiny)
        added = error * torch.tensor(self.gain) / max(samples, 1)  # (plans, heads)
        seconds = torch.tensor(
            [
                flops / heads / 2 * (rank / full / getattr(device, scores) + 1 / getattr(device, values)) / 1e12
                for scores, values, rank in ((*PRODUCTS[name], rank) for name, rank in plans)
            ]
        )
        reading = 2 * moved / device.memory / 1e9
        found = {}
        for step in range(MULTIPLIERS):
            multiplier = 10.0 ** (20 * step / (MULTIPLIERS - 1) - 12)
            chosen = (seconds.unsqueeze(1) + multiplier * added).nan_to_num(math.inf).argmin(0)
            picked = tuple(plans[place] for place in chosen.tolist())
            spent = float(seconds[chosen].sum()) + reading
            found[picked] = picked, spent, float(added.gather(0, chosen.unsqueeze(0)).sum())
        return list(found.values())


def _per_head(x: Tensor) -> Tensor:
    return x.double().square().sum((0, 2, 3))


def _added(known: list[Any], x: Tensor) -> list[Any]:
    found: list[Any] = (x.double() + x.new_tensor(known, dtype=torch.float64) if known else x.double()).tolist()
    return found


def _rows(x: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in x)
