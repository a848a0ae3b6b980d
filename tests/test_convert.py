"""Models of `torch.nn.MultiheadAttention` after conversion: the same weights, the same call, the same results.

Torch itself in float64 is the yardstick here: what is promised is its call, and its own float32 rounding. One file,
though long: each table of masks, shapes and options serves most of the tests.
"""

from __future__ import annotations

import copy
import inspect
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import adaattn
from adaattn.attention.base import AttentionBase, PlannedAttention
from adaattn.attention.torch_multihead import MultiheadAttention
from adaattn.conversion import Conversion, convert, replacement
from adaattn.errors import ConfigError, DtypeError, ShapeError
from adaattn.planning.budget import Budget

WIDTH, HEADS = 24, 4
ROUNDING = 5e-6  # of float32 through projections of this width, relative; torch's own is measured beside it
EXACT = (Conversion("adaptive_precision", precisions=("fp32",)), Conversion("dense"))
SHAPES = ((2, 5, 7), (1, 1, 1), (3, 17, 1), (1, 1, 9))  # batch, queries, keys


def torch_attention(**options: Any) -> nn.MultiheadAttention:
    attention = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    for name, parameter in attention.named_parameters():
        if "bias" in name:  # torch begins with zeros, which would hide a lost bias
            nn.init.normal_(parameter)
    return attention


