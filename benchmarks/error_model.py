"""Measured error against predicted, head by head, and the safety factor that plans need to keep their tolerance.

    python -m benchmarks.error_model [--tokens N] [--quick]

Each head is run in every precision at every class of rank by the reference implementation, and compared with float64.
Writes benchmarks/results/error_model.json and docs/error-model.png, unless the sequences are of another length.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from adaattn import ops
from adaattn.masks import attended_keys
from adaattn.ops.plan.api import plan_within
from adaattn.planning.budget import Budget
from adaattn.planning.error_model import Moments, plan_of
from adaattn.planning.ladder import ladder_table, rank_classes
from adaattn.planning.precision import PRECISIONS

ROOT = Path(__file__).parents[1]
RESULTS, PLOT = ROOT / "benchmarks" / "results" / "error_model.json", ROOT / "docs" / "error-model.png"
QUANTILES = (0.01, 0.5, 0.9, 0.99, 0.999, 1.0)
TOLERANCES = tuple(10 ** (n / 10) for n in range(-30, -9))  # ten a decade, from 1e-3 to 1e-1
SAFETIES = tuple(n / 100 for n in range(50, 301))
KEPT = 0.99  # share of heads that is to be within the tolerance
TOKENS, HEAD_DIMS, HEADS = 1024, (32, 64, 128), 4  # heads of each size, distribution and mask
COLORS = ("#222222", "#0072b2", "#56b4e9", "#e69f00", "#d55e00")  # of the precisions; told apart by the colour-blind

Draw = Callable[..., Tensor]


def _outliers(*shape: int) -> Tensor:
    return torch.randn(shape) + 10 * torch.randn(shape) * (torch.rand(shape) < 0.001)


def _heavy(*shape: int) -> Tensor:
    return torch.distributions.StudentT(3.0).sample(shape)


def _loud(*shape: int) -> Tensor:
    return 2 * torch.randn(shape)


def _biased(*shape: int) -> Tensor:
    return torch.randn(shape) + 10 * torch.randn(shape[-1])


def _near_constant(*shape: int) -> Tensor:
    return 0.7 + 0.01 * torch.randn(shape)


def _channel_outliers(*shape: int) -> Tensor:
    return torch.randn(shape) * torch.where(torch.arange(shape[-1]) % 32 == 0, 8.0, 1.0)


def _decaying(*shape: int) -> Tensor:
    return torch.randn(shape) * torch.logspace(0.3, -2.5, shape[-1])


def _tiny(*shape: int) -> Tensor:
    return 1e-3 * torch.randn(shape)


# Name: how q, k and v are drawn.
DISTRIBUTIONS: dict[str, tuple[Draw, Draw, Draw]] = {
    "normal": (torch.randn, torch.randn, torch.randn),
    "heavy tails": (_heavy, _heavy, _heavy),
    "outliers": (_outliers, _outliers, _outliers),
    "peaked": (_loud, _loud, torch.randn),
    "biased keys": (torch.randn, _biased, torch.randn),
    "near constant": (_near_constant, _near_constant, _near_constant),
    "channel outliers": (_channel_outliers, _channel_outliers, _channel_outliers),
    "decaying energy": (_decaying, _decaying, _decaying),
    "tiny": (_tiny, _tiny, _tiny),
}
ATTENDS = ("everywhere", "causal", "padding")


class Heads(NamedTuple):
    """Heads of one size: their moments (n, 1, ...), and errors (n, precisions, classes of rank)."""

    query: Moments
    key: Moments
    value: Moments
    predicted: Tensor
    measured: Tensor


def _exact(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Return softmax(q kᵀ/√D) v in float64, without any code of AdaAttn."""
    scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v.double()


