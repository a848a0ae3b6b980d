"""The two ops against float64, and rounding for rounding against an emulation of their specification.

The reference implementation is what every other implementation is held to, so it is held here to the mathematics: how
far each plan may stray is what the error model predicted for it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from adaattn.masks import attended_keys
from adaattn.ops import adaptive_attention, token_moments
from adaattn.ops.adaptive_attention.impl import reference
from adaattn.ops.adaptive_attention.ops import adaptive_attention as attention_op
from adaattn.ops.plan.api import plan_within
from adaattn.ops.plan.ops import plan as plan_op
from adaattn.ops.token_moments.ops import token_moments as moments_op
from adaattn.planning.budget import Budget
from adaattn.planning.error_model import Moments, plan_of
from adaattn.planning.ladder import ladder_table, rank_classes
from adaattn.planning.precision import BF16, FP32, INT8, INT8_FP8, PRECISIONS
from tests.support import oracle
from tests.support.oracle import Array

# batch, kv heads, queries, keys, head_dim; there are always 20 query heads, one for each precision and rank.
SHAPES = [(1, 20, 1, 1, 64), (8, 4, 1, 17, 64), (4, 2, 17, 129, 20), (1, 4, 127, 127, 64), (1, 1, 129, 17, 20)]
CASES = [  # type of the inputs, mask, causal
    (torch.float32, "none", False),
    (torch.float32, "additive", False),
    (torch.float32, "padding", True),
    (torch.float32, "per query", False),
    (torch.float32, "biased", True),
    (torch.float32, "empty rows", True),
    (torch.float64, "none", True),
    (torch.float64, "empty rows", False),
    (torch.float16, "padding", False),
    (torch.float16, "biased", True),
    (torch.bfloat16, "none", True),
    (torch.bfloat16, "per query", False),
]


def every_plan(batch: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Precision and rank (batch, 20): each pair once."""
    pairs = torch.tensor(list(product(range(len(PRECISIONS)), rank_classes(head_dim))), dtype=torch.int32)
    return pairs[:, 0].expand(batch, -1), pairs[:, 1].expand(batch, -1)