def masked(*shape: int) -> Tensor:
    """Torch's boolean mask that leaves every query its first key."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def additive(*shape: int) -> Tensor:
    return torch.where(masked(*shape), -torch.inf, torch.randn(shape))


def masks(kind: str, batch: int, queries: int, keys: int) -> dict[str, Tensor]:
    return {
        "none": lambda: {},
        "padding": lambda: {"key_padding_mask": masked(batch, keys)},
        "padding, added": lambda: {"key_padding_mask": additive(batch, keys)},
        "scores": lambda: {"attn_mask": masked(queries, keys)},
        "heads": lambda: {"attn_mask": masked(batch * HEADS, queries, keys)},
        "heads, added": lambda: {"attn_mask": additive(batch * HEADS, queries, keys)},
        "both": lambda: {"key_padding_mask": masked(batch, keys), "attn_mask": masked(queries, keys)},
        "both, added": lambda: {"key_padding_mask": additive(batch, keys), "attn_mask": additive(queries, keys)},
        "mixed": lambda: {
            "key_padding_mask": masked(batch, keys),
            "attn_mask": torch.randn(batch * HEADS, queries, keys),
        },
    }[kind]()


MASKS = ("none", "padding", "padding, added", "scores", "heads", "heads, added", "both", "both, added", "mixed")


def doubled(given: dict[str, Any]) -> dict[str, Any]:
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in given.items()}


def relative(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want).norm() / want.norm()).detach())


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("config", EXACT, ids=lambda c: c.kind)
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"kdim": 10, "vdim": 7}, {"bias": False, "batch_first": True}],
    ids=str,
)
def test_results_are_torchs_to_rounding(options: dict[str, Any], config: Conversion) -> None:
    attention = torch_attention(**options)
    ours, exact = replacement(attention, config), copy.deepcopy(attention).double()
    for (batch, queries, keys), kind, average in product(SHAPES, MASKS, (True, False)):
        q = torch.randn(batch, queries, WIDTH)
        k, v = (torch.randn(batch, keys, options.get(name, WIDTH)) for name in ("kdim", "vdim"))
        if not options.get("batch_first"):
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        given: dict[str, Any] = {"query": q, "key": k, "value": v, **masks(kind, batch, queries, keys)}
        given["average_attn_weights"] = average
        got, want, theirs = ours(**given), exact(**doubled(given)), attention(**given)
        assert got[0].shape == want[0].shape
        assert got[1].shape == want[1].shape
        for mine, torchs, right in zip(got, theirs, want, strict=True):
            assert relative(mine, right) <= max(2 * relative(torchs, right), ROUNDING), kind
        assert ours(**given, need_weights=False)[1] is None


@pytest.mark.parametrize("batch_first", [False, True])
def test_inputs_without_a_batch(batch_first: bool) -> None:
    attention = torch_attention(batch_first=batch_first)
    ours, exact = replacement(attention, EXACT[0]), copy.deepcopy(attention).double()
    for queries, keys in ((5, 7), (1, 1)):
        q, k, v = torch.randn(queries, WIDTH), *torch.randn(2, keys, WIDTH)
        for given in (
            {},
            {"key_padding_mask": masked(keys), "attn_mask": masked(queries, keys)},
            {"attn_mask": additive(HEADS, queries, keys), "average_attn_weights": False},
        ):
            for got, want in zip(
                ours(q, k, v, **given), exact(*(x.double() for x in (q, k, v)), **doubled(given)), strict=True
            ):
                assert got.shape == want.shape
                assert relative(got, want) <= ROUNDING


def test_is_causal_is_a_hint() -> None:
    attention = torch_attention(batch_first=True)
    ours, exact = replacement(attention, EXACT[0]), copy.deepcopy(attention).double()
    x = torch.randn(2, 9, WIDTH)
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    for mask in (causal, causal.isinf()):
        for more in ({"need_weights": False}, {}, {"key_padding_mask": torch.zeros(2, 9).to(mask.dtype)}):
            given = {"attn_mask": mask, "is_causal": True, **more}
            y = x.double()
            assert relative(ours(x, x, x, **given)[0], exact(y, y, y, **doubled(given))[0]) <= ROUNDING
    with pytest.raises(ConfigError, match="give attn_mask too"):
        ours(x, x, x, is_causal=True)


def test_a_query_that_may_attend_to_nothing_gives_the_bias_where_torch_gives_nan() -> None:
    attention = torch_attention(batch_first=True, bias=True)
    x = torch.randn(2, 5, WIDTH)
    padding = torch.tensor([[False] * 5, [True] * 5])
    assert attention(x, x, x, padding)[0][1].isnan().all()
    output, weights = replacement(attention)(x, x, x, padding)
    torch.testing.assert_close(output[1], attention.out_proj.bias.expand(5, WIDTH), rtol=0, atol=0)
    assert weights[1].abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 10}], ids=str)
@pytest.mark.parametrize("kind", ["dense", "adaptive_precision", "adaptive_rank", "adaptive"])
def test_weights_are_carried_over_bit_by_bit(kind: str, options: dict[str, Any]) -> None:
    attention = torch_attention(dropout=0.25, batch_first=True, **options).to(torch.bfloat16).train()
    attention.out_proj.weight.requires_grad_(False)
    before = torch.random.get_rng_state()
    layer = replacement(attention, Conversion(kind))
    ours = layer.attention
    assert torch.equal(torch.random.get_rng_state(), before)
    if attention.in_proj_weight is None:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    else:
        weights = attention.in_proj_weight.chunk(3)
    for i, projection in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
        assert torch.equal(projection.weight, weights[i])
        assert projection.weight.requires_grad
        assert (projection.bias is None) == (attention.in_proj_bias is None)
        assert projection.bias is None or torch.equal(projection.bias, attention.in_proj_bias.chunk(3)[i])
    assert torch.equal(ours.out_proj.weight, attention.out_proj.weight)
    assert not ours.out_proj.weight.requires_grad
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer.training
    assert ours.training
    assert ours.dropout == 0.25
    assert layer.batch_first
    with torch.no_grad():
        attention.out_proj.weight.zero_()
    assert ours.out_proj.weight.abs().max() > 0  # a copy


def test_devices_are_kept() -> None:
    layer = replacement(nn.MultiheadAttention(WIDTH, HEADS, device="meta"))
    assert {x.device.type for x in (*layer.parameters(), *layer.buffers())} == {"meta"}


def transformer(norm_first: bool = False) -> nn.Transformer:
    """Return a model with masks and norms around each attention; its encoder takes torch's fused kernels."""
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 32, batch_first=True, norm_first=norm_first).eval()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p)
    return model


