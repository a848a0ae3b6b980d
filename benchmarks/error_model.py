"""Measured error against predicted, and whether plans keep their tolerance, on distributions of many kinds.

    python -m benchmarks.error_model [--quick]

Errors are those of the reference implementation against float64, head by head. Writes
benchmarks/results/error_model.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from adaattn import ops
from adaattn.budget import Moments, ladder_table, plan_of, plan_within, rank_classes
from adaattn.config import PRECISIONS, Budget

RESULTS = Path(__file__).parent / "results"
HEADS = 8


def _outliers(*shape: int) -> Tensor:
    return torch.randn(shape) + 10 * torch.randn(shape) * (torch.rand(shape) < 0.001)


def _channel_outliers(*shape: int) -> Tensor:
    return torch.randn(shape) * torch.where(torch.arange(shape[-1]) % 32 == 0, 8.0, 1.0)


def _decaying(*shape: int) -> Tensor:
    return torch.randn(shape) * torch.logspace(0.3, -2.5, shape[-1])


DISTRIBUTIONS: dict[str, Callable[..., Tensor]] = {
    "normal": lambda *shape: torch.randn(shape),
    "outliers": _outliers,
    "peaked": lambda *shape: 2 * torch.randn(shape),
    "biased": lambda *shape: torch.randn(shape) + 3,
    "channel outliers": _channel_outliers,
    "heavy tails": lambda *shape: torch.distributions.StudentT(4.0).sample(shape),
    "uniform": lambda *shape: torch.rand(shape) * 2 - 1,
    "decaying energy": _decaying,
    "tiny": lambda *shape: 1e-3 * torch.randn(shape),
}


def _moments(q: Tensor, k: Tensor, v: Tensor) -> tuple[Moments, Moments, Moments]:
    return ops.token_moments(q), ops.token_moments(k, center=True), ops.token_moments(v)


def _error(q: Tensor, k: Tensor, v: Tensor, precision: Tensor, rank: Tensor, scale: float) -> Tensor:
    """Measured relative error (B, H) at a plan."""
    mean, peak = k.mean(2), v.abs().amax(2)
    full = torch.full_like(rank, q.shape[-1])
    doubles = (q.double(), k.double(), v.double())
    exact = ops.adaptive_attention(*doubles, mean, peak, torch.zeros_like(precision), full, scale=scale)
    got = ops.adaptive_attention(q, k, v, mean, peak, precision, rank, scale=scale)
    return (got - exact).square().mean((2, 3)).sqrt() / exact.square().mean((2, 3)).sqrt()


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Short sequences: shows that the script runs. Writes nothing.")
def main(quick: bool) -> None:
    torch.manual_seed(0)
    tokens = 64 if quick else 512
    ratios: dict[str, list[float]] = {name: [] for name in (*PRECISIONS, "rank")}
    tolerances: dict[float, dict[str, Any]] = {}
    heads = over = cheaper = 0
    for draw in DISTRIBUTIONS.values():
        for head_dim in (64, 128):
            q, k, v = (draw(1, HEADS, tokens, head_dim) for _ in range(3))
            scale = head_dim**-0.5
            moments = _moments(q, k, v)
            for code, name in enumerate(PRECISIONS):
                precision = torch.full((1, HEADS), code, dtype=torch.int32)
                rank = torch.full_like(precision, head_dim)
                predicted = plan_of(precision, rank, *moments, scale).predicted_error
                assert predicted is not None
                ratios[name] += (_error(q, k, v, precision, rank, scale) / predicted).flatten().tolist()
            for width in rank_classes(head_dim)[:-1]:
                precision = torch.zeros(1, HEADS, dtype=torch.int32)
                rank = torch.full_like(precision, width)
                predicted = plan_of(precision, rank, *moments, scale).predicted_error
                assert predicted is not None
                ratios["rank"] += (_error(q, k, v, precision, rank, scale) / predicted).flatten().tolist()
            for tolerance in (1e-3, 5e-3, 1e-2, 5e-2):
                budget = Budget(tolerance)
                plan = plan_within(budget, ladder_table(budget, head_dim), *moments, scale)
                measured = _error(q, k, v, plan.precision, plan.rank, scale)
                row = tolerances.setdefault(tolerance, {"heads": 0, "over": 0, "cheaper": 0, "worst": 0.0})
                row["heads"] += measured.numel()
                row["over"] += int((measured > tolerance).sum())
                row["cheaper"] += int(((plan.precision != 0) | (plan.rank < head_dim)).sum())
                row["worst"] = max(row["worst"], float(measured.max()))
    click.echo("measured / predicted error, least to greatest over heads")
    for name, values in ratios.items():
        click.echo(f"  {name:<9} {min(values):5.2f} to {max(values):5.2f}")
    click.echo("plans, safety 1.25")
    for tolerance, row in tolerances.items():
        heads, over, cheaper = heads + row["heads"], over + row["over"], cheaper + row["cheaper"]
        click.echo(
            f"  tolerance {tolerance:.0e}: {row['over']} of {row['heads']} heads over it, worst {row['worst']:.1e}, "
            f"{row['cheaper'] / row['heads']:.0%} cheaper than fp32"
        )
    click.echo(f"  in all: {over} of {heads} heads over, {cheaper / heads:.0%} cheaper than fp32")
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        content = {
            "tokens": tokens,
            "distributions": list(DISTRIBUTIONS),
            "ratios": {name: [min(values), max(values)] for name, values in ratios.items()},
            "plans": {str(tolerance): row for tolerance, row in tolerances.items()},
        }
        (RESULTS / "error_model.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
