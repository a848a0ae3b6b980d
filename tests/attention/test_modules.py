"""The modules as users meet them: what they take, what they give back, and that it is attention by their own weights.

One file, though long: each table of modules and masks below serves most of the tests.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import adaattn
from adaattn.attention.adaptive_precision import AdaptivePrecisionAttention
from adaattn.attention.adaptive_rank import AdaptiveRankAttention
from adaattn.attention.base import AttentionBase, PlannedAttention
from adaattn.attention.dense import DenseAttention
from adaattn.errors import AdaAttnError, ConfigError, DtypeError, ShapeError
from adaattn.export.golden.plan_mode import PlanMode
from tests.support import oracle

AdaptiveAttention = adaattn.AdaptiveAttention
B, H, SQ, SK, WIDTH = 2, 4, 17, 19, 24

Maker = Callable[..., AttentionBase]
EXACT: dict[str, Maker] = {  # set up so that they round nothing and drop nothing
    "dense": DenseAttention,
    "fp32": lambda *a, **kw: AdaptivePrecisionAttention(*a, default_precision="fp32", **kw),
    "precision, tight": lambda *a, **kw: AdaptivePrecisionAttention(*a, tolerance=1e-7, **kw),
    "rank, full": lambda *a, **kw: AdaptiveRankAttention(*a, rank_ratio=1e-9, adaptive_threshold=1.0, **kw),
    "rank, rotated": lambda *a, **kw: AdaptiveRankAttention(*a, rank_ratio=1.0, rank_estimation_method="random", **kw),
    "rank, tight": lambda *a, **kw: AdaptiveRankAttention(*a, tolerance=1e-7, **kw),
    "adaptive, tight": lambda *a, **kw: AdaptiveAttention(*a, tolerance=1e-7, **kw),
}
ROUNDED: dict[str, Maker] = {  # as users have them
    "precision": AdaptivePrecisionAttention,
    "int8": lambda *a, **kw: AdaptivePrecisionAttention(*a, default_precision="int8", **kw),
    "rank": lambda *a, **kw: AdaptiveRankAttention(*a, tolerance=1e-2, **kw),
    "adaptive": AdaptiveAttention,
}
BY_METHOD: dict[str, Maker] = {
    method: lambda *a, method=method, **kw: AdaptiveRankAttention(*a, rank_estimation_method=method, **kw)
    for method in ("entropy", "power", "random")
}
ALL = EXACT | ROUNDED | BY_METHOD


def inputs(dtype: torch.dtype = torch.float32, kdim: int = WIDTH, vdim: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(B, SQ, WIDTH), torch.randn(B, SK, kdim) + 1, torch.randn(B, SK, vdim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def boolean(*shape: int) -> Tensor:
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


def additive(*shape: int) -> Tensor:
    return torch.where(boolean(*shape), torch.randn(shape), -torch.inf)


def four_axes(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dim() == 4:
        return mask
    return mask[:, None, None] if mask.dim() == 2 else mask[:, None]


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "keys": lambda: boolean(B, SK),
    "keys, additive": lambda: additive(B, SK),
    "queries": lambda: boolean(B, SQ, SK),
    "queries, additive": lambda: additive(B, SQ, SK),
    "heads": lambda: boolean(B, H, SQ, SK),
    "heads, additive": lambda: additive(B, H, SQ, SK),
    "one for the batch": lambda: boolean(1, SQ, SK),
    "float64": lambda: additive(B, SQ, SK).double(),
    "finite": lambda: torch.where(boolean(B, SK), 0.0, torch.finfo(torch.float32).min),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "grouped": {"num_kv_heads": 2, "bias": False},
    "one kv head, causal": {"num_kv_heads": 1, "causal": True},
    "widths": {"kdim": 10, "vdim": 7},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", EXACT)
def test_output_and_weights_are_attention_by_the_modules_weights(name: str, options: str) -> None:
    given = OPTIONS[options]
    module = EXACT[name](WIDTH, H, **given).eval()
    for kind, make in MASKS.items():
        q, k, v = inputs(torch.float32, given.get("kdim", WIDTH), given.get("vdim", WIDTH))
        mask = make()
        output, weights = module(q, k, v, mask, need_weights=True)
        want, want_weights = oracle.module(module, q, k, v, four_axes(mask))
        assert output.shape == (B, SQ, WIDTH)
        assert (oracle.error(output, want) <= oracle.SUMS).all(), kind
        assert weights.shape == (B, SQ, SK)
        per_head = module(q, k, v, mask, need_weights="per head")[1]
        assert per_head.shape == (B, H, SQ, SK)
        torch.testing.assert_close(per_head.mean(1), weights)
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, SQ), msg=lambda m, kind=kind: f"{kind}: {m}")
        torch.testing.assert_close(weights.double(), want_weights, rtol=1e-5, atol=1e-6)
        assert module(q, k, v, mask)[1] is None


@pytest.mark.parametrize("name", ROUNDED)
def test_output_is_within_the_tolerance(name: str) -> None:
    module = ROUNDED[name](WIDTH, H, bias=False).eval()
    for kind, make in MASKS.items():
        q, k, v = inputs()
        mask = make()
        got = oracle.error(module(q, k, v, mask)[0], oracle.module(module, q, k, v, four_axes(mask))[0])
        assert (got <= 1e-2).all(), kind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_other_types(name: str, dtype: torch.dtype) -> None:
    module = ALL[name](WIDTH, H, causal=True).eval().to(dtype)
    q, k, v = inputs(dtype)
    for mask in (None, boolean(B, SK), additive(B, SQ, SK).to(dtype)):
        output, weights = module(q, k, v, mask, need_weights=True)
        assert output.dtype == weights.dtype == dtype
        assert output.isfinite().all()
        if name in BY_METHOD:
            continue  # what they may lose, nobody promised
        # Projections round to the type too: each of four counts as an output.
        allowed = 4 * oracle.OUTPUT[dtype] + (1e-2 if name in ROUNDED else oracle.EXACT)
        allowed += oracle.SUMS if name == "rank, rotated" else 0  # the rotation was made in float32
        assert (oracle.error(output, oracle.module(module, q, k, v, four_axes(mask))[0]) <= allowed).all()


@pytest.mark.parametrize("name", ALL)
def test_a_query_that_may_attend_to_nothing_gives_the_bias(name: str) -> None:
    module = ALL[name](WIDTH, H, causal=True).eval()
    q, k, v = inputs()
    empty = torch.zeros(B, SQ, SK, dtype=torch.bool)
    some = boolean(B, SQ, SK)
    some[:, 3] = False
    first = torch.arange(SK).expand(B, SK) > 4  # with causality: queries 0 to 4 have no key left
    for mask, rows in ((empty, slice(None)), (some, 3), (first, slice(0, 5))):
        for given in (mask, torch.where(mask, 0.0, -torch.inf)):
            output, weights = module(q, k, v, given, need_weights=True)
            want = module.out_proj.bias.expand(B, SQ, WIDTH)[:, rows]
            torch.testing.assert_close(output[:, rows], want, rtol=0, atol=0)
            assert weights[:, rows].abs().max() == 0
            assert output.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_a_finite_mask_stays_finite_in_a_narrower_type(name: str) -> None:
    module = ALL[name](WIDTH, H).eval().half()
    lowest = torch.full((B, SQ, SK), torch.finfo(torch.float32).min)
    output, weights = module(*inputs(torch.float16), lowest, need_weights=True)
    assert output.isfinite().all()
    assert (output - module.out_proj.bias).abs().amax(-1).min() > 0  # every query attends
    assert weights.sum(-1).min() > 0.9


@pytest.mark.parametrize("name", ALL)
def test_dropout_acts_in_training_alone(name: str) -> None:
    module = ALL[name](WIDTH, H, dropout=0.5)
    q, k, v = inputs()
    assert not torch.equal(module(q, k, v)[0], module(q, k, v)[0])
    with_weights = module(q, k, v, boolean(B, SK), True)[1]
    torch.testing.assert_close(with_weights.sum(-1), torch.ones(B, SQ))
    module.eval()
    without = copy.deepcopy(module)
    without.dropout = 0.0
    torch.testing.assert_close(module(q, k, v)[0], without(q, k, v)[0], rtol=0, atol=0)
    # A mean over many draws is the output without dropout: nothing else is random, and nothing is scaled wrongly.
    means = torch.stack([module.train()(q, k, v)[0] for _ in range(200)]).mean(0)
    exact = oracle.module(module, q, k, v)[0]
    assert (oracle.error(means, exact) < 0.2).all()


@pytest.mark.parametrize("name", ALL)
def test_weights_are_those_that_made_the_output(name: str) -> None:
    module = ALL[name](WIDTH, 1, bias=False).eval()
    with torch.no_grad():
        module.v_proj.weight.copy_(torch.eye(WIDTH))
        module.out_proj.weight.copy_(torch.eye(WIDTH))
    q, k, _ = inputs()
    # Attention over the rows of an identity reads the probabilities off.
    output, weights = module(q, k, torch.eye(SK, WIDTH).expand(B, SK, WIDTH), need_weights=True)
    torch.testing.assert_close(output[..., :SK], weights, rtol=0, atol=2e-3 if name in ROUNDED else 1e-6)


@pytest.mark.parametrize("ratio", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("method", BY_METHOD)
def test_ranks_follow_their_method(method: str, ratio: float) -> None:
    module = AdaptiveRankAttention(WIDTH, H, ratio, method, 0.8).eval()
    q, k, v = (x[:1] for x in inputs())
    output, _ = module(q, k, v)
    dim = WIDTH // H
    heads = [y.double().unflatten(-1, (H, dim))[0] for y in (module.q_proj(q), module.k_proj(k))]
    centred = heads[1] - heads[1].mean(0)
    energies = heads[0].square().mean(0) * centred.square().mean(0)  # (H, D); a scale changes no share
    share = energies / energies.sum(-1, keepdim=True)
    if method == "random":
        want = torch.full((H,), int(ratio * dim))
    elif method == "entropy":
        want = torch.exp(-(share * share.log()).sum(-1)).ceil().long()
    else:
        want = (share.cumsum(-1) < 0.8).sum(-1) + 1
    want = torch.where(want <= ratio * dim, want, dim)
    statistics = module.get_rank_statistics()
    assert statistics["per_head"] == want.tolist()
    assert statistics["mean_rank"] == pytest.approx(want.double().mean().item())
    assert statistics["low_rank_share"] == (want < dim).double().mean()
    assert (statistics["plans"], statistics["head_dim"]) == (H, dim)
    if method == "random":  # a rotation, the same in every module of this size
        torch.testing.assert_close(module.rotation @ module.rotation.T, torch.eye(dim))
        torch.testing.assert_close(module.rotation, BY_METHOD["random"](WIDTH, H).rotation, rtol=0, atol=0)
    assert output.isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e10, 1e15])
@pytest.mark.parametrize("name", ALL)
def test_inputs_of_any_size(name: str, size: float) -> None:
    module = ALL[name](WIDTH, H).eval()
    output, weights = module(*(x * size for x in inputs()), need_weights=True)
    assert output.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, SQ))
    if size > 1 and isinstance(module, PlannedAttention):  # energies overflow: unknown, so nothing may be dropped
        fixed = name in ("int8", "random")
        assert fixed or module.get_rank_statistics()["low_rank_share"] == 0
        assert fixed or module.get_precision_statistics()["share"]["fp32"] == 1
        assert module.get_rank_statistics()["predicted_error"] == [torch.inf] * H


@pytest.mark.parametrize("masked", [False, -torch.inf, -1e9], ids=str)
@pytest.mark.parametrize("make", [AdaptiveAttention, AdaptivePrecisionAttention, AdaptiveRankAttention])
def test_padding_does_not_sway_the_plan(make: Maker, masked: float) -> None:
    module = make(WIDTH, H, tolerance=1e-2).eval()
    q, k, v = inputs()
    want, _ = module(q, k, v)
    statistics = module.get_rank_statistics(), module.get_precision_statistics()
    module.reset_statistics()
    k, v = (torch.cat([x, torch.full((B, 5, WIDTH), 1e6)], dim=1) for x in (k, v))
    mask = torch.full((B, SK + 5), True if masked is False else 0.0)
    mask[:, SK:] = masked
    got, _ = module(q, k, v, mask)
    assert (oracle.error(got, want.double()) < 1e-4).all()  # summed in another order, a rounding or two may flip
    for before, after in zip(
        statistics, (module.get_rank_statistics(), module.get_precision_statistics()), strict=True
    ):
        assert after.pop("predicted_error") == pytest.approx(before.pop("predicted_error"), rel=1e-5)
        assert after == before


def test_statistics_count_since_the_last_reset() -> None:
    module = AdaptivePrecisionAttention(WIDTH, H, default_precision="bf16").eval()
    assert module.get_precision_statistics()["plans"] == module.get_rank_statistics()["plans"] == 0
    q, k, v = inputs()
    module(q, k, v)
    module(q[:1], k[:1], v[:1])
    statistics = module.get_precision_statistics()
    assert statistics["plans"] == 3 * H
    assert statistics["share"] == {"fp32": 0, "bf16": 1, "fp16": 0, "int8": 0, "int8_fp8": 0}
    assert statistics["per_head"] == [statistics["share"]] * H
    largest = statistics["predicted_error"]
    assert all(1e-3 < error < 1e-2 for error in largest)
    module(q, k * 100, v)
    assert all(
        now > before for now, before in zip(module.get_precision_statistics()["predicted_error"], largest, strict=True)
    )
    module(q, k * 1e-3, v)  # a smaller one changes nothing
    module.half()  # integers stay what they are
    assert module.get_precision_statistics()["plans"] == 7 * H
    assert all(
        now > before for now, before in zip(module.get_rank_statistics()["predicted_error"], largest, strict=True)
    )
    module.reset_statistics()
    assert module.get_precision_statistics()["predicted_error"] == [0.0] * H
    assert not set(module.state_dict()) & {"_statistics", "_statistics.counts", "_ladder"}  # of no run but its own


@pytest.mark.parametrize("make", [AdaptiveAttention, AdaptivePrecisionAttention, AdaptiveRankAttention])
def test_a_tolerance_decides_however_it_is_given(make: Maker) -> None:
    q, k, v = inputs()
    tight = make(WIDTH, H, tolerance=1e-3).eval()
    for module in (make(WIDTH, H, policy="quality").eval(), make(WIDTH, H, policy="speed").eval()):
        module.load_state_dict(tight.state_dict())
        module.set_tolerance(1e-3)
        with PlanMode():  # with the rounding
            torch.testing.assert_close(module(q, k, v)[0], tight(q, k, v)[0], rtol=0, atol=0)
    loose = make(WIDTH, H, policy="speed").eval()
    loose.load_state_dict(tight.state_dict())
    with PlanMode():
        differ = not torch.equal(loose(q, k, v)[0], tight(q, k, v)[0])
    assert differ or make is AdaptiveRankAttention
    for option in ({"tolerance": 0}, {"policy": "fast"}, {"tolerance": 1e-2, "policy": "speed"}, {"safety": -1}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            make(WIDTH, H, **{"tolerance": 1e-2, **option} if "safety" in option else option)


SIGNATURES = [
    (DenseAttention, "embed_dim, num_heads, dropout=0.0, causal=False"),
    (AdaptiveAttention, "embed_dim, num_heads, dropout=0.0, causal=False"),
    (AdaptivePrecisionAttention, "embed_dim, num_heads, default_precision='adaptive'"),
    (
        AdaptiveRankAttention,
        "embed_dim, num_heads, rank_ratio=0.5, rank_estimation_method='entropy', adaptive_threshold=0.95",
    ),
]


@pytest.mark.parametrize(("make", "positional"), SIGNATURES)
def test_signatures_are_those_of_the_issue(make: type[AttentionBase], positional: str) -> None:
    parameters = inspect.signature(make).parameters
    shown = [name if p.default is p.empty else f"{name}={p.default!r}" for name, p in parameters.items()]
    assert ", ".join(shown).startswith(positional)
    assert {"bias", "kdim", "vdim", "num_kv_heads", "dropout", "causal"} <= set(parameters)
    assert make is DenseAttention or {"tolerance", "policy"} <= set(parameters)
    call = list(inspect.signature(make.forward).parameters)
    assert call == ["self", "query", "key", "value", "attention_mask", "need_weights"]


X = torch.zeros(B, SQ, WIDTH)
BAD_CALLS: list[tuple[tuple[Any, ...], type[AdaAttnError], str]] = [
    ((X[0], X, X), ShapeError, r"query has shape \(17, 24\); expected \(batch, tokens, 24\)"),
    ((X, X[..., 1:], X), ShapeError, r"key has shape \(2, 17, 23\); expected \(batch, tokens, 24\)"),
    ((X, X[:1], X), ShapeError, "batch sizes are 2, 1 and 2"),
    ((X, X, X[:, 1:]), ShapeError, "key has 17 tokens and value 16"),
    ((X[:, :0], X, X), ShapeError, "query has 0 tokens"),
    ((X.long(), X, X), DtypeError, "query is torch.int64; expected a floating"),
    ((X, X.half(), X), DtypeError, "key is torch.float16 and the module torch.float32; convert"),
    ((X.double(), X.double(), X.double()), DtypeError, "query is torch.float64 and the module torch.float32"),
    ((X, X, X, torch.ones(B, SQ).long()), DtypeError, r"attention_mask is torch.int64; give bool.*mask.bool\(\)"),
    ((X, X, X, torch.ones(SQ) > 0), ShapeError, r"attention_mask has shape \(17,\); expected \(batch, keys\)"),
    ((X, X, X, torch.ones(B, SQ + 1) > 0), ShapeError, r"attention_mask has shape \(2, 18\)"),
    ((X, X, X, torch.ones(SQ, SQ) > 0), ShapeError, r"attention_mask has shape \(17, 17\)"),
    ((X, X, X, torch.ones(B, 3, SQ, SQ) > 0), ShapeError, r"\(batch, heads, queries, keys\) = \(2, 4, 17, 17\)"),
]


@pytest.mark.parametrize(("args", "kind", "message"), BAD_CALLS, ids=[message for _, _, message in BAD_CALLS])
@pytest.mark.parametrize("name", ["dense", "adaptive", "random"])
def test_bad_calls_say_what_was_expected(
    name: str, args: tuple[Any, ...], kind: type[AdaAttnError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        ALL[name](WIDTH, H)(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "args", "options", "message"),
    [
        (DenseAttention, (25, 4), {}, "embed_dim 25 is not a positive multiple of num_heads 4"),
        (DenseAttention, (0, 4), {}, "embed_dim is 0; give a width"),
        (DenseAttention, (24, 0), {}, "num_heads is 0; give a number"),
        (DenseAttention, (24, 4), {"dropout": 1.0}, "dropout is 1.0"),
        (DenseAttention, (24, 4), {"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        (DenseAttention, (24, 4), {"kdim": 0}, "kdim is 0"),
        (AdaptiveAttention, (24, 4), {"precisions": ("fp8",)}, "fp8"),
        (AdaptivePrecisionAttention, (24, 4, "fp8"), {}, "default_precision is 'fp8'; choose one of adaptive, fp32"),
        (AdaptivePrecisionAttention, (24, 4, "int8"), {"tolerance": 1e-2}, "leaves a tolerance nothing to decide"),
        (AdaptiveRankAttention, (24, 4, 0.0), {}, "rank_ratio is 0.0"),
        (AdaptiveRankAttention, (24, 4, 1.5), {}, "rank_ratio is 1.5"),
        (AdaptiveRankAttention, (24, 4, 0.5, "svd"), {}, "rank_estimation_method is 'svd'; choose one of entropy"),
        (AdaptiveRankAttention, (24, 4, 0.5, "power", 0.0), {}, "adaptive_threshold is 0.0"),
        (adaattn.Encoder, (24, 4, ("sparse",)), {}, "layers are .*sparse.*dense, adaptive_precision"),
        (adaattn.Encoder, (24, 4, ()), {}, "choose at least one"),
    ],
)
def test_bad_options_say_what_was_expected(
    make: type[nn.Module], args: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(*args, **options)


def test_a_fixed_precision_takes_no_tolerance_later() -> None:
    with pytest.raises(ConfigError, match="nothing to decide"):
        AdaptivePrecisionAttention(WIDTH, H, "int8").set_tolerance(1e-2)


@pytest.mark.parametrize("name", ALL)
def test_state_dict_carries_all_that_the_output_depends_on(name: str) -> None:
    first, second = ALL[name](WIDTH, H).eval(), ALL[name](WIDTH, H).eval()
    q, k, v = inputs()
    assert not torch.equal(first(q, k, v)[0], second(q, k, v)[0])
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(q, k, v)[0], first(q, k, v)[0], rtol=0, atol=0)


def test_need_weights_has_three_values() -> None:
    with pytest.raises(ConfigError, match="need_weights is 'heads'; give True, False or"):
        DenseAttention(WIDTH, H)(*inputs(), need_weights="heads")


@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    module = EXACT[name](WIDTH, H, num_kv_heads=2, causal=True).double()
    q, k, v = (x.requires_grad_() for x in inputs(torch.float64))
    mask = torch.where(boolean(B, SQ, SK), torch.randn(B, SQ, SK, dtype=torch.float64), -torch.inf).requires_grad_()
    to = torch.randn(B, SQ, WIDTH, dtype=torch.float64)
    wanted = [q, k, v, mask, *module.parameters()]
    got = torch.autograd.grad((module(q, k, v, mask)[0] * to).sum(), wanted)

    heads = [
        linear(x).unflatten(-1, (-1, WIDTH // H)).transpose(1, 2)
        for linear, x in ((module.q_proj, q), (module.k_proj, k), (module.v_proj, v))
    ]
    keys, values = (x.repeat_interleave(2, dim=1) for x in heads[1:])
    scores = heads[0] @ keys.mT * (WIDTH // H) ** -0.5 + mask.unsqueeze(1)
    scores = scores.masked_fill(~torch.ones(SQ, SK).tril().bool(), -torch.inf)
    plain = module.out_proj((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
    want = torch.autograd.grad((plain * to).sum(), wanted)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # float32 rotation; the others are far closer


@pytest.mark.parametrize("name", ROUNDED | BY_METHOD | {"dropout": None})
def test_training_lowers_the_loss(name: str) -> None:
    module = AdaptiveAttention(WIDTH, H, dropout=0.1) if name == "dropout" else ALL[name](WIDTH, H)
    q, k, v = inputs()
    target = torch.randn(B, SQ, WIDTH)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (module(q, k, v)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for n, p in module.named_parameters() if n != "k_proj.bias"
    )


@pytest.mark.parametrize(
    "name", ["dense", "int8", pytest.param("rank", marks=pytest.mark.thorough), "entropy", "random", "adaptive"]
)
def test_compiles_whole(name: str) -> None:
    torch.compiler.reset()  # modules share code, and what other tests compiled of it counts against a limit
    module = ALL[name](WIDTH, H, causal=True, num_kv_heads=2).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch, queries in ((B, SQ), (B + 1, 5)):
        args = [torch.randn(batch, queries, WIDTH), *torch.randn(2, batch, SK, WIDTH), boolean(batch, SK), True]
        for x in args[:4]:
            torch._dynamo.mark_dynamic(x, (0, 1))  # an error if these are then taken for constants
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args), module(*args), rtol=0, atol=0)
    if isinstance(module, PlannedAttention):
        assert module.get_precision_statistics()["plans"] == 2 * (2 * B + 1) * H


def test_a_compiled_module_trains() -> None:
    torch.compiler.reset()
    module = AdaptiveAttention(WIDTH, H)
    gradients = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(run(*inputs())[0].square().sum(), list(module.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["dense", "int8", "rank", "power", "random", "adaptive"])
def test_exports_for_any_batch_and_length(name: str) -> None:
    module = ALL[name](WIDTH, H, causal=name == "dense").eval()
    batch, queries, keys = Dim("B", max=64), Dim("S", max=512), Dim("T", max=512)
    shapes = ({0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch, 1: keys}, {0: batch, 1: queries, 2: keys})
    args = (*inputs(), boolean(B, SQ, SK))
    program = torch.export.export(module, args, dynamic_shapes=shapes)
    called = {str(node.target) for node in program.graph.nodes if "adaattn" in str(node.target)}
    assert ("adaattn.adaptive_attention.default" in called) == (name != "dense")
    run = program.module()
    for b, s, t in ((1, 1, 1), (3, 1, 7), (1, 129, 17), (2, 127, 127)):
        given = (torch.randn(b, s, WIDTH), torch.randn(b, t, WIDTH), torch.randn(b, t, WIDTH), boolean(b, s, t))
        torch.testing.assert_close(run(*given)[0], module(*given)[0], rtol=1e-6, atol=1e-6)


def test_the_encoder_is_compiled_and_exported_whole() -> None:
    torch.compiler.reset()
    model = adaattn.Encoder(WIDTH, H, ("dense", "adaptive_precision", "adaptive_rank", "adaptive"), causal=True).eval()
    x, mask = torch.randn(B, SQ, WIDTH), boolean(B, SQ)
    want = model(x, mask)
    assert want.shape == x.shape
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x, mask), want, rtol=0, atol=0)
    dims = {0: Dim("B", max=64), 1: Dim("S", max=512)}
    run = torch.export.export(model, (x, mask), dynamic_shapes=(dims, dims)).module()
    for b, s in ((1, 1), (3, 129)):
        x, mask = torch.randn(b, s, WIDTH), boolean(b, s)
        torch.testing.assert_close(run(x, mask), model(x, mask), rtol=1e-5, atol=1e-5)