def draw(distribution: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, kv_heads, queries, keys, head_dim = shape
    make = oracle.DISTRIBUTIONS[distribution]
    drawn = make((batch, 20, queries, head_dim), (batch, kv_heads, keys, head_dim))
    largest = 3e4 if dtype == torch.float16 else torch.inf
    return [(x / max(1.0, float(x.abs().max()) / largest)).to(dtype) for x in drawn]


def moments(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Moments, Moments, Moments]:
    keys = attended_keys(mask, k.shape[1])
    return token_moments(q), token_moments(k, keys, True), token_moments(v, keys)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("distribution", oracle.DISTRIBUTIONS)
@pytest.mark.parametrize("impl", ["reference", pytest.param("auto", marks=pytest.mark.thorough)])
def test_error_stays_within_what_the_model_predicts(impl: str, distribution: str, shape: tuple[int, ...]) -> None:
    batch, _, queries, keys, head_dim = shape
    precision, rank = every_plan(batch, head_dim)
    exact = (precision[0] == FP32) & (rank[0] == head_dim)
    over = []
    for dtype, kind, causal in CASES:
        q, k, v = draw(distribution, shape, dtype)
        mask = oracle.mask(kind, batch, 20, queries, keys)
        of_q, of_k, of_v = moments(q, k, v, mask)
        predicted = plan_of(precision, rank, of_q, of_k, of_v, head_dim**-0.5).predicted_error.double()
        plan = of_k.mean, of_v.channel_peak, precision, rank
        output = adaptive_attention(q, k, v, *plan, mask, is_causal=causal, impl=impl)
        assert output.dtype == dtype
        assert output.isfinite().all(), f"{dtype}, {kind} mask, causal={causal}"

        want = oracle.attention(q, k, v, mask, causal)
        if queries < 100:  # a prediction is a mean over tokens: where they are few, over those of the whole batch
            output, want = (x.transpose(0, 1).flatten(1, 2) for x in (output, want))
            predicted = predicted.square().mean(0).sqrt()
        measured = oracle.error(output, want)
        sums = 0.0 if dtype == torch.float64 else oracle.SUMS
        # The model is first order in the noise, and no budget reaches where that ends.
        known = torch.where(predicted <= oracle.FIRST_ORDER, predicted, torch.inf)
        allowed = torch.where(exact, 0, oracle.MODEL * known) + sums + oracle.OUTPUT[dtype] + oracle.EXACT
        for at in (measured > allowed).nonzero().tolist():
            name, ratio = PRECISIONS[precision[0, at[-1]]], measured[tuple(at)] / predicted[tuple(at)]
            over.append(f"{ratio:.2f} times: {name} at rank {rank[0, at[-1]]}, {dtype}, {kind} mask, causal={causal}")
    assert not over, "\n".join(over)


def to_format(x: Array, mantissa: int, smallest_exponent: int, largest: float) -> Array:
    """Round x to the nearest number of a floating-point format, half to even, saturating."""
    exponent = np.maximum(np.frexp(x)[1] - 1, smallest_exponent)
    step = np.ldexp(1.0, exponent - mantissa)
    return np.clip(np.rint(x / step) * step, -largest, largest)


BRAIN, HALF, FP8 = (7, -126, 3.3895e38), (10, -14, 65504.0), (3, -6, 448.0)
FORMAT_OF_VALUES = {1: BRAIN, 2: HALF, 3: HALF}


def emulate(q: Array, k: Array, v: Array, mean: Array, peak: Array, code: int, rank: int, shut: Array) -> Array:
    """One head as DESIGN.md words it, (Sq, D) in float64; `shut` is what is added to the scores."""
    q, k = np.where(np.arange(q.shape[1]) < rank, q, 0), k - mean
    if code in (INT8, INT8_FP8):
        steps = [np.maximum(np.abs(x).max(axis=1, keepdims=True) / 127, 1e-37) for x in (q, k)]
        q, k = (np.rint(x / step) for x, step in zip((q, k), steps, strict=True))
        scores = (q @ k.T) * steps[0] * steps[1].T
    elif code != FP32:
        scores = to_format(q, *FORMAT_OF_VALUES[code]) @ to_format(k, *FORMAT_OF_VALUES[code]).T
    else:
        scores = q @ k.T
    scores = scores * q.shape[1] ** -0.5 + shut
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    total = p.sum(axis=1, keepdims=True)
    if code == INT8_FP8:
        return to_format(p * 448, *FP8) @ to_format(v / (peak / 448), *FP8) * (peak / 448) / 448 / total
    if code != FP32:
        p, v = to_format(p, *FORMAT_OF_VALUES[code]), to_format(v, *FORMAT_OF_VALUES[code])
    return p @ v / total


def ties(*shape: int) -> Tensor:
    """Numbers halfway between neighbours: of int8 after a step of 1, of fp8 after a peak of 448, of bf16 and fp16."""
    x = torch.tensor([0.5, 1.5, -2.5, 17.0, 19.0, 100.5, -3.5])[torch.randint(0, 7, shape)].double()
    x[..., 0] = 127
    return x


@pytest.mark.parametrize("code", range(len(PRECISIONS)), ids=PRECISIONS)
@pytest.mark.parametrize("inputs", ["normal", "outliers", "peaked", "ties"])
def test_rounding_is_that_of_the_specification(code: int, inputs: str) -> None:
    queries, keys, head_dim = 9, 17, 12
    if inputs == "ties":
        q, k, v = ties(1, 20, queries, head_dim) / 64, ties(1, 20, keys, head_dim) / 64, ties(1, 20, keys, head_dim)
        v[:, :, 0] = 448
        v[:, :, 1:3] = torch.tensor([257.0, 2049.0]).unsqueeze(1) / 16
        mean = torch.zeros(1, 20, head_dim, dtype=torch.float64)
    else:
        q, k, v = draw(inputs, (1, 20, queries, keys, head_dim), torch.float64)
        mean = k.mean(2)
    peak = v.abs().amax(2)
    rank = torch.arange(1, 21, dtype=torch.int32).clamp(max=head_dim).unsqueeze(0)
    mask = oracle.mask("biased", 1, 20, queries, keys)
    output = adaptive_attention(q, k, v, mean, peak, torch.full_like(rank, code), rank, mask, impl="reference")
    for h in range(20):
        operands = (oracle.array(x[0, h]) for x in (q, k, v, mean, peak))
        want = emulate(*operands, code, int(rank[0, h]), oracle.array(mask[0, h]))
        np.testing.assert_allclose(output[0, h].numpy(), want, rtol=oracle.EXACT, atol=oracle.EXACT)


@pytest.mark.parametrize("kind", oracle.MASKS)
def test_queries_in_blocks_give_what_all_at_once_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw("normal", (2, 5, 17, 19, 8), torch.float64)
    mask = oracle.mask(kind, 2, 20, 17, 19)
    args = (q, k, v, k.mean(2), v.abs().amax(2), *every_plan(2, 8), mask, 0.3, True)
    whole = reference.adaptive_attention(*args)
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 2 * 20 * 19 * 5)  # five queries: blocks of 5, 5, 5 and 2
    torch.testing.assert_close(reference.adaptive_attention(*args), whole, rtol=oracle.EXACT, atol=oracle.EXACT)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("mask_shape", [None, (1, 1, 1), (1, 1, 17), (3, 1, 17), (1, 2, 17), (3, 2, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_moments_are_those_of_the_attended_tokens(
    dtype: torch.dtype, mask_shape: tuple[int, ...] | None, center: bool
) -> None:
    x = (torch.randn(3, 2, 17, 5) + 2).to(dtype)
    mask = None
    if mask_shape is not None:
        mask = torch.rand(mask_shape) < 0.6
        mask[0, 0] = mask_shape[0] == 1  # in the largest, a head that attends to nothing
        x = torch.where(mask.expand(3, 2, 17).unsqueeze(-1), x, torch.nan)  # what does not count may be anything
    got = token_moments(x, mask, center)
    for b, h in product(range(3), range(2)):
        y = oracle.array(x[b, h])
        y = y if mask is None else y[mask.expand(3, 2, 17)[b, h].numpy()]
        y = y if len(y) else np.zeros((1, 5))
        about = y - y.mean(axis=0) if center else y
        peaks = (np.abs(about).max(axis=0), (np.abs(about).max(axis=1) ** 2).mean())
        for field, want in zip(got, (y.mean(axis=0), (about**2).mean(axis=0), *peaks), strict=True):
            assert field.dtype == torch.promote_types(dtype, torch.float32)
            np.testing.assert_allclose(field[b, h].numpy(), want, rtol=2e-6, atol=2e-6)  # a few float32 units


def operands(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(1, 4, 3, 5), (1, 2, 4, 5), (1, 2, 4, 5)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "additive": lambda: torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True),
    "additive, of one head and row": lambda: torch.randn(1, 1, 1, 4, dtype=torch.float64, requires_grad=True),
    "empty row": lambda: torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]]).bool()[None, None],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rank", [5, 3])
