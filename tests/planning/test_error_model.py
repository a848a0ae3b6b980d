"""The promise: what a plan does to the output stays within the tolerance, and no plan is chosen that could not.

The heads of which that is known to be untrue are listed in `BEYOND_THE_MODEL`, with what was measured.
"""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from adaattn.errors import ConfigError
from adaattn.masks import attended_keys
from adaattn.ops import adaptive_attention, token_moments
from adaattn.ops.plan.api import plan_within
from adaattn.planning.budget import Budget, resolve_tolerance
from adaattn.planning.error_model import Moments, noise, plan_of
from adaattn.planning.ladder import ladder, ladder_table, rank_classes
from adaattn.planning.precision import BF16, COST, FP16, FP32, INT8, INT8_FP8, PRECISIONS
from adaattn.planning.rank_rules import effective_rank, power_rank
from tests.support import oracle


def flat(power: float = 1.0, peak: float = 3.0, head_dim: int = 16) -> Moments:
    """Moments of one head whose dimensions are all alike."""
    same = torch.full((1, 1, head_dim), power)
    return Moments(torch.zeros_like(same), same, torch.full_like(same, peak), torch.full((1, 1), peak).square())


def choose(budget: Budget, q: Moments, k: Moments, v: Moments, scale: float = 0.25) -> tuple[int, int, float]:
    plan = plan_within(budget, ladder_table(budget, q.mean.shape[-1]), q, k, v, scale)
    assert plan.predicted_error is not None
    return int(plan.precision), int(plan.rank), float(plan.predicted_error)


@pytest.mark.parametrize(
    ("head_dim", "classes"), [(64, (16, 32, 48, 64)), (20, (5, 10, 15, 20)), (6, (2, 3, 5, 6)), (2, (1, 2)), (1, (1,))]
)
def test_rank_classes(head_dim: int, classes: tuple[int, ...]) -> None:
    assert rank_classes(head_dim) == classes
    assert rank_classes(head_dim, low_rank=False) == (head_dim,)


@pytest.mark.parametrize("head_dim", [1, 20, 64])
@pytest.mark.parametrize("precisions", [PRECISIONS, ("fp32",), ("int8", "bf16"), ("int8_fp8",), ("fp16", "bf16")])
@pytest.mark.parametrize("low_rank", [True, False])
def test_ladder_climbs_from_cheap_to_exact(head_dim: int, precisions: tuple[str, ...], low_rank: bool) -> None:
    budget = Budget(1e-2, precisions=precisions, low_rank=low_rank)
    steps = ladder(budget, head_dim)
    every = product(map(PRECISIONS.index, precisions), rank_classes(head_dim, low_rank))
    assert sorted(steps) == sorted(every)
    most_precise = next(name for name in ("fp32", "fp16", "bf16", "int8", "int8_fp8") if name in precisions)
    assert steps[-1] == (PRECISIONS.index(most_precise), head_dim)
    costs = [COST[PRECISIONS[code]][0] * rank / head_dim + COST[PRECISIONS[code]][1] for code, rank in steps[:-1]]
    assert all(before <= after for before, after in pairwise(costs))
    assert ladder_table(budget, head_dim).T.tolist() == [list(step) for step in steps]


def test_ladder_in_full() -> None:
    budget = Budget(1e-2, precisions=("fp32", "fp16", "bf16", "int8_fp8"))
    fp32, fp16, bf16, fp8 = FP32, FP16, BF16, INT8_FP8
    assert ladder(budget, 2) == [(fp8, 1), (fp8, 2), (fp16, 1), (bf16, 1), (fp16, 2), (bf16, 2), (fp32, 1), (fp32, 2)]


def test_noise_is_the_table_of_the_design() -> None:
    q, k, v = flat(power=2.0, peak=5.0), flat(power=3.0, peak=7.0), flat(power=0.5)
    total = 16 * 2.0 * 3.0 / 16  # D·E[q²]·E[k²]·scale²
    u = {"fp32": 0.42 * 2**-21, "bf16": 0.42 * 2**-8, "fp16": 0.42 * 2**-11, "fp8": 0.42 * 2**-4}
    integer = (1 / 16) / (12 * 127**2) * (25 * 16 * 3.0 + 49 * 16 * 2.0)
    want = [2 * u[name] ** 2 * (total + 1) for name in ("fp32", "bf16", "fp16")]
    want += [integer + 2 * u[name] ** 2 for name in ("fp16", "fp8")]
    torch.testing.assert_close(noise(q, k, v, 0.25)[0, 0], torch.tensor(want), rtol=1e-3, atol=0)  # underflow is extra