def count_calls(model: nn.Module) -> list[str]:
    """Record the names of modules as they are called; wrapped by hand, as hooks turn torch's fused kernels off."""
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, AttentionBase):

            def attend(*args: Any, name: str = name, whole: Any = module._attend) -> Any:
                calls.append(name)
                return whole(*args)

            module._attend = attend  # type: ignore[method-assign]
    return calls


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_fused_kernel_of_torchs_passes_our_modules_by() -> None:
    model = transformer()
    exact = copy.deepcopy(model).double()
    assert model.encoder.use_nested_tensor
    records = convert(model, EXACT[0])
    assert [r.reason for r in records] == [None] * 6
    assert not any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    calls = count_calls(model)
    source, target = torch.randn(3, 9, WIDTH), torch.randn(3, 5, WIDTH)
    padding = torch.arange(9) >= torch.tensor([[9], [4], [1]])
    given: dict[str, Any] = {
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5).isinf(),
        "tgt_is_causal": True,
    }
    for context in (torch.no_grad(), torch.inference_mode()):
        calls.clear()
        with context:
            got = model(source, target, **given)
            want = exact(source.double(), target.double(), **given)
        assert calls == [f"{r.name}.attention" for r in records]
        assert relative(got, want) <= ROUNDING


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_returns_at_padded_tokens_what_it_does_in_training() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True), 2).eval()
    exact = copy.deepcopy(model).double()
    convert(model, EXACT[0])
    x, padding = torch.randn(3, 9, WIDTH), torch.arange(9) >= torch.tensor([[9], [4], [1]])
    with torch.no_grad():
        got, want = model(x, None, padding), exact(x.double(), None, padding)
        training = exact.train()(x.double(), None, padding)
    assert want[padding].abs().max() == 0  # torch's fused kernels, which the conversion turns off
    assert relative(got[~padding], want[~padding]) <= ROUNDING
    assert relative(got, training) <= ROUNDING


def test_a_converted_layer_may_be_built_upon() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True).eval()
    convert(layer, EXACT[0])
    with pytest.warns(UserWarning, match="use_nested_tensor is False"):  # its constructor reads our attributes
        model = nn.TransformerEncoder(layer, 2).eval()
    calls = count_calls(model)
    with torch.no_grad():
        model(torch.randn(2, 5, WIDTH), src_key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))
    assert len(calls) == 2


@pytest.mark.parametrize("norm_first", [False, True])
def test_models_in_training_agree_and_learn(norm_first: bool) -> None:
    model = transformer(norm_first).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    exact = copy.deepcopy(model).double()
    convert(model, EXACT[0])
    source, target = torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)
    got, want = model(source, target), exact(source.double(), target.double())
    assert relative(got, want) <= ROUNDING
    got.square().sum().backward()
    want.square().sum().backward()
    in_proj = exact.decoder.layers[1].multihead_attn.in_proj_weight.grad
    ours = model.decoder.layers[1].multihead_attn.attention
    assert relative(torch.cat([p.weight.grad for p in (ours.q_proj, ours.k_proj, ours.v_proj)]), in_proj) <= 1e-4


def test_state_dicts_go_round() -> None:
    first, second = transformer(), transformer()
    for model in (first, second):
        convert(model, EXACT[0])
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 5, WIDTH)
    assert torch.equal(first(x, x), second(x, x))