def test_attention_gradients(mask: str, causal: bool, rank: int) -> None:
    q, k, v = operands()
    mean, peak = k.detach().mean(2).requires_grad_(), v.detach().abs().amax(2)
    plan = torch.full((1, 4), FP32, dtype=torch.int32), torch.full((1, 4), rank, dtype=torch.int32)

    def attend(q: Tensor, k: Tensor, v: Tensor, mean: Tensor, mask: Tensor | None) -> Tensor:
        return attention_op(q, k, v, mean, peak, *plan, mask, 0.5, causal)

    assert torch.autograd.gradcheck(attend, (q, k, v, mean, MASKS[mask]()))


@pytest.mark.parametrize("code", range(1, len(PRECISIONS)), ids=PRECISIONS[1:])
def test_gradient_is_that_of_the_unrounded_formula(code: int) -> None:
    gradients = []
    for chosen in (FP32, code):
        torch.manual_seed(1)
        q, k, v = operands()
        plan = torch.full((1, 4), chosen, dtype=torch.int32), torch.full((1, 4), 4, dtype=torch.int32)
        output = attention_op(q, k, v, k.detach().mean(2), v.detach().abs().amax(2), *plan, None, 0.5, True)
        gradients.append(torch.autograd.grad(output.sum(), (q, k, v)))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("mask", [None, torch.tensor([[[True, False, True, True]]])], ids=["all", "masked"])
@pytest.mark.parametrize("center", [False, True])
def test_moments_gradients(mask: Tensor | None, center: bool) -> None:
    x = operands()[1]
    assert torch.autograd.gradcheck(lambda x: moments_op(x, mask, center), (x,))


@pytest.mark.parametrize("mask", MASKS)
def test_registration_of_attention(mask: str) -> None:
    q, k, v = operands()
    plan = torch.tensor([[0, BF16, INT8, INT8_FP8]], dtype=torch.int32), torch.tensor([[5, 4, 3, 5]], dtype=torch.int32)
    torch.library.opcheck(
        attention_op, (q, k, v, k.detach().mean(2), v.detach().abs().amax(2), *plan, MASKS[mask](), 0.5, True)
    )


@pytest.mark.parametrize("mask", [None, torch.tensor([[[True, False, True, True]]])], ids=["all", "masked"])
def test_registration_of_moments(mask: Tensor | None) -> None:
    torch.library.opcheck(moments_op, (operands(torch.float32)[1], mask, True))


def test_registration_of_the_plan() -> None:
    of_q, of_k, of_v = moments(*(x.detach() for x in operands(torch.float32)), None)
    table = ladder_table(Budget(1e-2), 5)
    args = (*of_q, *of_k[1:], *of_v[1:3], table, 0.5, Budget(1e-2).limit)
    torch.library.opcheck(plan_op, args)
    for got, want in zip(plan_op(*args), plan_within(Budget(1e-2), table, of_q, of_k, of_v, 0.5), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