@pytest.mark.parametrize(
    ("precisions", "q", "k", "v", "code"),
    [
        (("fp32", "fp16"), 65504, 1, 1, FP16),
        (("fp32", "fp16"), 65536, 1, 1, FP32),
        (("fp32", "fp16"), 1, 65536, 1, FP32),
        (("fp32", "fp16"), 1, 1, 65536, FP32),
        (("fp32", "bf16"), 1, 1, 3.38e38, BF16),
        (("fp32", "bf16"), 1, 1, 3.4e38, FP32),
        (("fp32", "int8"), 1e-3, 1, 65504, INT8),
        (("fp32", "int8"), 1e-3, 1, 65536, FP32),
        (("fp32", "int8_fp8"), 1e-3, 1, 65536, INT8_FP8),
        (("fp16",), 65536, 1, 1, FP16),  # nothing else is allowed: the fallback stands, and says that it does not fit
    ],
)
def test_values_must_fit_the_format(precisions: tuple[str, ...], q: float, k: float, v: float, code: int) -> None:
    of_q, of_k, of_v = (flat(power=1e-6, peak=peak) for peak in (q, k, v))
    # Integers take their steps from the peaks; here those of q and k are to stay small.
    of_q, of_k = (m._replace(token_peak=torch.full((1, 1), 1e-6)) for m in (of_q, of_k))
    budget = Budget(5e-2, precisions=precisions)
    chosen, _, error = choose(budget, of_q, of_k, of_v._replace(second_moment=(of_v.channel_peak / 10).square()))
    assert chosen == code
    assert (error <= budget.limit) == (precisions != ("fp16",))


def test_the_limit_is_met_exactly() -> None:
    moments = flat(), flat(), flat()
    predicted = choose(Budget(1.0, precisions=("bf16",), low_rank=False), *moments)[2]
    for factor, code in ((1.001, BF16), (0.999, FP32)):
        for safety in (1.0, 2.0):
            budget = Budget(predicted * safety * factor, safety, ("fp32", "bf16"), low_rank=False)
            assert choose(budget, *moments)[0] == code


@pytest.mark.parametrize("power", [0.0, 1e-30, torch.inf, 1e38])
def test_moments_at_the_ends_of_float32(power: float) -> None:
    moments = flat(power, peak=power), flat(power, peak=power), flat(power, peak=power)
    code, rank, error = choose(Budget(1e-2), *moments)
    if power > 1:  # unknown must not look small
        assert (code, rank, error) == (FP32, 16, math.inf)
        plan = plan_of(*(torch.full((1, 1), n, dtype=torch.int32) for n in (FP16, 4)), *moments, 0.25)
        assert plan.predicted_error is not None
        assert plan.predicted_error.isinf().all()
    else:
        assert rank == 4
        assert error <= 8e-3


INF, TINY = math.inf, 1e-30


@pytest.mark.parametrize(
    ("energies", "effective", "power"),
    [
        ([1, 1, 1, 1], 4, 4),
        ([1, 1, 0, 0], 2, 2),
        ([0, 0, 0, 5], 1, 4),  # power keeps leading dimensions, so a late one costs all before it
        ([8, 1, 0.5, 0.5], 3, 2),
        ([100, 1, 1, 1], 2, 1),
        ([TINY, TINY, TINY, TINY], 4, 4),
        ([0, 0, 0, 0], 1, 1),
        ([INF, 1, 1, 1], 4, 4),  # overflowed energies say nothing
        ([INF, INF, INF, INF], 4, 4),
        ([3e38, 3e38, 1, 1], 4, 4),
        ([math.nan, 1, 1, 1], 4, 4),
    ],
    ids=str,
)
def test_ranks_by_method(energies: list[float], effective: int, power: int) -> None:
    weights = torch.tensor([[energies]], dtype=torch.float32)
    assert effective_rank(weights).tolist() == [[effective]]
    assert power_rank(weights, 0.9).tolist() == [[power]]
    assert effective_rank(weights).dtype == power_rank(weights, 0.9).dtype == torch.int32


def test_all_energy_needs_every_dimension_that_has_some() -> None:
    assert power_rank(torch.tensor([4.0, 3.0, 2.0, 0.0]), 1.0).item() == 3