class Own(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Defaults(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS, batch_first=True)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch_attention(), torch_attention()
        self.second.in_proj_weight = self.first.in_proj_weight


def without_bias() -> nn.MultiheadAttention:
    attention = torch_attention()
    attention.out_proj.bias = None
    return attention


def hooked() -> nn.MultiheadAttention:
    attention = torch_attention()
    attention.register_forward_hook(lambda *_: None)
    return attention


def pruned() -> nn.MultiheadAttention:
    attention = torch_attention()
    attention.num_heads = 3
    return attention


REFUSED = {
    "Own overrides forward": lambda: Own(WIDTH, HEADS),
    "add_bias_kv": lambda: torch_attention(add_bias_kv=True),
    "add_zero_attn": lambda: torch_attention(add_zero_attn=True),
    "only some of its projections": without_bias,
    "hooks": hooked,
    "24 is not 3 heads of 6": pruned,
    "dropout is 1": lambda: torch_attention(dropout=1.0),
    "parametrized": lambda: nn.utils.parametrizations.spectral_norm(torch_attention(), "in_proj_weight"),
    "quantised": lambda: _quantised(torch_attention()),
    "MultiheadAttention overrides forward": lambda: torch.ao.nn.quantizable.MultiheadAttention(WIDTH, HEADS),
}


def _quantised(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    class Packed(nn.Parameter):
        pass

    attention.in_proj_weight = Packed(attention.in_proj_weight.detach())
    return attention


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_done_is_left_alone_and_said(reason: str) -> None:
    attention = REFUSED[reason]()
    model = nn.ModuleDict({"odd": attention, "plain": Defaults()})
    records = convert(model)
    assert [r.name for r in records] == ["odd", "plain"]
    assert reason in records[0].reason
    assert records[1].reason is None
    assert model["odd"] is attention
    assert isinstance(model["plain"], MultiheadAttention)
    with pytest.raises(ConfigError, match="cannot be replaced: "):
        replacement(attention)


class Handwritten(nn.Module):
    """As most models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v)


class CausalSelfAttn(Handwritten):
    """Known by its name; its code is elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Fused(Handwritten):
    """Known by the function that it calls."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class Block(nn.Module):
    """Has attention within, and is none."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.inner = nn.LayerNorm(WIDTH), attention


@pytest.mark.parametrize("kind", [Handwritten, CausalSelfAttn, Fused], ids=lambda kind: kind.__name__)
def test_attention_that_is_not_torchs_is_left_and_said(kind: type[nn.Module]) -> None:
    model = nn.ModuleList([Block(kind()), Block(Defaults()), Block(kind())])
    given = copy.deepcopy(model.state_dict())
    words = rf"{kind.__name__} \(2\); call adaattn.adaptive_attention in its forward"
    with pytest.warns(UserWarning, match=words) as seen:
        records = convert(model)
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)
    assert [r.name for r in records] == ["0.inner", "1.inner", "2.inner"]
    assert [r.reason is None for r in records] == [False, True, False]
    assert records[0].reason == f"{kind.__name__} is not a torch.nn.MultiheadAttention"
    assert torch.equal(model[0].inner.qkv.weight, given["0.inner.qkv.weight"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), "found no attention in Sequential"),
        (
            lambda: nn.Sequential(torch_attention(add_zero_attn=True)),
            "nothing in Sequential: 0: add_zero_attn",
        ),
        (Handwritten, r"not a torch.nn.MultiheadAttention: Handwritten \(1\)"),
    ],
)
def test_a_conversion_that_changes_nothing_warns(make: Any, words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        assert all(record.reason for record in convert(make()))


def test_a_model_that_is_converted_already_needs_no_warning() -> None:
    model = nn.Sequential(Block(Defaults()))
    assert len(convert(model)) == 1
    assert convert(model) == []


def test_the_call_is_torchs() -> None:
    """In torch's order, with its names and defaults, also where it is called by position."""
    ours, theirs = (inspect.signature(kind.forward).parameters for kind in (MultiheadAttention, nn.MultiheadAttention))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    attention = torch_attention(batch_first=True)
    x, padding, mask = torch.randn(2, 5, WIDTH), torch.zeros(2, 5).bool(), torch.ones(5, 5).triu(1).bool()
    given = (x, x, x, padding, False, mask, True, True)
    assert relative(replacement(attention, EXACT[0])(*given)[0], attention(*given)[0].double()) <= ROUNDING


def test_tied_weights_stay_tied_and_shared_modules_shared() -> None:
    with pytest.warns(UserWarning, match="replaced nothing in Tied: first: it shares weights with second"):
        records = convert(Tied())
    assert ["shares weights with second" in records[0].reason, "with first" in records[1].reason] == [True, True]
    one = torch_attention()
    model = nn.ModuleList([nn.ModuleDict({"a": one, "b": one}), nn.Sequential(one)])
    assert [r.name for r in convert(model)] == ["0.a"]
    assert model[0]["a"] is model[0]["b"] is model[1][0]
    assert isinstance(model[1][0], MultiheadAttention)
    assert convert(model) == []


def test_the_model_itself_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"use model = adaattn\.conversion\.replacement"):
        convert(torch_attention())