def measure(draw: tuple[Draw, Draw, Draw], attends: str, tokens: int, head_dim: int) -> Heads:
    """One head, by every precision and class of rank: these are its query heads, on one key and value."""
    q, k, v = (one(1, 1, tokens, head_dim) for one in draw)
    mask, causal = None, attends == "causal"
    if attends == "padding":
        mask = (torch.arange(tokens) < torch.randint(tokens // 4, tokens, ())).view(1, 1, 1, tokens)
    allowed = torch.ones(tokens, tokens, dtype=torch.bool) if mask is None else mask
    want = _exact(q, k, v, allowed.tril() if causal else allowed)

    ranks = rank_classes(head_dim)
    grid = torch.cartesian_prod(torch.arange(len(PRECISIONS)), torch.tensor(ranks)).int()
    precision, rank = grid.T.unsqueeze(1)  # (1, steps) each
    counted = attended_keys(mask, 1)
    query, key = ops.token_moments(q), ops.token_moments(k, counted, center=True)
    value = ops.token_moments(v, counted)
    every = Moments(*(x.repeat_interleave(len(grid), 1) for x in query))
    predicted = plan_of(precision, rank, every, key, value, head_dim**-0.5).predicted_error
    assert predicted is not None
    got = torch.cat(
        [  # a precision at a time: larger temporaries would cost more time than the arithmetic
            ops.adaptive_attention(
                q.expand(-1, len(ranks), -1, -1),
                k,
                v,
                key.mean,
                value.channel_peak,
                *plan,
                mask,
                is_causal=causal,
                impl="reference",
            )
            for plan in zip(precision.split(len(ranks), 1), rank.split(len(ranks), 1), strict=True)
        ],
        dim=1,
    )
    measured = (got - want).square().mean((2, 3)).sqrt() / want.square().mean((2, 3)).sqrt()
    return Heads(query, key, value, *(x.view(1, len(PRECISIONS), len(ranks)) for x in (predicted, measured)))


def together(heads: list[Heads]) -> Heads:
    """Many heads of one size as one."""
    moments = (Moments(*map(torch.cat, zip(*(head[i] for head in heads), strict=True))) for i in range(3))
    return Heads(*moments, *(torch.cat([head[i] for head in heads]) for i in (3, 4)))


def planned(sizes: dict[int, Heads], tolerance: float, safety: float) -> tuple[Tensor, Tensor]:
    """Measured error of each head at its plan, and whether the plan is cheaper than fp32 at full rank."""
    errors, cheaper = [], []
    for head_dim, heads in sizes.items():
        budget = Budget(tolerance, safety)
        plan = plan_within(budget, ladder_table(budget, head_dim), *heads[:3], head_dim**-0.5)
        column = torch.searchsorted(torch.tensor(rank_classes(head_dim)), plan.rank.flatten().long())
        errors.append(heads.measured[torch.arange(len(column)), plan.precision.flatten().long(), column])
        cheaper.append((plan.precision.flatten() != 0) | (plan.rank.flatten() < head_dim))
    return torch.cat(errors), torch.cat(cheaper)


def needed_safety(sizes: dict[int, Heads]) -> dict[str, float]:
    """Return the least candidates that keep the share of heads, as every greater one does."""
    kept = [
        [(planned(sizes, tolerance, safety)[0] <= tolerance).double().mean() for tolerance in TOLERANCES]
        for safety in track(SAFETIES, "safety factors", console=Console(stderr=True))
    ]

    def least(shares: list[Tensor]) -> float:
        short = [i for i, share in enumerate(shares) if share < KEPT]
        return SAFETIES[short[-1] + 1] if short else SAFETIES[0]

    return {
        "at every tolerance": least([min(shares) for shares in kept]),
        "over all tolerances": least([torch.stack(shares).mean() for shares in kept]),
    }


def ratios(sizes: dict[int, Heads]) -> dict[str, list[float]]:
    """Quantiles of measured over predicted error: of each precision at full rank, and of each cut at any precision."""
    of_size = [heads.measured / heads.predicted for heads in sizes.values()]
    parts = {name: [x[:, code, -1] for x in of_size] for code, name in enumerate(PRECISIONS)}
    parts |= {f"rank {n + 1}/4": [x[:, :, n].flatten() for x in of_size] for n in range(3)}
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    # A precision that the values do not fit is predicted to err without bound: no plan takes it.
    joined = {name: torch.cat(part).double() for name, part in parts.items()}
    return {name: [_round(q) for q in x[x > 0].quantile(levels)] for name, x in joined.items()}


def plans(sizes: dict[int, Heads]) -> list[dict[str, float]]:
    """Return a table of the plans at the default safety, one row a tolerance."""
    rows = []
    for tolerance in TOLERANCES:
        error, cheaper = planned(sizes, tolerance, Budget.safety)
        rows.append(
            {
                "tolerance": _round(tolerance),
                "heads over": int((error > tolerance).sum()),
                "worst over tolerance": _round(error.max() / tolerance),
                "share cheaper than fp32": _round(cheaper.double().mean()),
            }
        )
    return rows


def over_by_distribution(sizes: dict[int, Heads]) -> dict[str, int]:
    """Plans of the default safety that miss their tolerance, over all of these; heads are in the order of the draws."""
    over = sum((planned(sizes, tolerance, Budget.safety)[0] > tolerance).int() for tolerance in TOLERANCES)
    assert isinstance(over, Tensor)
    return dict(zip(DISTRIBUTIONS, over.view(len(sizes), len(DISTRIBUTIONS), -1).sum((0, 2)).tolist(), strict=True))


def plot(sizes: dict[int, Heads]) -> None:
    """Every head in every precision at every class of rank, measured over predicted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
    ends = (1e-7, 1e1)
    for axis, title, cut in zip(
        axes, ("full rank", "rank cut to 1/4, 2/4, 3/4"), (slice(3, 4), slice(0, 3)), strict=True
    ):
        for code, name in enumerate(PRECISIONS):
            x, y = (
                torch.cat([pick(heads)[:, code, cut].flatten() for heads in sizes.values()])
                for pick in (lambda heads: heads.predicted, lambda heads: heads.measured)
            )
            axis.scatter(x, y, s=5, color=COLORS[code], alpha=0.5, linewidths=0, label=name)
        axis.plot(ends, ends, color="#777777", linewidth=0.8, label="measured = predicted")
        safe = [Budget.safety * end for end in ends]
        axis.plot(ends, safe, color="#777777", linewidth=0.8, linestyle="--", label=f"safety {Budget.safety:g}")
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=title, xlabel="predicted relative error")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("measured relative error")
    axes[0].legend(frameon=False, markerscale=3)
    figure.savefig(PLOT, dpi=90, metadata={"Software": None})  # the same file from the same numbers


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left", box=None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _round(x: Any) -> float:
    return float(f"{float(x):.3g}")


@click.command(help=__doc__)
@click.option("--tokens", default=TOKENS, show_default=True, help="Length of the sequences.")
@click.option("--quick", is_flag=True, help="Few short heads: shows that the script runs. Writes nothing.")
def main(tokens: int, quick: bool) -> None:
    torch.manual_seed(0)
    tokens, head_dims, count = (32, (32,), 1) if quick else (tokens, HEAD_DIMS, HEADS)
    cases = [(size, name, attends) for size in head_dims for name in DISTRIBUTIONS for attends in ATTENDS]
    found: dict[int, list[Heads]] = {size: [] for size in head_dims}
    for size, name, attends in track(cases, "heads", console=Console(stderr=True)):
        found[size] += [measure(DISTRIBUTIONS[name], attends, tokens, size) for _ in range(count)]
    sizes = {size: together(heads) for size, heads in found.items()}

    content = {
        "tokens": tokens,
        "head dims": head_dims,
        "distributions": list(DISTRIBUTIONS),
        "attends": ATTENDS,
        "heads": sum(len(heads.measured) for heads in sizes.values()),
        "measured over predicted": {"quantiles": QUANTILES, **ratios(sizes)},
        f"safety that keeps {KEPT:.0%} of heads": needed_safety(sizes),
        "default safety": Budget.safety,
        "plans": plans(sizes),
        "plans over by distribution": over_by_distribution(sizes),
    }
    percent = [f"{100 * level:g} %" for level in QUANTILES]
    show(
        "measured / predicted error",
        ["", *percent],
        [[name, *(f"{x:.2f}" for x in values)] for name, values in ratios(sizes).items()],
    )
    show(
        f"plans at safety {Budget.safety:g}",
        list(content["plans"][0]),
        [[f"{x:g}" for x in row.values()] for row in content["plans"]],
    )
    click.echo(f"plans over their tolerance: {content['plans over by distribution']}")
    for where, safety in content[f"safety that keeps {KEPT:.0%} of heads"].items():
        click.echo(f"{KEPT:.0%} of {content['heads']} heads keep the tolerance from safety {safety:g} on {where}")
    if tokens == TOKENS:
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
        plot(sizes)


if __name__ == "__main__":
    main()