@pytest.mark.parametrize(
    "options",
    [
        {"tolerance": 0},
        {"tolerance": -1e-2},
        {"tolerance": math.nan},
        {"tolerance": math.inf},
        {"tolerance": 1e-2, "safety": 0},
        {"tolerance": 1e-2, "precisions": ()},
        {"tolerance": 1e-2, "precisions": ("fp64",)},
    ],
    ids=str,
)
def test_budgets_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(options))):
        Budget(**options)


def test_policies_name_tolerances() -> None:
    assert [resolve_tolerance(None, name) for name in ("quality", "balanced", "speed")] == [1e-3, 1e-2, 5e-2]
    for tolerance, policy in ((1e-2, "speed"), (None, "fast")):
        with pytest.raises(ConfigError, match="policy"):
            resolve_tolerance(tolerance, policy)


def shared_factors(q: oracle.Shape, k: oracle.Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Small queries and keys that four directions span, the same for both: their dimensions add up in phase."""
    directions = torch.randn(4, q[3])
    span = [0.05 * torch.randn(*shape[:3], 4) @ directions for shape in (q, k)]
    return *span, torch.randn(k)


LONG, SHORT = [(2, 127, 127, 64), (2, 129, 129, 20)], [(8, 1, 17, 64), (8, 17, 129, 20)]
MAKERS = {
    **oracle.DISTRIBUTIONS,
    "shared factors": shared_factors,
    "spread sink": lambda q, k: oracle.silent_sink(q, k, width=16),
}
BEYOND_THE_MODEL = {  # heads over the tolerance among 256, worst of three seeds
    "loud tokens": "2 heads, up to 1.24 times: noise is loudest where probability gathers",
    "correlated": "11 heads, up to 1.26 times: noise is loudest where probability gathers",
    "shared factors": "43 heads, up to 2.19 times: energies by dimension do not see that dropped ones add in phase",
    "spread sink": "64 heads, all int8_fp8, up to 5.8 times: no one dimension shows the key that stands out",
}


def heads_over(distribution: str, shapes: list[tuple[int, int, int, int]], batch_together: bool = False) -> list[str]:
    """Return the heads whose measured error is over the tolerance of their plan, in words."""
    over = []
    for (batch, queries, keys, head_dim), kind, causal in product(shapes, ("none", "empty rows"), (False, True)):
        drawn = MAKERS[distribution]((batch, 4, queries, head_dim), (batch, 2, keys, head_dim))
        q, k, v = (x.float() for x in drawn)
        mask = oracle.mask(kind, batch, 4, queries, keys)
        counted = attended_keys(mask, 2)
        moments = token_moments(q), token_moments(k, counted, True), token_moments(v, counted)
        mean, peak = moments[1].mean, moments[2].channel_peak
        want = oracle.attention(q, k, v, mask, causal)
        for tolerance in (1e-3, 5e-3, 1e-2, 5e-2):
            budget = Budget(tolerance)
            plan = plan_within(budget, ladder_table(budget, head_dim), *moments, head_dim**-0.5)
            chosen = mean, peak, plan.precision, plan.rank
            output = adaptive_attention(q, k, v, *chosen, mask, is_causal=causal, impl="reference")
            if batch_together:
                measured = oracle.error(*(x.transpose(0, 1).flatten(1, 2) for x in (output, want))).unsqueeze(0)
            else:
                measured = oracle.error(output, want)
            over += [
                f"{measured[b, h] / tolerance:.2f} times {tolerance:g}, {queries} queries: "
                f"{PRECISIONS[plan.precision[b, h]]} at rank {plan.rank[b, h]}"
                for b, h in (~(measured <= tolerance)).nonzero().tolist()
            ]
    return over


@pytest.mark.parametrize(
    "distribution",
    [
        pytest.param(name, marks=[pytest.mark.xfail(reason=BEYOND_THE_MODEL[name], strict=True)])
        if name in BEYOND_THE_MODEL
        else name
        for name in MAKERS
    ],
)
def test_plans_keep_the_tolerance(distribution: str) -> None:
    assert heads_over(distribution, LONG) == []


@pytest.mark.parametrize("distribution", [name for name in MAKERS if name not in BEYOND_THE_MODEL])
def test_plans_keep_the_tolerance_over_many_short_heads(distribution: str) -> None:
    assert heads_over(distribution, SHORT, batch_together=True) == []


@pytest.mark.xfail(reason="39 heads of 17408, up to 1.96 times: too few queries to average over", strict=True)
def test_plans_keep_the_tolerance_of_each_short_head() -> None:
    assert [head for name in oracle.DISTRIBUTIONS for head in heads_over(name, SHORT)] == []
