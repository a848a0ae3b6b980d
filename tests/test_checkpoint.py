"""A model.pt comes back as it was, and a file that is none is refused in one line, with nothing left behind.

One file, though long: each kind of damage is a row of tables that share the same few saved files.
"""

from __future__ import annotations

import os
import pickle
import resource
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaattn
from adaattn.checkpoint import read
from adaattn.errors import CheckpointError, ConfigError
from adaattn.export.golden.plan_mode import PlanMode
from adaattn.export.sources import model as sources
from tests.support.bad_files import Records, read_records, write_records
from tests.support.paths import ROOT


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
        "class": "adaattn:AdaptiveAttention",
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


@pytest.mark.parametrize("name", ["dense", "adaptive_rank", "encoder"])
def test_files_of_format_1_0_load(name: str) -> None:
    """Files that named classes by the modules that held them then."""
    path = ROOT / "tests" / "data" / f"checkpoint-1.0-{name}.pt"
    assert "." in torch.load(path, weights_only=True)["class"]
    module, known = adaattn.load(path), np.load(path.with_name("checkpoint-1.0.npz"))
    x = torch.from_numpy(known["x"])
    with torch.no_grad(), PlanMode():  # with the rounding, as the numbers were made
        found = module(x) if name == "encoder" else module(x, x, x)[0]
    np.testing.assert_allclose(found.numpy(), known[name], rtol=0, atol=1e-6)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_class_of_the_users_own(tmp_path: Path) -> None:
    path, module = tmp_path / "model.pt", Doubler(3.0, (4, 5))
    adaattn.save(module, path)
    with pytest.raises(CheckpointError, match=r"Doubler, which is not a class of this package; pass it to"):
        adaattn.load(path)
    loaded = adaattn.load(path, classes=[Forgetful, Doubler])
    assert isinstance(loaded, Doubler)
    assert (loaded.factor, loaded.sizes) == (3.0, (4, 5))
    torch.testing.assert_close(loaded.weight, module.weight, rtol=0, atol=0)


