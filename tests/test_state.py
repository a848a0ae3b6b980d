"""A module keeps its configuration and its plans through what torch does with modules: devices, types, copies."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import adaattn
from adaattn.attention.base import AttentionBase, PlannedAttention
from adaattn.attention.torch_multihead import MultiheadAttention
from adaattn.errors import DeviceError, DtypeError

WIDTH = 24
X = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))

Make = Callable[[], nn.Module]
KINDS: dict[str, Make] = {
    "dense": lambda: adaattn.DenseAttention(WIDTH, 4, num_kv_heads=2),
    "precision": lambda: adaattn.AdaptivePrecisionAttention(WIDTH, 4, precisions=("fp32", "int8")),
    "int8": lambda: adaattn.AdaptivePrecisionAttention(WIDTH, 4, "int8"),
    "entropy": lambda: adaattn.AdaptiveRankAttention(WIDTH, 4),
    "random": lambda: adaattn.AdaptiveRankAttention(WIDTH, 4, rank_estimation_method="random"),
    "rank": lambda: adaattn.AdaptiveRankAttention(WIDTH, 4, tolerance=2e-2),
    "adaptive": lambda: adaattn.AdaptiveAttention(WIDTH, 4, policy="speed"),
    "encoder": lambda: adaattn.Encoder(WIDTH, 4, ("dense", "adaptive_precision", "adaptive_rank"), causal=True),
    "multihead": lambda: MultiheadAttention(adaattn.AdaptiveAttention(WIDTH, 4), batch_first=True),
}


def call(module: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        output = module(x) if isinstance(module, adaattn.Encoder) else module(x, x, x)[0]
    assert isinstance(output, Tensor)
    return output


def plans(module: nn.Module) -> list[object]:
    return [m._statistics.counts.tolist() for m in module.modules() if isinstance(m, PlannedAttention)]


def on_meta(make: Make) -> nn.Module:
    with torch.device("meta"):
        return make()


def emptied(module: nn.Module) -> nn.Module:
    """`to_empty`, whose memory holds what it never held before."""
    return module.to_empty(device="cpu")


def loaded(module: nn.Module, source: nn.Module, assign: bool = False) -> nn.Module:
    module.load_state_dict(source.state_dict(), assign=assign)
    return module


def through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


def prepared(module: nn.Module) -> nn.Module:
    """As FullyShardedDataParallel does with a model on meta: each module with tensors of its own resets them."""
    for each in module.modules():
        if list(each.parameters(recurse=False)) or list(each.buffers(recurse=False)):
            each.to_empty(device="cpu", recurse=False)
            each.reset_parameters()  # type: ignore[operator]
    return module


WAYS: dict[str, Callable[[nn.Module, Make], nn.Module]] = {
    "built on meta, emptied, loaded": lambda m, make: loaded(emptied(on_meta(make)), m),
    "built on meta, assigned": lambda m, make: loaded(on_meta(make), m, assign=True),
    "moved to meta, emptied, loaded": lambda m, make: loaded(emptied(copy.deepcopy(m).to("meta")), m),
    "emptied twice, loaded": lambda m, make: loaded(emptied(emptied(make())), m),
    "built on meta, prepared, loaded": lambda m, make: loaded(prepared(on_meta(make)), m),
    "deepcopy": lambda m, make: copy.deepcopy(m),
    "pickle": lambda m, make: pickle.loads(pickle.dumps(m)),
    "torch.save of the module": lambda m, make: through_file(m),
    "shared memory": lambda m, make: copy.deepcopy(m).share_memory(),
    "float64 and back": lambda m, make: copy.deepcopy(m).double().float(),
    "type": lambda m, make: copy.deepcopy(m).type(torch.float64).type(torch.float32),
    "to a type and back": lambda m, make: copy.deepcopy(m).to(dtype=torch.float64).to("cpu", torch.float32),
    "built as float64": lambda m, make: _by_default(torch.float64, make, m),
    "built under inference mode": lambda m, make: _in_inference(make, m),
}


def _by_default(dtype: torch.dtype, make: Make, source: nn.Module) -> nn.Module:
    torch.set_default_dtype(dtype)
    try:
        module = make()
    finally:
        torch.set_default_dtype(torch.float32)
    return loaded(module.float(), source)


def _in_inference(make: Make, source: nn.Module) -> nn.Module:
    module = copy.deepcopy(source)
    with torch.inference_mode():
        call(module.eval())
        module.to("cpu")
    for each in module.modules():
        if isinstance(each, PlannedAttention):
            each.reset_statistics()
    return module


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of quantised storages
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_plans_stay_bit_for_bit(kind: str, way: str) -> None:
    module = KINDS[kind]().eval()
    other = WAYS[way](copy.deepcopy(module), KINDS[kind]).eval()
    assert plans(other) == plans(module)  # none yet
    for _ in range(2):
        assert torch.equal(call(other), call(module))
        assert plans(other) == plans(module)
    assert all(not x.is_meta for x in [*other.parameters(), *other.buffers()])


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_move_with_the_module(kind: str) -> None:
    module = KINDS[kind]().eval()
    call(module)
    seen = plans(module)
    assert all(torch.tensor(counts).sum() > 0 for counts in seen)
    changes = (copy.deepcopy, nn.Module.half, nn.Module.share_memory, lambda m: m.to("meta"), emptied, copy.deepcopy)
    for change in changes:
        module = change(module)
        assert plans(module) == seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_types_go_through_meta_too(kind: str, dtype: torch.dtype) -> None:
    module = KINDS[kind]().eval().to(dtype)
    other = loaded(emptied(on_meta(KINDS[kind]).to(dtype)), module).eval()
    assert torch.equal(call(other, X.to(dtype)), call(module, X.to(dtype)))


def test_a_rotation_is_a_rotation_without_weights_to_load() -> None:
    module = emptied(on_meta(KINDS["random"]))
    assert isinstance(module, adaattn.AdaptiveRankAttention)
    fresh = KINDS["random"]()
    assert torch.equal(module.rotation, fresh.rotation)
    other = torch.linalg.qr(torch.randn(6, 6))[0]
    module.load_state_dict(fresh.state_dict() | {"rotation": other})
    for change in (nn.Module.double, nn.Module.float, copy.deepcopy, nn.Module.half):
        torch.testing.assert_close(
            change(module).rotation.float(), other, rtol=0, atol=1e-3
        )  # one that was loaded stays


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_on_meta_gives_shapes(kind: str) -> None:
    module = on_meta(KINDS[kind]).eval()
    output = call(module, X.to("meta"))
    assert output.is_meta
    assert output.shape == X.shape
    with FakeTensorMode():
        module = KINDS[kind]().eval()
        assert call(module, torch.randn(X.shape)).shape == X.shape
    assert type(call(KINDS[kind]().eval())) is Tensor  # nothing that was made there was kept


def test_a_table_made_under_a_transform_is_not_kept() -> None:
    """A size that no other test has: the first call is within `torch.func.grad` or a mode, the next is plain."""
    from adaattn.planning.ladder import _tables

    q = torch.randn(1, 2, 5, 14)

    def loss(x: Tensor) -> Tensor:
        return adaattn.adaptive_attention(x, q, q, tolerance=1e-2, low_rank=False).sum()

    with torch.inference_mode():
        want = loss(q)
    assert {type(x) for x in _tables.values()} == {Tensor}
    assert not any(x.is_inference() for x in _tables.values())
    assert torch.equal(loss(q.clone().requires_grad_()).detach(), want)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_calls_take_other_weights(kind: str) -> None:
    module, other = KINDS[kind]().eval(), KINDS[kind]().eval()
    args = (X,) if kind == "encoder" else (X, X, X)
    found = torch.func.functional_call(other, module.state_dict(), args)
    want = call(module)
    assert torch.equal(found if kind == "encoder" else found[0], want)


# All that can be set on a module after it was built.
def _all(module: nn.Module) -> list[AttentionBase]:
    return [m for m in module.modules() if isinstance(m, AttentionBase)]


def _planned(module: nn.Module) -> list[PlannedAttention]:
    fixed = [m for m in _all(module) if getattr(m, "default_precision", "adaptive") == "adaptive"]
    return [m for m in fixed if isinstance(m, PlannedAttention)]


def _each(attentions: list[AttentionBase] | list[PlannedAttention], name: str, *values: object) -> None:
    for i, attention in enumerate(attentions):
        setattr(attention, name, values[i % len(values)])


SETTERS: dict[str, Callable[[nn.Module], object]] = {
    "set_tolerance": lambda m: [a.set_tolerance(10.0 ** -(i + 1)) for i, a in enumerate(_planned(m))],
    "tolerance": lambda m: [_each(_planned(m), "policy", None), _each(_planned(m), "tolerance", 1e-1, 1e-4)],
    "policy": lambda m: [_each(_planned(m), "tolerance", None), _each(_planned(m), "policy", "quality", "speed")],
    "safety": lambda m: _each(_planned(m), "safety", 3.0, 0.5),
    "precisions": lambda m: _each(
        [a for a in _planned(m) if not isinstance(a, adaattn.AdaptiveRankAttention)],  # which has no such option
        "precisions",
        ("fp16",),
        ("bf16", "fp32"),
    ),
    "causal": lambda m: _each(_all(m), "causal", True, False),
    "dropout": lambda m: _each(_all(m), "dropout", 0.5, 0.25),
    "default_precision": lambda m: _each(
        [a for a in _all(m) if isinstance(a, adaattn.AdaptivePrecisionAttention)], "default_precision", "int8_fp8"
    ),
    "rank_ratio": lambda m: _each([a for a in _all(m) if hasattr(a, "rank_ratio")], "rank_ratio", 0.25),
    "weights": lambda m: [nn.init.normal_(p, 0, 0.5) for p in m.parameters()],
    "training": lambda m: m.train(),
}
SAVED = [kind for kind in KINDS if kind != "multihead"]  # which takes a module: no file of plain values has one


@pytest.mark.parametrize("setter", SETTERS)
@pytest.mark.parametrize("kind", SAVED)
def test_what_is_set_is_saved(kind: str, setter: str, tmp_path: Path) -> None:
    module = KINDS[kind]().eval()
    SETTERS[setter](module)
    adaattn.save(module, tmp_path / "model.pt")
    for other in (adaattn.load(tmp_path / "model.pt"), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.training == module.training
        for attention, same in zip(_all(other), _all(module), strict=True):
            assert repr(attention) == repr(same)
            assert {k: v for k, v in vars(attention).items() if not k.startswith("_")} == {
                k: v for k, v in vars(same).items() if not k.startswith("_")
            }
            assert getattr(attention, "budget", None) == getattr(same, "budget", None)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), module.parameters(), strict=True))
        outputs = []
        for each in (module, other):
            torch.manual_seed(0)
            for attention in _all(each):
                if isinstance(attention, PlannedAttention):
                    attention.reset_statistics()
            outputs.append((call(each), plans(each)))
        assert torch.equal(outputs[0][0], outputs[1][0])
        assert outputs[0][1] == outputs[1][1]


def test_a_tolerance_of_one_layer_changes_that_layer_and_is_saved(tmp_path: Path) -> None:
    encoder = adaattn.Encoder(WIDTH, 4, ("adaptive",) * 3, tolerance=5e-2).eval()
    encoder.stack[1].attention.set_tolerance(1e-5)
    encoder.stack[2].attention = adaattn.DenseAttention(WIDTH, 4, bias=False).eval()
    adaattn.save(encoder, tmp_path / "model.pt")
    other = adaattn.load(tmp_path / "model.pt")
    assert [getattr(layer.attention, "tolerance", None) for layer in other.stack] == [5e-2, 1e-5, None]
    assert type(other.stack[2].attention) is adaattn.DenseAttention
    assert torch.equal(call(other), call(encoder))
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    for damage in ({"attention": 3}, {"attention": {"stack.1.attention": {"class": "os:system", "config": {}}}}):
        torch.save(held | damage, tmp_path / "damaged.pt")
        with pytest.raises(adaattn.AdaAttnError) as caught:
            adaattn.load(tmp_path / "damaged.pt")
        assert "\n" not in str(caught.value)
    del held["attention"]  # a file of an earlier release
    torch.save(held, tmp_path / "earlier.pt")
    with pytest.raises(adaattn.AdaAttnError, match="does not fit"):
        adaattn.load(tmp_path / "earlier.pt")


MIXED: dict[str, Callable[[nn.Module], object]] = {
    "query": lambda m: m(X.to("meta"), X, X),
    "key": lambda m: m(X, X.to("meta"), X),
    "value": lambda m: m(X, X, X.to("meta")),
    "query and key": lambda m: m(X.to("meta"), X.to("meta"), X),
    "all inputs": lambda m: m(X.to("meta"), X.to("meta"), X.to("meta")),
    "mask": lambda m: m(X, X, X, torch.ones(2, 9, dtype=torch.bool, device="meta")),
    "weights": lambda m: m.to("meta")(X, X, X),
    "weights of the keys": lambda m: [_all(m)[0].k_proj.to("meta"), m(X, X, X)],
}


@pytest.mark.parametrize("mixed", MIXED)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "encoder"])
def test_tensors_on_several_devices_are_refused(kind: str, mixed: str) -> None:
    with pytest.raises(DeviceError, match=r"is on (cpu|meta) and .* on (meta|cpu); move them to one device"):
        MIXED[mixed](KINDS[kind]().eval())


def test_weights_that_a_hook_brings_are_taken() -> None:
    """As libraries do that keep weights elsewhere until a layer is called."""
    module, x = KINDS["adaptive"]().eval(), X
    want = call(module)
    kept = {name: copy.deepcopy(layer.state_dict()) for name, layer in module.named_children()}
    module.to("meta")

    def bring(name: str, layer: nn.Module, args: object) -> None:
        layer.load_state_dict(kept[name], assign=True)

    for name, layer in module.named_children():
        layer.register_forward_pre_hook(functools.partial(bring, name))
    assert torch.equal(call(module, x), want)


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool, torch.complex64],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_types_without_arithmetic_are_named(kind: str, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = [KINDS[kind]().eval()]
        if not dtype.is_complex and dtype.is_floating_point:
            modules.append(KINDS[kind]().eval().to(dtype))
    for module in modules:
        with pytest.raises(DtypeError, match=f"is {dtype}; expected a floating-point tensor: float32, float16"):
            call(module, X.to(dtype))
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(DtypeError, match=str(dtype)):
            call(module, X.to(dtype))
