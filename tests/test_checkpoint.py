"""A model.pt comes back as it was, and a file that is none is refused in one line, with nothing left behind."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaattn
from adaattn.checkpoint import read
from adaattn.errors import CheckpointError, ConfigError


class Doubler(nn.Module):
    """A class of the user's own."""

    def __init__(self, factor: float = 2.0, sizes: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.factor, self.sizes = factor, sizes
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.factor


class Forgetful(nn.Module):
    """Does not keep its argument."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()


class Wrapper(nn.Module):
    """Takes an argument that no file should hold."""

    def __init__(self, inner: object = None) -> None:
        super().__init__()
        self.inner_given = self.inner = inner


MODULES: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: adaattn.DenseAttention(16, 4, 0.1, True, bias=False, kdim=16, vdim=16, num_kv_heads=2),
    "adaptive precision": lambda: adaattn.AdaptivePrecisionAttention(16, 4, precisions=("fp32", "int8"), safety=2.0),
    "fixed precision": lambda: adaattn.AdaptivePrecisionAttention(16, 4, default_precision="int8_fp8"),
    "rank, entropy": lambda: adaattn.AdaptiveRankAttention(16, 4, 0.75),
    "rank, power": lambda: adaattn.AdaptiveRankAttention(16, 4, 0.5, "power", 0.8),
    "rank, random": lambda: adaattn.AdaptiveRankAttention(16, 4, rank_estimation_method="random"),
    "adaptive": lambda: adaattn.AdaptiveAttention(16, 4, policy="speed"),
    "encoder": lambda: adaattn.Encoder(16, 2, ("dense", "adaptive", "adaptive_rank"), causal=True, tolerance=2e-2),
}


def call(module: nn.Module, x: Tensor) -> Tensor:
    output = module(x) if isinstance(module, adaattn.Encoder) else module(x, x, x)[0]
    assert isinstance(output, Tensor)
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_a_module_comes_back_as_it_was(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    module = MODULES[name]().to(dtype).eval()
    adaattn.save(module, tmp_path / "model.pt")
    loaded = adaattn.load(tmp_path / "model.pt")
    assert type(loaded) is type(module)
    assert not loaded.training
    x = torch.randn(2, 5, 16, dtype=dtype)
    torch.testing.assert_close(call(loaded, x), call(module, x), rtol=0, atol=0)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in module.parameters()]
    again = tmp_path / "again.pt"
    adaattn.save(loaded, again)
    first, second = (torch.load(path, weights_only=True) for path in (tmp_path / "model.pt", again))
    assert {**first, "state": 0} == {**second, "state": 0}  # every argument survives, defaults and all


def test_what_the_file_holds(tmp_path: Path) -> None:
    module = adaattn.AdaptiveAttention(16, 4)
    module.set_tolerance(3e-2)
    path = tmp_path / "model.pt"
    inputs = {"query": "B,S,16:float32", "key": "B, T, 16", "value": torch.zeros(2, 7, 16, dtype=torch.float16)}
    adaattn.save(module, str(path), inputs=inputs, dims={"S": "1:128:4096"})
    held = torch.load(path, weights_only=True)
    assert {key: held[key] for key in ("format", "version", "class", "training")} == {
        "format": "adaattn",
        "version": 1,
        "class": "adaattn.attention.adaptive:AdaptiveAttention",
        "training": True,
    }
    assert held["config"]["tolerance"] == 3e-2
    assert held["inputs"] == {"query": "B,S,16:float32", "key": "B,T,16", "value": "2,7,16:float16"}
    assert held["dims"] == {"S": "1:128:4096"}
    assert set(held["state"]) == set(module.state_dict())
    checkpoint = read(path)
    assert [str(spec) for spec in checkpoint.inputs] == list(held["inputs"].values())
    assert [(d.name, d.min, d.opt, d.max) for d in checkpoint.dims] == [("S", 1, 128, 4096)]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()  # as any file that the user writes


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_class_of_the_users_own(tmp_path: Path) -> None:
    path, module = tmp_path / "model.pt", Doubler(3.0, (4, 5))
    adaattn.save(module, path)
    with pytest.raises(CheckpointError, match=r"Doubler, which is no class of this package; pass it to adaattn.load"):
        adaattn.load(path)
    loaded = adaattn.load(path, classes=[Forgetful, Doubler])
    assert isinstance(loaded, Doubler)
    assert (loaded.factor, loaded.sizes) == (3.0, (4, 5))
    torch.testing.assert_close(loaded.weight, module.weight, rtol=0, atol=0)


def payload(**change: Any) -> dict[str, Any]:
    """What `save` writes of a small module, with changes; None takes a key out."""
    module = adaattn.DenseAttention(8, 2)
    held = {
        "format": "adaattn",
        "version": 1,
        "class": "adaattn.attention.dense:DenseAttention",
        "config": {"embed_dim": 8, "num_heads": 2},
        "state": dict(module.state_dict()),
        "training": False,
        "inputs": {},
        "dims": {},
        **change,
    }
    return {key: value for key, value in held.items() if value is not None}


def test_the_payload_below_is_sound(tmp_path: Path) -> None:
    torch.save(payload(), tmp_path / "model.pt")
    assert isinstance(adaattn.load(tmp_path / "model.pt"), adaattn.DenseAttention)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (payload(version=2), "format version 2 and this release reads version 1; save the model again"),
        (payload(version=None), "format version None"),
        (payload(format="other"), "not a model saved by adaattn.save; it holds a dict"),
        (torch.zeros(3), "not a model saved by adaattn.save; it holds a Tensor"),
        (payload()["state"], "not a model saved by adaattn.save"),
        (payload(**{"class": "os:system"}), "os:system, which is no class of this package"),
        (payload(**{"class": "adaattn.attention.dense:Sparse"}), "Sparse, which is no class"),
        (payload(**{"class": "adaattn.nowhere:Dense"}), "adaattn.nowhere:Dense, which is no class"),
        (payload(**{"class": "adaattn.errors:AdaAttnError"}), "no class of this package"),
        (payload(**{"class": "adaattn.attention.base:AttentionBase"}), "does not fit together"),
        (payload(**{"class": 3}), "is damaged: its 'class' is missing or of another type"),
        (payload(**{"class": None}), "is damaged: its 'class' is missing"),
        (payload(config={"embed_dim": 9, "num_heads": 2}), "9 is not a positive multiple of num_heads 2"),
        (payload(config={"embed_dim": 8, "num_heads": 2, "x": 1}), "does not fit together"),
        (payload(config=[8, 2]), "is damaged: its 'config'"),
        (payload(state={}), "does not fit DenseAttention: Missing key"),
        (payload(config={"embed_dim": 16, "num_heads": 2}), "does not fit DenseAttention: size mismatch"),
        (payload(inputs={"query": "B,S,8:float128"}), "type 'float128' is unknown"),
        (payload(dims={"S": "9:1:9"}), "sizes must be in order"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_a_line(held: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(held, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        adaattn.load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


class Trap:
    """A pickle that would run code, and says so in a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


DAMAGED: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-700]),
    "a header alone": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "a hole": lambda path: path.write_bytes(path.read_bytes()[:64] + path.read_bytes()[256:]),
    "a pickled module": lambda path: torch.save(adaattn.DenseAttention(8, 2), path),
    "a pickle that runs code": lambda path: path.write_bytes(pickle.dumps(Trap(path.parent / "ran"))),
    "a zip that runs code": lambda path: torch.save(Trap(path.parent / "ran"), path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_in_a_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(payload(), path)
    DAMAGED[damage](path)
    kind = "holds objects that only code can make" if "a pickle" in damage or "a zip" in damage else "is damaged"
    kind = "is a folder" if damage == "a folder" else kind
    with pytest.raises(CheckpointError, match=rf"is not a model saved by adaattn\.save: it {kind}") as caught:
        adaattn.load(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt does not exist"):
        adaattn.load(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("module", "options", "kind", "message"),
    [
        (Forgetful(), {}, CheckpointError, "Forgetful has no attribute 'width'; keep each constructor argument"),
        (Wrapper(nn.Linear(2, 2)), {}, CheckpointError, "Wrapper.inner is a Linear; only numbers"),
        (Doubler(), {"inputs": {"x": "B,?"}}, ConfigError, r"input x=B,\?: '\?' is neither"),
        (Doubler(), {"dims": {"S": "3:2:1"}}, ConfigError, "sizes must be in order"),
    ],
)
def test_what_cannot_be_saved(
    module: nn.Module, options: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message) as caught:
        adaattn.save(module, tmp_path / "model.pt", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def _full_disk(payload: object, file: Any) -> None:
    file.write(b"half")
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672]")  # noqa: B904  as torch's writer does


def _interrupted(payload: object, file: Any) -> None:
    file.write(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("writer", "kind", "message"),
    [(_full_disk, CheckpointError, "cannot be written: No space left"), (_interrupted, KeyboardInterrupt, None)],
)
def test_a_failure_leaves_the_old_file_and_no_other(
    writer: Callable[..., None],
    kind: type[BaseException],
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "model.pt"
    path.write_text("old")
    monkeypatch.setattr(torch, "save", writer)
    with pytest.raises(kind, match=message):
        adaattn.save(adaattn.DenseAttention(8, 2), path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("model.pt", "old")]


@pytest.mark.parametrize("where", ["nowhere/model.pt", "."])
def test_a_place_that_cannot_be_written(where: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        adaattn.save(adaattn.DenseAttention(8, 2), tmp_path / where)
    assert list(tmp_path.iterdir()) == []
