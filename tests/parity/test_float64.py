"""The float64 run of the harness against formulas of its own: numpy's, in more digits than float64 has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaattn.errors import ConfigError
from adaattn.export.capture.module import capture_module
from adaattn.export.golden import cases
from adaattn.export.golden.eager import EagerReference, disagreements
from adaattn.export.golden.plan_mode import PlanMode, run_eager
from adaattn.export.parity import criterion
from adaattn.input_spec import InputSpec

Wide = np.longdouble


def formula(
    q: Any, k: Any, v: Any, mask: Any = None, causal: bool = False, scale: float | None = None
) -> np.ndarray[Any, Any]:
    """Attention as its definition has it, a row at a time."""
    q, k, v = (x.astype(Wide) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = np.zeros((*q.shape[:-1], v.shape[-1]), Wide)
    if mask is not None:
        mask = np.broadcast_to(mask, (*q.shape[:-1], k.shape[2]))
    for b, h, i in np.ndindex(q.shape[:-1]):
        row = k[b, h // groups] @ q[b, h, i] * Wide(scale)
        if causal:
            row[i + 1 :] = -np.inf
        if mask is not None:
            row = np.where(mask[b, h, i], row, -np.inf) if mask.dtype == bool else row + mask[b, h, i].astype(Wide)
        if row.max() > -np.inf:
            weights = np.exp(row - row.max())
            out[b, h, i] = weights @ v[b, h // groups] / weights.sum()
    return out


def bias(t: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 2, t, k, generator=torch.Generator().manual_seed(3)).to(dtype)


def hidden(t: int, k: int) -> Tensor:
    mask = torch.rand(2, 1, t, k, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[0, 0, 0] = False
    return mask


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, few keys": {"is_causal": True, "keys": 5},
    "causal, many keys": {"is_causal": True, "keys": 30},
    "scale": {"scale": 0.3},
    "grouped": {"kv_heads": 1},
    "grouped and causal": {"kv_heads": 1, "is_causal": True},
    "float32 mask made in forward": {"mask": lambda t, k: torch.full((t, k), -torch.inf).triu(1)},
    "float32 bias": {"mask": bias},
    "float16 bias": {"mask": lambda t, k: bias(t, k, torch.float16)},
    "float64 bias": {"mask": lambda t, k: bias(t, k, torch.float64)},
    "boolean, a row hidden": {"mask": hidden},
    "additive, a row hidden": {"mask": lambda t, k: torch.where(hidden(t, k), 0.0, -torch.inf)},
    "over keys": {"mask": lambda t, k: torch.arange(k).view(1, 1, 1, k) % 3 > 0},
    "two axes": {"mask": lambda t, k: torch.arange(k).view(1, k) < k - 2},
    "large bias": {"mask": lambda t, k: 1e4 * bias(t, k)},
    "huge scores": {"size": 1e3},
    "tiny scores": {"size": 1e-4},
    "wider values": {"width": 24},
}


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_its_formula(variant: str, inference: bool) -> None:
    options = dict(VARIANTS[variant])
    tokens, keys = 17, options.pop("keys", 17)
    mask, size = options.pop("mask", None), options.pop("size", 1.0)
    heads, width = options.pop("kv_heads", 2), options.pop("width", 8)
    torch.manual_seed(2)
    q = size * torch.randn(2, 2, tokens, 8, dtype=torch.float64)
    k, v = torch.randn(2, heads, keys, 8, dtype=torch.float64), torch.randn(2, heads, keys, width, dtype=torch.float64)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.inference_mode(inference):
            made = mask(tokens, keys) if callable(mask) else mask
            return F.scaled_dot_product_attention(q, k, v, attn_mask=made, enable_gqa=heads == 1, **options)

    made = None if mask is None else mask(tokens, keys).numpy()
    if "in forward" not in variant and mask is not None:
        mask = mask(tokens, keys)
    (got,) = run_eager(eager, {"q": q, "k": k, "v": v}, PlanMode(double=True))
    want = formula(q.numpy(), k.numpy(), v.numpy(), made, options.get("is_causal", False), options.get("scale"))
    assert got.dtype == torch.float64
    error = float(np.abs(got.numpy() - want).max())
    assert error < 1e-13 * max(1.0, size), error


def test_long_sequences_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    q = torch.randn(1, 2, 17, 8, dtype=torch.float64)
    inputs = {"q": q, "mask": hidden(17, 17)[:1]}

    def eager(q: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    (whole,) = run_eager(eager, inputs, PlanMode(double=True))
    monkeypatch.setattr("adaattn.export.golden.plan_mode.SCORES_AT_ONCE", 5 * 2 * 17)
    (blocks,) = run_eager(eager, inputs, PlanMode(double=True))
    assert torch.allclose(blocks, whole, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8), (2, 0, 5, 8)], ids=str)
def test_attention_of_nothing_is_empty(shape: tuple[int, ...]) -> None:
    (got,) = run_eager(
        lambda x: F.scaled_dot_product_attention(x, x, x), {"x": torch.zeros(shape)}, PlanMode(double=True)
    )
    assert got.shape == shape


def encoder_layer() -> nn.Module:
    torch.manual_seed(1)
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()


class Kept(nn.Module):
    """A model that keeps float32 tensors outside its parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.kept = torch.randn(16, generator=torch.Generator().manual_seed(1))
        self.several = [torch.randn(16, 16, generator=torch.Generator().manual_seed(2))]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ self.several[0] + self.kept


