"""The fused kernels against float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import adaattn
from adaattn import ops
from adaattn.errors import ConfigError
from adaattn.masks import attended_keys
from adaattn.ops.plan.api import plan_within
from adaattn.planning.budget import Budget
from adaattn.planning.error_model import Moments, plan_of
from adaattn.planning.ladder import ladder_table, rank_classes
from adaattn.planning.precision import FP32, INT8, PRECISIONS
from tests.support import oracle
from tests.support.triton_interpreter import DEVICE, GPU

# Numbers that leave their range become inf, as on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
ON_A_GPU = pytest.mark.skipif(not GPU, reason="torch sees no GPU on this machine")
PAIRS = len(PRECISIONS) * 4
"""Heads of a case: one for each precision and class of rank."""

# batch, kv heads, queries, keys, head_dim; type; mask; causal; distribution
CASES = [
    ((1, 20, 1, 1, 16), torch.float32, "none", False, "normal"),
    ((2, 4, 1, 33, 64), torch.float16, "padding", False, "outliers"),
    ((1, 4, 17, 129, 20), torch.float32, "biased", True, "biased keys"),
    ((1, 2, 33, 70, 64), torch.float16, "none", True, "normal"),
    ((1, 1, 18, 40, 80), torch.bfloat16, "per query", False, "loud tokens"),
    ((1, 4, 40, 40, 48), torch.bfloat16, "empty rows", True, "normal"),
    ((1, 20, 17, 35, 96), torch.float32, "additive", False, "decaying"),
    ((1, 4, 20, 65, 128), torch.float16, "biased", False, "loud channel"),
    ((1, 4, 17, 33, 256), torch.bfloat16, "padding", True, "normal"),
    ((1, 4, 33, 33, 32), torch.float32, "none", False, "tiny"),
    ((1, 4, 33, 33, 32), torch.float32, "none", False, "huge"),
    ((1, 4, 33, 33, 32), torch.float32, "padding", False, "huge values"),
    ((1, 4, 33, 33, 32), torch.float16, "none", True, "constant"),
    ((1, 4, 33, 33, 40), torch.float32, "empty rows", False, "zero"),
    ((1, 4, 33, 100, 40), torch.float32, "none", False, "peaked"),
]


def every_plan(batch: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Precision and rank (batch, PAIRS): each pair once."""
    pairs = torch.tensor(list(product(range(len(PRECISIONS)), rank_classes(head_dim))), dtype=torch.int32)
    return pairs[:, 0].repeat(batch, 1), pairs[:, 1].repeat(batch, 1)


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(DEVICE) for x in tensors]