def payload(**change: Any) -> dict[str, Any]:
    """Return what `save` writes of a small module, with changes; None removes a key."""
    module = adaattn.DenseAttention(8, 2)
    held = {
        "format": "adaattn",
        "version": 1,
        "class": "adaattn:DenseAttention",
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
        (payload(version=torch.ones(2)), "format version of type Tensor"),
        (payload(format="other"), "not a model saved by adaattn.save; it holds a dict"),
        (torch.zeros(3), "not a model saved by adaattn.save; it holds a Tensor"),
        (payload()["state"], "not a model saved by adaattn.save"),
        (payload(**{"class": "os:system"}), "os:system, which is not a class of this package"),
        (payload(**{"class": "adaattn.attention.dense:Sparse"}), "Sparse, which is not a class"),
        (payload(**{"class": "adaattn.nowhere:Dense"}), "adaattn.nowhere:Dense, which is not a class"),
        (payload(**{"class": "adaattn.errors:AdaAttnError"}), "not a class of this package"),
        (payload(**{"class": "adaattn.attention.base:AttentionBase"}), "not a class of this package"),
        (payload(**{"class": "adaattn:AdaAttnError"}), "not a class of this package"),
        (payload(**{"class": "adaattn:convert"}), "not a class of this package"),
        (payload(**{"class": 3}), "is damaged: its 'class' is missing or of another type"),
        (payload(**{"class": None}), "is damaged: its 'class' is missing"),
        (payload(config={"embed_dim": 9, "num_heads": 2}), "9 is not a positive multiple of num_heads 2"),
        (payload(config={"embed_dim": 8, "num_heads": 2, "x": 1}), "is inconsistent"),
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


def rezipped(change: Callable[[Records], object], method: int = zipfile.ZIP_STORED) -> Callable[[Path], object]:
    """Write the records again, with a change and right checksums."""

    def rewrite(path: Path) -> None:
        records = read_records(path)
        change(records)
        write_records(records, path, method)

    return rewrite


def bytewise(change: Callable[[bytearray], object]) -> Callable[[Path], object]:
    def rewrite(path: Path) -> None:
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return rewrite


def flip(data: bytearray, part: bytes, offset: int) -> None:
    """Change a bit behind the first place where a part is."""
    data[data.index(part) + offset] ^= 1


def flip_weight(path: Path) -> None:
    weight = read_records(path)["model/data/0"]
    bytewise(lambda data: flip(data, weight, 5))(path)


def added(name: str) -> Callable[[Path], object]:
    """Append a record, which may have the name of another."""

    def append(path: Path) -> None:
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
            warnings.simplefilter("ignore")
            archive.writestr(name, bytes(64))

    return append


def pickled(data: bytes) -> Callable[[Path], object]:
    return rezipped(lambda records: records.update({"model/data.pkl": data}))


def renumbered(old: bytes, new: bytes) -> Callable[[Path], object]:
    """Change what the pickle says of the first weight, 8 by 8."""
    return rezipped(lambda records: records.update({"model/data.pkl": records["model/data.pkl"].replace(old, new, 1)}))


def laughs(depth: int = 60) -> list[Any]:
    """Return a list of two lists, each the same list of two lists: small, and endless to go through."""
    held: list[Any] = ["x"]
    for _ in range(depth):
        held = [held, held]
    return held


CALL_OF_2_GIB = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
DEEP = b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."
WIDE = {"embed_dim": 2**17, "num_heads": 2}
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a weight": (lambda path: flip_weight(path), "checksum of its record '0' is wrong"),
    "a bit of the pickle": (
        bytewise(lambda data: flip(data, b"_rebuild_tensor", 3)),
        "checksum of its record 'data.pkl'",
    ),
    "a bit of a local header": (bytewise(lambda data: flip(data, b"PK\3\4", 8)), "does not agree with its record"),
    "a bit of a local name": (bytewise(lambda data: flip(data, b"data.pkl", 0)), "does not agree with its record"),
    "a bit of a checksum": (bytewise(lambda data: flip(data, b"PK\1\2", 16)), "checksum of its record"),
    "a bit of a size": (bytewise(lambda data: flip(data, b"PK\1\2", 20)), "does not agree with its record"),
    "a bit of a place": (bytewise(lambda data: flip(data, b"PK\1\2", 42)), "is damaged"),
    "bytes before": (bytewise(lambda data: data.insert(0, 0)), "is damaged"),
    "a zip before": (bytewise(lambda data: data.__setitem__(slice(0, 0), bytes(data))), "bytes precede its beginning"),
    "bytes behind": (bytewise(lambda data: data.extend(b"more")), "bytes follow its end"),
    "a comment": (bytewise(lambda data: data.__setitem__(slice(-2, None), b"\4\0more")), "bytes follow its end"),
    "compressed": (rezipped(lambda _: None, zipfile.ZIP_DEFLATED), "has a compressed record"),
    "a bomb": (
        rezipped(lambda records: records.update({"model/data/0": bytes(2**26)}), zipfile.ZIP_DEFLATED),
        "has a compressed record",
    ),
    "a record twice": (added("model/data/0"), "records of one name"),
    "a record in capitals": (added("MODEL/DATA/0"), "records of one name"),
    "a record less": (rezipped(lambda records: records.pop("model/data/0")), "damaged or of another kind"),
    "an empty record": (rezipped(lambda records: records.update({"model/data/0": b""})), "damaged or of another kind"),
    "a short record": (rezipped(lambda records: records.update({"model/data/0": bytes(8)})), "damaged or of another"),
    "a long record": (rezipped(lambda records: records.update({"model/data/0": bytes(999)})), "damaged or of another"),
    "a storage beyond its record": (renumbered(b"K\x40tq", b"M\x00\x40tq"), "damaged or of another kind"),
    "a tensor beyond its storage": (renumbered(b"K\x08K\x08\x86q", b"M\x00\x08K\x08\x86q"), "damaged or of another"),
    "a call of 2 GiB": (pickled(CALL_OF_2_GIB), "damaged or of another kind"),
    "a deep pickle": (pickled(DEEP), "holds a list"),
    "half a pickle": (pickled(DEEP[:100]), "damaged or of another kind"),
    "no checksums": (lambda path: without_checksums(path), "set_crc32_options"),
}