def test_the_config_reaches_the_modules() -> None:
    model = transformer()
    convert(model, Conversion(policy="speed", safety=2.0, precisions=("fp16", "fp32")))
    for module in model.modules():
        if isinstance(module, AttentionBase):
            assert isinstance(module, adaattn.AdaptiveAttention)
            assert module.budget == Budget(5e-2, 2.0, ("fp16", "fp32"))
    rank = replacement(torch_attention(), Conversion("adaptive_rank")).attention
    assert isinstance(rank, PlannedAttention)
    assert rank.budget is not None  # never a rule that promises nothing
    assert rank.budget.tolerance == 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sparse"}, "kind is 'sparse'; choose one of dense"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"tolerance": 1e-2, "policy": "speed"}, "both tolerance"),
        ({"safety": -1.0}, "safety is -1.0"),
        ({"precisions": ("fp8",)}, "fp8"),
        ({"kind": "adaptive_rank", "precisions": ("fp16",)}, "leave precisions out"),
        ({"kind": "dense", "policy": "speed"}, "leave tolerance"),
        ({"kind": "dense", "safety": 2.0}, "leave tolerance"),
    ],
)
def test_bad_options_say_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Conversion(**options)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)},
            ShapeError,
            r"\(3, 5\); expected \(batch, keys\) = \(2, 5\)",
        ),
        (
            {"attn_mask": torch.zeros(2, 5, 5, dtype=torch.bool)},
            ShapeError,
            r"\(5, 5\) or \(batch·heads, queries, keys\) = \(8, 5, 5\)",
        ),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, DtypeError, "attn_mask is torch.int64; give bool"),
        ({"key": torch.zeros(5, WIDTH)}, ShapeError, "3, 2 and 3 axes"),
        ({"query": torch.nested.nested_tensor([torch.zeros(5, WIDTH)] * 2, layout=torch.jagged)}, ShapeError, "nested"),
    ],
)
def test_bad_inputs_say_what_was_expected(given: dict[str, Tensor], error: type[Exception], message: str) -> None:
    layer = replacement(torch_attention(batch_first=True))
    with pytest.raises(error, match=message):
        layer(**{name: torch.zeros(2, 5, WIDTH) for name in ("query", "key", "value")} | given)


def test_a_batch_may_be_empty() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1).eval()
    convert(model)
    assert model(torch.zeros(0, 9, 32)).shape == (0, 9, 32)
    with pytest.raises(ConfigError, match=r"config is 'adaptive'; give an adaattn\.Conversion"):
        convert(model, "adaptive")  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_first", [False, True])
def test_exports_for_any_batch_and_length(batch_first: bool) -> None:
    layer = replacement(torch_attention(batch_first=batch_first), Conversion("adaptive"))
    batch, tokens = Dim("B", max=64), Dim("S", max=512)
    dims = (batch, tokens) if batch_first else (tokens, batch)
    axes = dict(enumerate(dims))

    def example(b: int, s: int) -> tuple[Tensor, ...]:
        x = torch.randn((b, s, WIDTH) if batch_first else (s, b, WIDTH))
        return x, x.clone(), x.clone(), masked(b, s)

    program = torch.export.export(layer, example(2, 5), dynamic_shapes=(axes, axes, axes, {0: batch, 1: tokens}))
    assert any("adaptive_attention" in str(node.target) for node in program.graph.nodes)
    for b, s in ((1, 1), (3, 17)):
        args = example(b, s)
        for got, want in zip(program.module()(*args), layer(*args), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_converted_model_passes_its_export(tmp_path: Path) -> None:
    from adaattn.export import Options, export

    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True), 2).eval()
    convert(model, Conversion(tolerance=1e-2))
    result = export(
        model,
        {"src": f"B,S,{WIDTH}", "src_key_padding_mask": "B,S:bool"},
        tmp_path / "out",
        dims={"S": "1:17:64"},
        options=Options(targets=("onnx",), tolerance=5e-2),
    )
    assert result.passed
    found = {layer["name"]: layer["tolerance"] for layer in result.report["layers"]}
    assert found == {f"layers.{i}.self_attn.attention": 5e-2 for i in (0, 1)}