def scratch(x: Tensor) -> Tensor:
    from_numpy = torch.from_numpy(np.zeros(x.shape, np.float32))
    from_numpy[..., :3] += x[..., :3].exp()
    from_numpy[..., 3:].copy_(x[..., 3:].sin())
    return from_numpy * 1


# Each as it is written, and a model of the same that float64 cannot misread.
PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "casts": (lambda x: (x.float() * 3.1).half().bfloat16().to(torch.float32), lambda x: x * 3.1),
    "a type by name": (lambda x: x.type(torch.float32).exp().type_as(x), lambda x: x.exp()),
    "a constant": (lambda x: x * torch.tensor([0.1, 0.7]).repeat(8), lambda x: x * x.new_tensor([0.1, 0.7]).repeat(8)),
    "integers divided": (
        lambda x: x * (torch.arange(16) / 7) + torch.arange(16).float().log1p(),
        lambda x: x * (torch.arange(16).double() / 7) + torch.arange(16).double().log1p(),
    ),
    "softmax in a type": (
        lambda x: x.softmax(-1, dtype=torch.float32).to(x.dtype),
        lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    ),
    "autocast": (lambda x: _autocast(x), lambda x: x @ x.mT),
    "complex": (
        lambda x: torch.view_as_real(
            torch.view_as_complex(x.float().unflatten(-1, (8, 2))) * torch.polar(torch.ones(8), torch.arange(8) / 3)
        ).flatten(-2),
        lambda x: torch.stack(
            [
                x[..., ::2] * (torch.arange(8).double() / 3).cos()
                - x[..., 1::2] * (torch.arange(8).double() / 3).sin(),
                x[..., ::2] * (torch.arange(8).double() / 3).sin()
                + x[..., 1::2] * (torch.arange(8).double() / 3).cos(),
            ],
            -1,
        ).flatten(-2),
    ),
    "written in place": (scratch, lambda x: torch.cat([x[..., :3].exp(), x[..., 3:].sin()], -1)),
    "out": (lambda x: torch.mul(x, 3.1, out=torch.empty(x.shape, dtype=torch.float32)), lambda x: x * 3.1),
}


def _autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x.mT


@pytest.mark.parametrize("name", PAIRS)
def test_every_operator_computes_in_float64(name: str) -> None:
    model, exact = PAIRS[name]
    x = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    (got,) = run_eager(model, {"x": x}, PlanMode(double=True))
    want = exact(x)
    assert got.dtype == torch.float64
    assert float((got - want).norm() / want.norm()) < 1e-15 * 10


@pytest.mark.parametrize("make", [encoder_layer, Kept, lambda: nn.GRU(16, 16, batch_first=True)])
def test_modules_compute_in_float64(make: Callable[[], nn.Module]) -> None:
    """Moving x by 1e-9 moves the result likewise, which in float32 it could not."""
    module = make().eval()
    double = make().eval().double()
    double.load_state_dict({name: x.double() for name, x in module.state_dict().items()})
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    step = 1e-9 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    key = "input" if isinstance(module, nn.GRU) else "src" if hasattr(module, "self_attn") else "x"
    up, there, down = (run_eager(double, {key: x + a * step}, PlanMode(double=True))[0] for a in (1, 0, -1))
    assert there.dtype == torch.float64
    assert float((up + down - 2 * there).norm() / (up - down).norm()) < 1e-5


def test_limits_of_the_models_type_are_those_of_its_float64() -> None:
    x = 1e-5 * torch.randn(2, 16, generator=torch.Generator().manual_seed(7))
    norm = nn.RMSNorm(16).requires_grad_(False)  # it adds its type's eps
    (got,) = run_eager(norm.double(), {"x": x.double()}, PlanMode(double=True, dtype=torch.float32))
    want = nn.RMSNorm(16).requires_grad_(False)(x)
    assert float((got - want).norm() / want.norm()) < 1e-6

    def least(x: Tensor) -> Tensor:
        return torch.full((2,), torch.finfo(x.dtype).min)

    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        (got,) = run_eager(least, {"x": x.double()}, PlanMode(double=True, dtype=dtype))
        assert got.tolist() == [torch.finfo(dtype).min] * 2