def without_checksums(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(payload(), path)
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("change", BROKEN)
def test_broken_records_are_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(payload(), path)
    BROKEN[change][0](path)
    refused_alike(path, BROKEN[change][1])


def refused_alike(path: Path, message: str) -> None:
    """Assert that the library and the command refuse a file in one line, quickly and without much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for loader in (adaattn.load, lambda path: sources.load(str(path))):
        with pytest.raises(CheckpointError, match=message) as caught:
            loader(path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(path))
        assert len(str(caught.value)) < 700
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": WIDE}, "asks for more weights than the file holds"),
        ({"config": {"embed_dim": 2**40, "num_heads": 2**20}}, "asks for more weights than the file holds"),
        ({"config": {"embed_dim": float("nan"), "num_heads": 2}}, "is inconsistent"),
        ({"config": {"embed_dim": "8", "num_heads": 2}}, "is inconsistent"),
        ({"config": {"embed_dim": laughs(), "num_heads": 2}}, "its 'config' is missing or of another type"),
        ({"config": {3: 8}}, "its 'config' is missing or of another type"),
        (
            {"config": {"embed_dim": 8, "num_heads": 2, "kdim": "9" * 5000}},
            "its 'config' is missing or of another type",
        ),
        (
            {"class": "adaattn.encoder:Encoder", "config": {**WIDE, "layers": ("dense",) * 9000}},
            "asks for more weights than the file holds",
        ),
        ({"version": laughs()}, "has format version of type list"),
        ({"version": torch.ones(2)}, "has format version of type Tensor"),
        ({"training": laughs()}, "its 'training' is missing"),
        ({"class": "adaattn.encoder:" + "E" * 10**6}, "its 'class' is missing or of another type"),
        ({"class": "adaattn.checkpoint:load"}, "not a class of this package"),
        ({"inputs": {"query": laughs()}}, "its 'inputs' is missing or of another type"),
        ({"inputs": {"query": "B," * 10**6}}, "its 'inputs' is missing or of another type"),
        ({"inputs": {"a\nb": "B"}}, "is inconsistent: input a b=B"),
        ({"inputs": {3: "B"}}, "its 'inputs' is missing or of another type"),
        ({"dims": {"S": "1:2:" + "9" * 900}}, "is inconsistent: dimension S=1:2:9"),
        ({"state": {3: torch.ones(2)}}, "not a state dict"),
        ({"state": {"q_proj.weight": "NaN"}}, "does not fit DenseAttention"),
        ({"state": {"q_proj.weight": laughs()}}, "does not fit DenseAttention"),
        (
            {"state": {"q_proj.weight": torch.ones(8, 8, dtype=torch.int64)}},
            "torch.int64 in the file and torch.float32",
        ),
        ({"state": {"q_proj.weight": torch.ones(8, 8).to_sparse()}}, "holds sparse tensors; save them after .to_dense"),
        ({"state": {"q_proj.weight": torch.empty(8, 8, device="meta")}}, "holds tensors without numbers"),
        ({"config": WIDE, "state": {"q_proj.weight": torch.zeros(1).expand(2**17, 2**17)}}, "repeat few numbers over"),
        (
            {"config": WIDE, "state": {"q_proj.weight": torch.empty(2**17, 2**17, device="meta")}},
            "holds tensors without numbers",
        ),
    ],
)
def test_a_small_file_cannot_ask_for_much(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(payload(**change), tmp_path / "model.pt")
    refused_alike(tmp_path / "model.pt", message)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's kind of them is about to go
def test_quantized_weights_are_named(tmp_path: Path) -> None:
    torch.save(payload(state={"q": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}), tmp_path / "m.pt")
    refused_alike(tmp_path / "m.pt", "holds quantized tensors")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    torch.save(payload(), path)
    load = torch.load

    def slow(*arguments: Any, **options: Any) -> Any:
        found = load(*arguments, **options)
        os.utime(path, (1, 1))
        return found

    monkeypatch.setattr(torch, "load", slow)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        adaattn.load(path)


def test_weights_are_in_memory_when_they_are_loaded(tmp_path: Path) -> None:
    """Mapped, they would crash the process when someone truncates the file."""
    path = tmp_path / "model.pt"
    module = adaattn.DenseAttention(64, 2)
    adaattn.save(module, path)
    loaded = sources.load(str(path)).model
    assert path.name not in Path("/proc/self/maps").read_text()
    os.truncate(path, 0)
    assert isinstance(loaded, nn.Module)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


class Tied(nn.Module):
    """One tensor by two names, and a buffer by two."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.one.register_buffer("mask", self.mask)


def test_what_is_tied_stays_tied(tmp_path: Path) -> None:
    adaattn.save(Tied(), tmp_path / "model.pt")
    loaded = adaattn.load(tmp_path / "model.pt", classes=[Tied])
    assert isinstance(loaded, Tied)
    assert loaded.one.weight is loaded.other.weight
    assert loaded.mask is loaded.one.mask
    assert len(list(loaded.parameters())) == 3


@pytest.mark.parametrize("change", [torch.zeros(4, 4), torch.ones(4, 5), torch.ones(4, 4, dtype=torch.float64)])
def test_tied_weights_that_differ_in_the_file(change: Tensor, tmp_path: Path) -> None:
    state = Tied().state_dict() | {"other.weight": change}
    held = payload(**{"class": f"{__name__}:Tied", "config": {}, "state": dict(state)})
    torch.save(held, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"one.weight and other.weight are one tensor there, and two that differ"):
        adaattn.load(tmp_path / "model.pt", classes=[Tied])


def test_tied_weights_may_hold_nan(tmp_path: Path) -> None:
    module, copied = Tied(), torch.full((4, 4), torch.nan)
    state = module.state_dict() | {"one.weight": copied, "other.weight": copied.clone()}
    torch.save(payload(**{"class": f"{__name__}:Tied", "config": {}, "state": dict(state)}), tmp_path / "model.pt")
    loaded = adaattn.load(tmp_path / "model.pt", classes=[Tied])
    assert isinstance(loaded, Tied)
    assert loaded.other.weight is loaded.one.weight


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