def draw(distribution: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    batch, kv_heads, queries, keys, head_dim = shape
    drawn = oracle.DISTRIBUTIONS[distribution]((batch, PAIRS, queries, head_dim), (batch, kv_heads, keys, head_dim))
    largest = 3e4 if dtype == torch.float16 else torch.inf
    return [(x / max(1.0, float(x.abs().max()) / largest)).to(dtype) for x in drawn]


def run(
    q: Tensor, k: Tensor, v: Tensor, precision: Tensor, rank: Tensor, mask: Tensor | None, causal: bool, impl: str
) -> tuple[Tensor, Moments, Moments, Moments]:
    """Output and moments of an implementation, on the CPU."""
    keys = attended_keys(mask, k.shape[1])
    q, k, v, precision, rank, mask, keys = on_device(q, k, v, precision, rank, mask, keys)
    of_q = ops.token_moments(q, impl=impl)
    of_k = ops.token_moments(k, keys, True, impl=impl)
    of_v = ops.token_moments(v, keys, impl=impl)
    operands = (q, k, v, of_k.mean, of_v.channel_peak, precision, rank, mask)
    output = ops.adaptive_attention(*operands, is_causal=causal, impl=impl)
    moments = (Moments(*(x.cpu() for x in moments)) for moments in (of_q, of_k, of_v))
    return output.cpu(), *moments


@pytest.mark.parametrize(("shape", "dtype", "kind", "causal", "distribution"), CASES, ids=str)
def test_error_stays_within_what_the_model_predicts(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, causal: bool, distribution: str
) -> None:
    batch, _, queries, keys, head_dim = shape
    q, k, v = draw(distribution, shape, dtype)
    mask = oracle.mask(kind, batch, PAIRS, queries, keys)
    precision, rank = every_plan(batch, head_dim)
    output, *moments = run(q, k, v, precision, rank, mask, causal, "triton")
    assert output.dtype == dtype
    assert output.isfinite().all()
    want = oracle.attention(q, k, v, mask, causal)
    reference_output = run(q, k, v, precision, rank, mask, causal, "reference")[0]
    measured, reached = oracle.error(output, want), oracle.error(reference_output, want)
    predicted = plan_of(precision, rank, *moments, head_dim**-0.5).predicted_error.double()
    known = torch.where(predicted <= oracle.FIRST_ORDER, predicted, torch.inf)
    exact = (precision == FP32) & (rank == head_dim)
    rounding = oracle.SUMS + oracle.OUTPUT[dtype] + oracle.EXACT
    # Few queries are too few to average over: the reference, held to the model elsewhere, may have the same bad luck.
    allowed = torch.where(exact, 0, torch.maximum(oracle.MODEL * known, 1.5 * reached)) + rounding
    over = [
        f"{measured[at]:.1e} of {allowed[at]:.1e}: {PRECISIONS[precision[at]]} at rank {rank[at]}"
        for at in map(tuple, (measured > allowed).nonzero().tolist())
    ]
    assert not over, "\n".join(over)


@pytest.mark.parametrize("queries", [9, 40], ids=["not packed", "packed"])
@pytest.mark.parametrize("mask", ["none", "empty rows"])
def test_rounding_is_the_reference_s(mask: str, queries: int) -> None:
    """With one block of keys the running maximum is the row's own, and every rounding is the same."""
    q, k, v = draw("outliers", (1, 4, queries, 29, 48), torch.float32)
    precision, rank = every_plan(1, 48)
    given = oracle.mask(mask, 1, PAIRS, queries, 29)
    ours = run(q, k, v, precision, rank, given, False, "triton")[0]
    want = run(q, k, v, precision, rank, given, False, "reference")[0]
    # A score that differs by a unit of float32 may round a probability the other way: rarely.
    close = torch.isclose(ours, want, rtol=1e-4, atol=1e-5)
    assert close.double().mean() > 0.99
    torch.testing.assert_close(ours, want, rtol=0.1, atol=0.02)


MASKS = {
    "one for all": lambda: torch.rand(1, 1, 1, 40) < 0.5,
    "of queries": lambda: torch.rand(1, 1, 19, 1) < 0.5,
    "of heads, float64": lambda: torch.randn(1, 4, 1, 40, dtype=torch.float64),
    "transposed": lambda: torch.randn(2, 1, 40, 19).mT,
    "lowest finite": lambda: torch.where(torch.rand(2, 1, 19, 40) < 0.5, 0.0, torch.finfo(torch.float32).min),
    "lowest finite everywhere": lambda: torch.full((1, 1, 1, 40), torch.finfo(torch.float32).min),
    "half": lambda: torch.where(torch.rand(2, 1, 19, 40) < 0.5, 0, -torch.inf).half(),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_form(name: str) -> None:
    q, k, v = torch.randn(2, 4, 19, 32), torch.randn(2, 2, 40, 32), torch.randn(2, 2, 40, 32)
    mask = MASKS[name]()
    fp32, rank = torch.full((2, 4), FP32, dtype=torch.int32), torch.full((2, 4), 32, dtype=torch.int32)
    operands = on_device(q, k, v, k.mean(2), v.abs().amax(2), fp32, rank, mask)
    ours = ops.adaptive_attention(*operands, impl="triton").cpu()
    # The float64 yardstick would not absorb scores into a huge mask, as float32 does.
    want = ops.adaptive_attention(*operands, impl="reference").cpu()
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("scale", [0.0, -0.2, 1.5])
def test_any_scale(scale: float) -> None:
    q, k, v = draw("normal", (1, 20, 19, 35, 16), torch.float32)
    mask = oracle.mask("per query", 1, PAIRS, 19, 35)
    precision, rank = every_plan(1, 16)
    operands = on_device(q, k, v, k.mean(2), v.abs().amax(2), precision, rank, mask)
    ours = ops.adaptive_attention(*operands, scale=scale, impl="triton").cpu()
    want = ops.adaptive_attention(*operands, scale=scale, impl="reference").cpu()
    assert (oracle.error(ours, want.double()) < 0.05).all()
    full_fp32 = (precision == FP32) & (rank == 16)
    assert (oracle.error(ours, want.double())[full_fp32] < 1e-6).all()


def test_ranks_beyond_the_head_dim_leave_no_head_unwritten() -> None:
    q, k, v = draw("normal", (1, 20, 5, 9, 16), torch.float32)
    precision, rank = every_plan(1, 16)
    beyond = torch.where(rank == 16, 99, torch.where(rank == 4, 0, rank))
    operands = on_device(q, k, v, k.mean(2), v.abs().amax(2), precision, beyond)
    ours = ops.adaptive_attention(*operands, impl="triton").cpu()
    want = ops.adaptive_attention(*operands, impl="reference").cpu()
    assert (oracle.error(ours, want.double()) < 0.05).all()


LAYOUTS = {
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dimensions before tokens": lambda x: x.mT.contiguous().mT,
    "every other dimension": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "one batch for all": lambda x: x[:1].expand(x.shape),
    "not aligned": lambda x: torch.cat([x, x[..., :1]], -1)[..., 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_as_they_come(layout: str) -> None:
    shapes = ((2, 5, 19, 16), (2, 1, 35, 16), (2, 1, 35, 16))
    q, k, v = (LAYOUTS[layout](torch.randn(shape).half()) for shape in shapes)
    precision = torch.arange(5, dtype=torch.int32).repeat(2, 1)
    rank = torch.tensor([[16, 5, 12, 16, 8], [4, 16, 16, 7, 16]], dtype=torch.int32)
    ours, *of_ours = run(q, k, v, precision, rank, None, True, "triton")
    plain = (x.contiguous() for x in (q, k, v))
    want, *of_want = run(*plain, precision, rank, None, True, "triton")
    torch.testing.assert_close(ours, want, rtol=0, atol=0)
    torch.testing.assert_close(of_ours, of_want, rtol=0, atol=0)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    ("dtype", "mask_shape"),
    [
        *((torch.float32, shape) for shape in (None, (1, 1, 1), (3, 1, 700), (1, 2, 700), (3, 2, 700))),
        *((dtype, shape) for dtype in (torch.float16, torch.bfloat16) for shape in (None, (3, 2, 700))),
    ],
    ids=str,
)
def test_moments_are_those_of_the_attended_tokens(
    dtype: torch.dtype, mask_shape: tuple[int, ...] | None, center: bool
) -> None:
    x = (torch.randn(3, 2, 700, 20) + 2).to(dtype)  # three chunks of a head; of the first 200 tokens, one
    mask = None
    if mask_shape is not None:
        mask = torch.rand(mask_shape) < 0.6
        mask[0, 0] = mask_shape[0] == 1  # in the largest, a head that attends to nothing
        x = torch.where(mask.expand(3, 2, 700).unsqueeze(-1), x, torch.nan)
    for tokens in (700, 200):
        some, keys = x[:, :, :tokens], None if mask is None else mask[..., :tokens]
        got = ops.token_moments(*on_device(some, keys), center, impl="triton")
        want = ops.token_moments(some.double(), keys, center)  # the reference, held to numpy elsewhere
        for ours, exact in zip(got, want, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.cpu().double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("distribution", oracle.DISTRIBUTIONS)
def test_plans_are_those_of_the_budget(distribution: str) -> None:
    q, k, v = (x.float() for x in oracle.DISTRIBUTIONS[distribution]((1, 6, 33, 20), (1, 2, 40, 20)))
    moments = [ops.token_moments(q), ops.token_moments(k, center=True), ops.token_moments(v)]
    on = [Moments(*on_device(*x)) for x in moments]
    for tolerance, precisions in product((1e-4, 1e-2, 0.1), (PRECISIONS, ("int8_fp8", "bf16"))):
        budget = Budget(tolerance, precisions=precisions)
        table = ladder_table(budget, 20)
        ours = plan_within(budget, table.to(DEVICE), *on, 20**-0.5, "triton")
        want = plan_within(budget, table, *moments, 20**-0.5)
        same = (ours.precision.cpu() == want.precision) & (ours.rank.cpu() == want.rank)
        errors = torch.stack([x.predicted_error.cpu() for x in (ours, want)])
        torch.testing.assert_close(errors[0][same], errors[1][same], rtol=1e-5, atol=0)
        # Only a step on the edge of the limit may be taken by one of the two.
        assert (same | ((errors.amax(0) / budget.limit - 1).abs() < 1e-5)).all()


def test_one_call_from_statistics_to_output() -> None:
    q, k, v = draw("normal", (1, 5, 40, 40, 64), torch.float32)
    on = on_device(q, k, v)
    output = adaattn.adaptive_attention(*on, enable_gqa=True, is_causal=True, tolerance=1e-2, impl="triton").cpu()
    assert (oracle.error(output, oracle.attention(q, k, v, None, True)) <= 1e-2).all()


def test_gradients_are_the_reference_s() -> None:
    def gradients(impl: str) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = [torch.randn(1, h, 17, 16, device=DEVICE, requires_grad=True) for h in (4, 2, 2)]
        output = adaattn.adaptive_attention(*leaves, enable_gqa=True, tolerance=1e-3, impl=impl)
        return list(torch.autograd.grad(output.square().sum(), leaves))

    for ours, want in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-2, atol=1e-2)  # of outputs that differ by the plan's rounding


def test_an_explicit_implementation_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    x = torch.zeros(1, 1, 4, 16, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ConfigError, match=r"not torch\.float64; impl='auto' computes without it"):
        adaattn.adaptive_attention(x, x, x, tolerance=1e-2, impl="triton")
    wide = torch.zeros(1, 1, 4, 320, device=DEVICE)
    with pytest.raises(ConfigError, match="head_dim up to 256, not 320"):
        ops.token_moments(wide, impl="triton")
    with pytest.raises(ConfigError, match="impl is 'fast'; choose one of auto, reference, triton"):
        ops.token_moments(x, impl="fast")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match="it runs on CUDA devices"):
        ops.token_moments(torch.zeros(1, 1, 4, 16), impl="triton")
    for unfit in (x, wide):  # auto never complains
        assert adaattn.adaptive_attention(unfit, unfit, unfit, tolerance=1e-2).isfinite().all()


@ON_A_GPU
def test_a_cuda_graph_replays() -> None:
    q, k, v = (torch.randn(2, 8, 300, 64, device=DEVICE, dtype=torch.float16) for _ in range(3))

    def call() -> Tensor:
        return adaattn.adaptive_attention(q, k, v, tolerance=1e-2)

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for x in (q, k, v):
        x.normal_()
    q[:, :4] *= 30  # another plan on replay
    graph.replay()
    torch.testing.assert_close(output, call(), rtol=0, atol=0)


@ON_A_GPU
def test_torch_compile_takes_the_kernels() -> None:
    q, k, v = (torch.randn(1, 4, 200, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    compiled = torch.compile(lambda: adaattn.adaptive_attention(q, k, v, tolerance=1e-2), fullgraph=True)
    torch.testing.assert_close(compiled(), adaattn.adaptive_attention(q, k, v, tolerance=1e-2), rtol=0, atol=0)


@ON_A_GPU
def test_nothing_waits_for_the_gpu() -> None:
    q, k, v = (torch.randn(1, 4, 300, 64, device=DEVICE, dtype=torch.float16) for _ in range(3))
    adaattn.adaptive_attention(q, k, v, tolerance=1e-2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adaattn.adaptive_attention(q, k, v, tolerance=1e-2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@ON_A_GPU
def test_tensors_of_more_than_2_to_the_31_elements() -> None:
    tokens, heads, dim = (1 << 17) + 1, 129, 128
    x = torch.randn(1, heads, tokens, dim, device=DEVICE, dtype=torch.float16)  # the last head begins behind 2³¹
    last = x[:, -1:]
    precision = torch.full((1, heads), INT8, dtype=torch.int32, device=DEVICE)
    mean, peak = torch.zeros(1, heads, dim, device=DEVICE), torch.full((1, heads, dim), 8.0, device=DEVICE)
    rank = torch.full_like(precision, dim)
    query = x[:, :, :200]
    output = ops.adaptive_attention(query, x, x, mean, peak, precision, rank)
    alone = ops.adaptive_attention(
        query[:, -1:], last, last, mean[:, -1:], peak[:, -1:], precision[:, -1:], rank[:, -1:]
    )
    torch.testing.assert_close(output[:, -1:], alone, rtol=0, atol=0)
    for ours, want in zip(ops.token_moments(x), ops.token_moments(last), strict=True):
        torch.testing.assert_close(ours[:, -1:], want, rtol=1e-5, atol=1e-6)  # other chunks, another order