def test_the_default_type_comes_back_after_an_error() -> None:
    def fails(x: Tensor) -> Tensor:
        assert torch.get_default_dtype() == torch.float64
        raise ValueError("of the user")

    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ValueError, match="of the user"):
        run_eager(fails, {"x": torch.ones(1)}, PlanMode(double=True))
    assert torch.get_default_dtype() == torch.float32
    assert torch.backends.mha.get_fastpath_enabled() == fast


class Applied(nn.Module):
    def __init__(self, then: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.then, self.calls = nn.Linear(16, 16), then, 0

    def forward(self, x: Tensor) -> Any:
        return self.then(self, x)


def reference(then: Callable[..., Any]) -> tuple[EagerReference, cases.Case]:
    captured = capture_module(Applied(then).eval(), [InputSpec("x", (2, 12, 16))], {})
    return EagerReference(captured), cases.cases(captured)[0]


def counts(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.linear(x) * m.calls


RANDOM: dict[str, Callable[..., Any]] = {
    "dropout": lambda m, x: F.dropout(m.linear(x), 0.01),
    "rand": lambda m, x: m.linear(x) * (torch.rand_like(x) > 0.02),
    "noise": lambda m, x: m.linear(x) + 1e-3 * torch.randn(x.shape),
    "integers": lambda m, x: (m.linear(x), torch.randint(0, 9, (2, 3))),
    "a permutation": lambda m, x: m.linear(x)[:, torch.randperm(12)],
    "infinities": lambda m, x: m.linear(x).masked_fill(torch.rand_like(x) > 0.9, -torch.inf),
    "state": counts,
}


@pytest.mark.parametrize("kind", RANDOM)
def test_a_model_that_answers_in_two_ways_is_refused(kind: str) -> None:
    made, case = reference(RANDOM[kind])
    with pytest.raises(ConfigError, match=r"the model is random: two runs on the golden inputs 'odd' differ in output"):
        made.expect(case)


@pytest.mark.parametrize(
    "then",
    [lambda m, x: m.linear(x) / 0 * 0, lambda m, x: F.dropout(m.linear(x), 0.5, m.training), lambda m, x: m.linear(x)],
    ids=["NaN", "dropout off", "plain"],
)
def test_a_model_that_answers_in_one_way_is_not(then: Callable[..., Any]) -> None:
    made, case = reference(then)
    made.expect(case)


def test_eager_far_from_float64_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    made, case = reference(lambda m, x: m.linear(x).softmax(-1))
    want = made.golden(made.expect(case), [])
    assert disagreements([want]) == []
    monkeypatch.setattr(made, "double", lambda x: Applied(lambda m, x: m.linear(x) + 1).double()(x))
    (line,) = disagreements([made.golden(made.expect(case), [])])
    assert line.startswith("output (odd): eager PyTorch differs from float64 by ")


def hides(fill: float | None) -> Callable[..., Any]:
    """Attention by hand, whose first sequence attends to nothing: `fill` is added to its scores."""

    def then(m: Any, x: Tensor) -> Tensor:
        scores = x @ x.mT / 4
        least = torch.finfo(scores.dtype).min if fill is None else fill
        shown = torch.tensor([0.0, 1.0]).to(scores.dtype)[:, None, None]
        return m.linear((scores + (1 - shown) * least).softmax(-1) @ x)

    return then


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [("float16", None), ("float16", -1e4), ("bfloat16", -1e9), ("float32", -1e9), ("float32", -1e12)],
)
def test_what_a_rounding_decides_is_not_compared_and_the_rest_has_a_sharp_limit(dtype: str, fill: float | None) -> None:
    model = Applied(hides(fill)).eval().to(getattr(torch, dtype))
    captured = capture_module(model, [InputSpec("x", (2, 12, 16))], {})
    made = EagerReference(captured)
    output = made.golden(made.expect(cases.cases(captured)[0]), []).outputs["output"]
    assert output.excluded is not None
    assert output.excluded[0].all()
    assert not output.excluded[1].any()
    assert output.limit < 10 * criterion.RULES[dtype].floor


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_deep_model_hangs_on_no_rounding(dtype: str) -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(6)]
    captured = capture_module(
        nn.Sequential(*layers).eval().to(getattr(torch, dtype)), [InputSpec("input", (2, 12, 16))], {}
    )
    made = EagerReference(captured)
    output = made.golden(made.expect(cases.cases(captured)[0]), []).outputs["output"]
    assert output.excluded is None


def test_float64_has_the_attributes_of_an_onnx_file_and_no_more() -> None:
    def limit(module: nn.Module) -> float:
        name = "src" if isinstance(module, nn.TransformerEncoderLayer) else "input"
        captured = capture_module(module.double().eval(), [InputSpec(name, (2, 12, 16))], {})
        made = EagerReference(captured)
        return made.golden(made.expect(cases.cases(captured)[0]), []).outputs["output"].limit

    assert limit(nn.Linear(16, 16)) < 3e-14
    assert 1e-13 < limit(nn.LayerNorm(16)) < 1e-11
    assert 1e-9 < limit(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)) < 1e-6
