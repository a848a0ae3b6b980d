"""`adaptive_sdpa` and `adapt`: any call of `scaled_dot_product_attention` within a tolerance, and nothing outside."""

from __future__ import annotations

import copy
import inspect
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adaattn
from adaattn.errors import ConfigError
from adaattn.integrations.sdpa import AdaptiveSDPA

TIGHT, LOOSE = 1e-6, 3e-2
ADAPTIVE = torch.ops.adaattn.adaptive_attention.default


class SelfAttention(nn.Module):
    """As people write it: one projection, heads, SDPA."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = 0.1 if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return y


class Stack(nn.Module):
    """Two blocks, one of which may be recomputed in the backward pass."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), SelfAttention()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        return x


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "handwritten": Stack,
    "MultiheadAttention": Multihead,
    "TransformerEncoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 2),
}
X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Each test ends with torch as it was."""
    assert torch.backends.mha.get_fastpath_enabled()
    yield
    assert torch.backends.mha.get_fastpath_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.fixture
def _eval() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    torch._dynamo.reset()
    return model


def rounded(tolerance: float = LOOSE) -> AdaptiveSDPA:
    """Return a block whose effect shows on a CPU too."""
    return adaattn.adaptive_sdpa(tolerance, impl="reference")


def check(got: Tensor, want: Tensor, tolerance: float = LOOSE) -> None:
    """Whether an output was computed within the tolerance, and not as before."""
    error = float((got - want).norm() / want.norm())
    assert 1e-6 < error < tolerance


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]] = {
    "4-D": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 1, 5, 7)),
    "grouped": ((2, 6, 5, 8), (2, 2, 7, 8), (5, 7)),
    "3-D": ((6, 5, 8), (6, 7, 8), (6, 5, 7)),
    "3-D grouped": ((6, 5, 8), (3, 7, 8), (1, 7)),
    "2-D": ((5, 8), (7, 8), (5, 7)),
    "5-D": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (3, 1, 5, 7)),
    "5-D mask": ((2, 3, 4, 5, 8), (2, 3, 2, 7, 8), (2, 1, 4, 1, 7)),
    "6-D": ((2, 1, 3, 2, 5, 8), (2, 1, 3, 2, 7, 8), (1, 7)),
    "one token": ((1, 1, 1, 8), (1, 1, 1, 8), None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "boolean", "added", "causal", "causal and boolean", "scale"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_form_of_a_call_is_answered_as_torch_does(name: str, kind: str, dtype: torch.dtype) -> None:
    of_query, of_key, of_mask = SHAPES[name]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in (of_query, of_key, of_key))
    options: dict[str, Any] = {"enable_gqa": len(of_query) > 2 and of_query[-3] != of_key[-3]}
    if kind in ("boolean", "added", "causal and boolean") and of_mask is not None:
        mask = torch.randn(of_mask, generator=generator)
        options["attn_mask"] = mask.to(dtype) if kind == "added" else mask < 0.8
    options |= {"causal": {"is_causal": True}, "causal and boolean": {"is_causal": True}, "scale": {"scale": 0.3}}.get(
        kind, {}
    )
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}
    if kind == "causal and boolean" and "attn_mask" in wide:  # not all of torch's kernels take both
        wide |= {"attn_mask": wide["attn_mask"] & torch.ones(5, 7, dtype=torch.bool).tril(), "is_causal": False}
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **wide)
    with adaattn.adaptive_sdpa(TIGHT, impl="reference") as used:
        got = F.scaled_dot_product_attention(q, k, v, **options)
    assert (used.calls, used.left) == (1, {})
    assert (got.shape, got.dtype) == (want.shape, dtype)
    bound = max(TIGHT, torch.finfo(dtype).eps)
    torch.testing.assert_close(got.double(), want, rtol=4 * bound, atol=4 * bound)


LEFT: dict[str, tuple[Callable[..., Any], str]] = {
    "dropout": (lambda q: (q, q, q, None, 0.5), "dropout"),
    "nested": (lambda q: (torch.nested.as_nested_tensor(list(q), layout=torch.jagged).transpose(1, 2),) * 3, "nested"),
    "wide": (lambda q: (q.repeat(1, 1, 1, 40),) * 3, "a head size above 256"),
    "values": (lambda q: (q, q, q[..., :3]), "a head size of the values"),
    "empty": (lambda q: (q[:, :, :0], q, q), "no tokens"),
    "batch": (lambda q: (q, q[:1].expand(2, -1, -1, -1)[:1], q[:1]), "batch sizes that broadcast"),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_calls_go_to_torch_and_are_counted(name: str) -> None:
    make, reason = LEFT[name]
    operands = make(torch.randn(2, 4, 5, 8))
    with rounded() as used:
        torch.manual_seed(0)
        got = F.scaled_dot_product_attention(*operands)
    torch.manual_seed(0)
    want = F.scaled_dot_product_attention(*operands)
    if not got.is_nested:
        assert torch.equal(got, want)
    assert used.calls == 0
    assert [(found.startswith(reason), count) for found, count in used.left.items()] == [(True, 1)]


def test_errors_are_torchs_own() -> None:
    q, mask = torch.randn(2, 4, 5, 8), torch.ones(5, 5, dtype=torch.bool)
    for given in ({"attn_mask": mask.int()}, {"attn_mask": mask[None, None, None]}, {"key": q[..., :3]}):
        call = {"query": q, "key": q, "value": q, **given}
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            F.scaled_dot_product_attention(**call)
        with rounded(), pytest.raises(theirs.type) as ours:
            F.scaled_dot_product_attention(**call)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("_eval")
def test_a_block_answers_every_attention_of_a_model(name: str) -> None:
    model = made(name)
    want = model(X)
    with rounded() as used:
        check(model(X), want)
    assert used.calls == (1 if name == "MultiheadAttention" else 2)
    assert used.left == {}
    assert torch.equal(model(X), want)
    for path, plans in used.plans.items():
        assert path in dict(model.named_modules())
        assert plans["plans"] == 8
    assert f"{used.calls} calls answered within 0.03" in str(used)
    used.reset()
    assert (used.calls, used.plans) == (0, {})


@pytest.mark.parametrize(
    "name",
    [
        "TransformerEncoder",
        *(pytest.param(x, marks=pytest.mark.thorough) for x in ("handwritten", "MultiheadAttention")),
    ],
)
@pytest.mark.usefixtures("_eval")
def test_compiled_models_are_answered_in_the_block_and_not_outside(name: str) -> None:
    model = made(name)
    want = model(X)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with rounded():
        check(compiled(X), want)
    torch.testing.assert_close(compiled(X), want)

    def within(x: Tensor) -> Tensor:
        with rounded():
            y: Tensor = model(x)
            return y

    check(torch.compile(within, fullgraph=True, backend="aot_eager")(X), want)
    with adaattn.adapt(model, LOOSE, impl="reference"):
        torch._dynamo.reset()
        check(torch.compile(model, fullgraph=True, backend="aot_eager")(X), want)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_exported_programs_hold_the_ops(name: str, strict: bool) -> None:
    model = made(name)
    with rounded():
        program = torch.export.export(model, (X,), strict=strict)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(ADAPTIVE) == (1 if name == "MultiheadAttention" else 2)
    with adaattn.adapt(model, LOOSE):
        program = torch.export.export(model, (X,))
    assert ADAPTIVE in [node.target for node in program.graph.nodes]


@pytest.mark.usefixtures("_eval")
def test_autocast_narrows_what_it_would_for_torch() -> None:
    q = torch.randn(1, 4, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = F.scaled_dot_product_attention(q, q, q)
        with adaattn.adaptive_sdpa(TIGHT) as used:
            got = F.scaled_dot_product_attention(q, q, q)
    assert (used.calls, got.dtype) == (1, want.dtype)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("how", ["block", "adapted"])
def test_gradients_through_recomputed_activations(how: str) -> None:
    torch.manual_seed(0)
    model = Stack(recompute=True).eval()
    plain = copy.deepcopy(model)
    plain.recompute = False
    with rounded():
        plain(X).square().sum().backward()
    if how == "block":
        with rounded() as used:
            model(X).square().sum().backward()
    else:
        adapted = adaattn.adapt(model, LOOSE, impl="reference")
        used = adapted.used
        model(X).square().sum().backward()
        adapted.remove()
    assert used.calls == 4  # each a second time in the backward pass
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_dropout_in_training_goes_to_torch() -> None:
    model = made("handwritten").train()
    with rounded() as used:
        model(X)
    assert used.left == {"dropout": 2}


@pytest.mark.usefixtures("_eval")
def test_a_block_is_of_its_thread() -> None:
    model = made("TransformerEncoder")
    want, inside, outside = model(X), threading.Event(), threading.Event()
    found: dict[str, Tensor] = {}

    def other() -> None:
        with torch.no_grad():
            inside.wait(30)
            found["outside"] = model(X)
            with rounded(1e-3) as used:
                found["own"] = model(X)
            found["calls"] = torch.tensor(used.calls)
        outside.set()

    thread = threading.Thread(target=other)
    thread.start()
    with rounded() as used:
        inside.set()
        outside.wait(30)
        check(model(X), want)
    thread.join()
    torch.testing.assert_close(found["outside"], want)
    check(found["own"], want, 1e-3)
    assert (used.calls, int(found["calls"])) == (2, 2)


@pytest.mark.usefixtures("_eval")
def test_threads_share_the_counts_of_one_block() -> None:
    model = made("handwritten")
    adapted = adaattn.adapt(model, LOOSE, impl="reference")
    want = model(X)
    got: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            got.extend(model(X) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 20
    assert all(torch.equal(x, want) for x in got)
    assert adapted.used.calls == 42
    assert {plans["plans"] for plans in adapted.used.plans.values()} == {21 * 8}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_errors_close_the_block(error: type[BaseException]) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = SelfAttention()

        def forward(self, x: Tensor) -> Tensor:
            self.inner(x)
            raise error

    with pytest.raises(error), rounded():
        Failing()(X)
    model = Failing()
    adaattn.adapt(model, LOOSE)
    with pytest.raises(error):
        model(X)


@pytest.mark.usefixtures("_eval")
def test_blocks_nest_and_repeat_and_decorate() -> None:
    model = made("handwritten")
    want = model(X)
    loose, tight = rounded(), adaattn.adaptive_sdpa(TIGHT, impl="reference")
    with loose:
        with tight, tight:
            torch.testing.assert_close(model(X), want)
        check(model(X), want)
    with loose:
        model(X)
    assert (loose.calls, tight.calls) == (4, 2)

    @loose
    def run(x: Tensor, *, twice: bool) -> Tensor:
        """Run it."""
        y: Tensor = model(model(x)) if twice else model(x)
        return y

    check(run(X, twice=False), want)
    assert run.__doc__ == "Run it."
    assert loose.calls == 6


@pytest.mark.usefixtures("_eval")
def test_an_adapted_model_can_be_copied_saved_and_restored() -> None:
    model = made("handwritten")
    want, forward = model(X), inspect.signature(model.forward)
    adapted = adaattn.adapt(model, LOOSE, impl="reference")
    assert inspect.signature(model.forward) == forward
    got = model(X)
    check(got, want)
    assert torch.equal(copy.deepcopy(model)(X), got)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), got)
    assert adapted.used.calls == 2  # copies count for themselves
    assert set(model.state_dict()) == set(made("handwritten").state_dict())
    check(model.blocks[0](X), got, 10)  # type: ignore[operator, index]  # a part of it attends likewise
    assert adapted.used.calls == 3
    with pytest.raises(ConfigError, match="Stack is adapted already; call remove"):
        adaattn.adapt(model, 1e-3)
    adapted.remove()
    adapted.remove()
    assert torch.equal(model(X), want)
    assert "forward" not in vars(model)


@pytest.mark.usefixtures("_eval")
def test_remove_leaves_a_forward_of_the_users_own() -> None:
    model = made("handwritten")
    calls: list[int] = []
    original = model.forward

    def own(x: Tensor) -> Tensor:
        calls.append(1)
        y: Tensor = original(x)
        return y

    model.forward = own  # type: ignore[method-assign]
    with adaattn.adapt(model, LOOSE):
        model(X)
    model(X)
    assert calls == [1, 1]
    assert model.forward is own


@pytest.mark.usefixtures("_eval")
def test_lines_and_sizes_of_one_module_are_told_apart() -> None:
    class Both(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            x = F.scaled_dot_product_attention(q, q, q)
            for heads in (1, 2):
                x = x + F.scaled_dot_product_attention(q, q, q)[:, :heads].sum(1, keepdim=True)
                F.scaled_dot_product_attention(q[:, :heads], q[:, :heads], q[:, :heads])
            return x

    with rounded() as used:
        nn.Sequential(Both())(torch.randn(1, 4, 5, 8))
        q = torch.randn(1, 1, 3, 8)
        F.scaled_dot_product_attention(q, q, q)
    names = list(used.plans)
    assert len(names) == 5
    assert all(name.startswith("0:") for name in names[:4])
    assert [name.partition(" ")[2] for name in names[2:4]] == ["(1 heads of 8)", "(2 heads of 8)"]
    assert names[4] == "test_lines_and_sizes_of_one_module_are_told_apart"
    assert [plans["calls"] for plans in used.plans.values()][:2] == [1, 2]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func_go_to_torch() -> None:
    q = torch.randn(2, 1, 2, 5, 8)
    with rounded() as used:
        torch.func.vmap(lambda x: F.scaled_dot_product_attention(x, x, x))(q)
        torch.func.grad(lambda x: F.scaled_dot_product_attention(x, x, x).sum())(q)
    assert used.left == {"a transform of torch.func": 2}


@pytest.mark.parametrize(
    ("change", "word"), [({"tolerance": 0}, "tolerance"), ({"impl": "fast"}, "impl"), ({"safety": -1}, "safety")]
)
def test_bad_options_are_refused(change: dict[str, Any], word: str) -> None:
    options = {"tolerance": 1e-2, **change}
    with pytest.raises(ConfigError, match=word):
        adaattn.adaptive_sdpa(**options)
    with pytest.raises(ConfigError, match=word):
        adaattn.adapt(SelfAttention(), **options)
    with pytest.raises(ConfigError, match="model is"):
        adaattn.adapt(F.relu, 1e-2)  # type: ignore[arg-type]


def test_a_model_of_transformers_needs_no_registration() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    model = transformers.LlamaModel(config).eval()
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        want = model(ids).last_hidden_state
        with rounded() as used:
            check(model(ids).last_hidden_state, want)
    assert list(used.plans) == ["layers.0.self_attn", "layers.1.self_attn"]
