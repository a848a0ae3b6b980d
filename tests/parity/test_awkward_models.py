"""Models whose results are awkward to hold a backend to, and what must be said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import adaattn
from adaattn.errors import ExportError
from adaattn.export import Options, export
from adaattn.export.verification.bisect import bisect
from adaattn.export.verification.verify import verify_export

SIZES = {"S": "2:9:17"}


class Model(nn.Module):
    """A linear layer, and what is done with what comes of it."""

    def __init__(self, then: Callable[[Tensor], Any], width: int = 16, outputs: int = 16) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.linear = nn.Linear(width, outputs)
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.linear(x))


def made(folder: Path, model: nn.Module, dtype: str | None = None, **inputs: Any) -> dict[str, Any]:
    inputs = inputs or {"x": "B,S,16"}
    dims = SIZES if any(isinstance(text, str) and "S" in text for text in inputs.values()) else None
    options = Options(("onnx",), dtype=dtype)
    return export(model.eval(), inputs, folder / "out", dims=dims, options=options).report


def corrupted(folder: Path, scale: float = -3.0) -> dict[str, Any]:
    """Return the verdict once the weights are multiplied."""
    path = folder / "out" / "model.onnx"
    model = onnx.load(path)
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.ndim == 2:
            weight.CopyFrom(numpy_helper.from_array((values * scale).astype(values.dtype), weight.name))
    onnx.save(model, path)
    return verify_export(folder / "out", ["ort-cpu"])


def masked(value: float | None) -> Callable[[Tensor], Tensor]:
    def then(x: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2)
        earlier = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
        return scores.masked_fill(~earlier, torch.finfo(scores.dtype).min if value is None else value)

    return then


@pytest.mark.parametrize("value", [-torch.inf, -1e9, None], ids=["-inf", "-1e9", "least"])
def test_fill_values_do_not_hide_the_rest(value: float | None, tmp_path: Path) -> None:
    report = made(tmp_path, Model(masked(value)))
    assert report["verdict"] == "passed", report["targets"]
    assert all(row["limit"] < 3e-6 for row in report["targets"][0]["outputs"])
    (target,) = corrupted(tmp_path)["targets"]
    assert {row["verdict"] for row in target["outputs"]} == {"failed"}
    departure = bisect(tmp_path / "out")
    assert departure is not None
    assert departure.value == "linear"


def test_fill_values_must_be_there(tmp_path: Path) -> None:
    made(tmp_path, Model(masked(-torch.inf)))
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path)
    held = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute if a.HasField("t"))]
    minus = [x for x in held if x.data_type == 1 and np.isneginf(numpy_helper.to_array(x)).all()]
    assert minus
    for x in minus:
        x.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(x), np.nan), x.name))
    onnx.save(model, path)
    (target,) = verify_export(tmp_path / "out", ["ort-cpu"])["targets"]
    assert "are not the infinities or fill values that eager has, first at [0, 0, 1]" in target["reason"]


def test_where_eager_has_no_number_nothing_is_passed(tmp_path: Path) -> None:
    report = made(tmp_path, Model(lambda x: x * 1e5 * 1e5), dtype="float16")
    assert (report["verdict"], report["targets"][0]["verdict"]) == ("not run", "not run")
    assert "nothing to compare: eager PyTorch has NaN or Inf for all of it" in report["targets"][0]["reason"]
    assert corrupted(tmp_path)["verdict"] == "failed"


def test_what_eager_does_not_know_itself_is_not_passed(tmp_path: Path) -> None:
    table = nn.Embedding(1000, 8)
    model = Model(lambda x: table((x * 1e7).long() % 1000))
    model.table = table
    (target,) = made(tmp_path, model)["targets"]
    assert {row["verdict"] for row in target["outputs"]} == {"not run"}
    assert "eager PyTorch is too inaccurate itself: the limit would be" in target["reason"]


def test_integers_count_where_no_rounding_decides_them(tmp_path: Path) -> None:
    def then(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.argmax(-1), x.softmax(-1).topk(5).indices, x > 0

    report = made(tmp_path, Model(then, 128, 1000), "float16", x="B,S,128")
    (target,) = report["targets"]
    assert target["verdict"] == "passed", target["reason"]
    assert "elements are not compared: a rounding decides them" in target["reason"]
    assert "NaN" not in (tmp_path / "out" / "report.html").read_text()
    assert {row["verdict"] for row in corrupted(tmp_path, -1)["targets"][0]["outputs"]} == {"failed"}


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "counted": lambda x: (x > 0).float().sum(-1).long(),
    "image": lambda x: (x.sigmoid() * 255).round().to(torch.uint8),
    "quantised": lambda x: (x * 127).round().clamp(-128, 127).to(torch.int8),
    "floored": lambda x: (x * 4).floor().long(),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_rounded_on_purpose_is_compared(kind: str, dtype: str, tmp_path: Path) -> None:
    (target,) = made(tmp_path, Model(WHOLE[kind]), dtype)["targets"]
    assert target["verdict"] == "passed", target["reason"]
    with np.load(tmp_path / "out" / "golden.npz") as golden:
        lost = [golden[key].mean() for key in golden.files if "/lost/" in key]
    assert max(lost, default=0) < (0.01 if dtype == "float32" else 0.75)
    assert corrupted(tmp_path)["verdict"] == "failed"


def test_the_floor_is_that_of_the_outputs_type(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(50, 16).bfloat16(), nn.Linear(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return self.linear(self.table(ids).float())

    report = made(tmp_path, Mixed(), ids="B,S:int64<50")
    assert report["verdict"] == "passed"
    assert all(row["limit"] < 3e-6 for row in report["targets"][0]["outputs"])


def test_branches_are_verified_too(tmp_path: Path) -> None:
    class Branches(Model):
        def forward(self, x: Tensor) -> Any:
            return torch.cond(x.sum() > 0, lambda x: self.linear(x), lambda x: x * 2, (x,))

    for name in ("once", "again"):  # verification leaves nothing behind in torch
        report = made(tmp_path / name, Branches(nn.Identity()))
        assert report["verdict"] == "passed", report["targets"]


def test_a_model_may_write_into_its_inputs(tmp_path: Path) -> None:
    class Adds(Model):
        def forward(self, x: Tensor) -> Any:
            x += 0.5
            return self.linear(x)

    x = torch.ones(2, 3, 16)
    report = made(tmp_path, Adds(nn.Identity()), x=x)
    assert report["verdict"] == "passed", report["targets"]
    assert torch.equal(x, torch.ones(2, 3, 16))
    assert all(row["limit"] < 3e-6 for row in report["targets"][0]["outputs"])


def test_a_model_that_keeps_something_between_calls_is_refused(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls

    model = Counts()
    with pytest.raises(ExportError, match="the model changes calls when it is called"):
        made(tmp_path, model)
    assert not model.calls.any()
    assert not (tmp_path / "out").exists()


def test_what_a_model_keeps_for_itself_stays_in_a_copy(tmp_path: Path) -> None:
    class Keeps(Model):
        def forward(self, x: Tensor) -> Any:
            self.register_buffer("cos", torch.arange(x.shape[1]).cos()[:, None])
            self.calls, self.last = getattr(self, "calls", 0) + 1, x
            self.seen.append(x)
            return self.linear(x) * self.cos

    model = Keeps(nn.Identity()).eval()
    model.seen = []
    before = {name: id(value) for name, value in vars(model).items()}
    report = made(tmp_path, model, x="B,S,16")
    assert report["verdict"] == "passed", report["targets"]
    assert {name: id(value) for name, value in vars(model).items()} == before
    assert not model.seen
    assert [name for name, _ in model.named_buffers()] == []
    assert model(torch.ones(1, 2, 16)).isfinite().all()


@pytest.mark.parametrize("outside", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_attention_of_ours_in_branches(outside: bool, tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = adaattn.AdaptiveAttention(16, 2), adaattn.AdaptiveAttention(16, 2)

        def forward(self, x: Tensor) -> Any:
            if outside:
                x = self.first(x, x, x)[0]
            return torch.cond(
                x.sum() > 0,
                lambda x: self.second(x, x, x)[0],
                lambda x: self.second(x, x, x)[0] + self.first(x, x, x)[0],
                (x,),
            )

    report = made(tmp_path, Branches())
    assert report["verdict"] == "passed", report["targets"]
    model = onnx.load(tmp_path / "out" / "model.onnx")
    (branches,) = (node for node in model.graph.node if node.op_type == "If")
    within = [node for a in branches.attribute for node in a.g.node if node.domain == "adaattn"]
    assert {node.op_type for node in within} <= {function.name for function in model.functions}
    named = [node.name for node in within if node.op_type == "adaptive_attention"]
    assert len(set(named)) == 3
    assert all(named)


def test_attention_of_torch_in_branches(tmp_path: Path) -> None:
    class Branches(Model):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            def attend(x: Tensor, mask: Tensor) -> Tensor:
                return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, None, None])

            return torch.cond(x.sum() > 0, attend, lambda x, mask: x * 2, (self.linear(x)[:, None], mask))

    report = made(tmp_path, Branches(nn.Identity()), x="B,S,16", mask="B,S:bool")
    assert report["verdict"] == "passed", report["targets"]


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], list[str], int]] = {
    "one": (lambda x: x, ["output"], 0),
    "numbers beside": (lambda x: (x, 3, None, 2.5, x.shape[1]), ["output"], 3),
    "nested": (lambda x: (x, [x.mean(), 7, (x * 2,)]), ["output_0", "output_1", "output_2"], 1),
    "dictionary": (lambda x: {"y": x, "n": 3, "none": None}, ["y"], 1),
    "nested dictionary": (
        lambda x: {"a": {"b": x, "c": [x + 1, 1]}, "a_b": x * 2, "x": x * 3},
        ["a_b", "a_c_0", "a_b_2", "x_out"],
        1,
    ),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_tensors_are_returned_and_the_rest_is_named(kind: str, tmp_path: Path) -> None:
    then, names, left_out = OUTPUTS[kind]
    for place in ("module", "program"):
        if place == "module":
            report = made(tmp_path / place, Model(then))
        else:
            shapes = {"x": {1: torch.export.Dim("S", min=2, max=17)}}
            program = torch.export.export(Model(then), (torch.randn(2, 9, 16),), dynamic_shapes=shapes)
            report = export(program, output_dir=tmp_path / place, options=Options(("onnx",))).report
        assert report["verdict"] == "passed", report["targets"]
        assert sorted({row["name"] for row in report["targets"][0]["outputs"]}) == sorted(names)
        assert len(report["warnings"]) == left_out
        assert all("no tensor, and left out of the file" in line for line in report["warnings"])


def test_a_past_of_length_0(tmp_path: Path) -> None:
    class Remembers(Model):
        def forward(self, x: Tensor, past: Tensor) -> Any:
            keys = torch.cat([past, self.linear(x)], 1)
            return nn.functional.scaled_dot_product_attention(x[:, None], keys[:, None], keys[:, None]), keys

    options = Options(("onnx",))
    inputs = {"x": "B,S,16", "past": "B,P,16"}
    dims = {"P": "0:5:9", **SIZES}
    report = export(Remembers(nn.Identity()).eval(), inputs, tmp_path / "out", dims=dims, options=options).report
    assert report["verdict"] == "passed", report["targets"]
    with np.load(tmp_path / "out" / "golden.npz") as golden:
        assert golden["shortest/input/past"].shape[1] == 0


@pytest.mark.parametrize("name", ["file", "allow_pickle", "masked_image", "debiased"])
def test_inputs_may_have_any_name(name: str, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"nn": nn}
    exec(f"class Named(nn.Linear):\n def forward(self, {name}): return super().forward({name})", namespace)
    report = made(tmp_path, namespace["Named"](16, 16), **{name: "B,S,16"})
    assert report["verdict"] == "passed", report["targets"]
    assert corrupted(tmp_path)["verdict"] == "failed"
