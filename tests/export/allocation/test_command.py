"""`--output-tolerance` as a user gives it: the whole way to a verified file, and what bad input gets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result

import adaattn
from adaattn.export import Options
from adaattn.export.cli.parity import main as parity
from tests.support.cli import refused, run

pytestmark = pytest.mark.usefixtures("inside")
QUICK = ("-q", "--target", "onnx")
WIDTH = 32


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    adaattn.save(adaattn.Encoder(WIDTH, 2, ("adaptive", "dense")), "model.pt")
    np.savez("samples.npz", x=np.random.default_rng(0).standard_normal((24, 12, WIDTH)).astype(np.float32))
    return tmp_path


def exported(*arguments: str, out: str = "out") -> Result:
    return run("model.pt", *QUICK, "--dim", "S=1:12:20", *arguments, "-o", out)


def test_a_model_gets_types_and_proof() -> None:
    result = exported("--output-tolerance", "3e-2", "--samples", "samples.npz", "--state", "state.json")
    assert result.exit_code == 0, result.output
    report = json.loads(Path("out/report.json").read_text())
    plan = report["allocation"]
    assert report["verdict"] == "passed"
    assert plan["measured"] <= 3e-2
    assert plan["cost"] < plan["cost_fp32"]
    assert plan["device"] == "A100"
    formats = {site["op"]: site["format"] for site in plan["sites"]}
    assert formats["scaled_dot_product_attention"] in ("fp16", "bf16")
    model = onnx.load("out/model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    kinds = {onnx.TensorProto.DataType.Name(x.data_type) for x in model.graph.initializer}
    assert kinds & {"FLOAT16", "BFLOAT16"}
    (target,) = report["targets"]
    cases = {row["case"] for row in target["outputs"]}
    assert {"sample 1", "odd", "odd at fp32", "longest at fp32"} <= cases
    assert Path("state.json").is_file()
    page = Path("out/report.html").read_text()
    assert page.index("Types of the operators") < page.index("budget-caption") < page.index(">Targets<")

    again = exported("--allocation", "out/allocation.json", out="again")
    assert again.exit_code == 0, again.output
    assert Path("again/model.onnx").read_bytes() == Path("out/model.onnx").read_bytes()
    assert json.loads(Path("again/allocation.json").read_text()) == json.loads(Path("out/allocation.json").read_text())


def test_the_console_says_what_the_plan_is() -> None:
    arguments = ("--target", "onnx", "--no-verify", "--dim", "S=1:12:20", "-o", "out")
    result = run("model.pt", *arguments, "--output-tolerance", "3e-2", "--samples", "samples.npz")
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("types: "))
    assert "of 3.0e-02 on 12 certifying samples (95% quantile; too few to promise it for others); work: " in line
    assert "estimated for A100: 0." in line


def test_a_fault_in_the_file_is_found_though_types_round() -> None:
    assert exported("--output-tolerance", "3e-2", "--samples", "samples.npz").exit_code == 0
    model = onnx.load("out/model.onnx")
    weight = next(x for x in model.graph.initializer if len(x.dims) == 2 and x.data_type == onnx.TensorProto.FLOAT16)
    numbers = onnx.numpy_helper.to_array(weight).copy()
    numbers[3] *= 1.01
    weight.CopyFrom(onnx.numpy_helper.from_array(numbers, weight.name))
    onnx.save(model, "out/model.onnx")
    from click.testing import CliRunner

    result = CliRunner().invoke(parity, ["check", "out", "--backend", "ort-cpu"])
    assert result.exit_code == 1, result.output
    assert "at fp32): error" in result.output


def test_what_does_not_go_together_is_refused() -> None:
    tolerance, samples = ("--output-tolerance", "1e-2"), ("--samples", "samples.npz")
    for arguments, said in (
        (tolerance, "output_tolerance needs samples: types are chosen by errors on data like what the model will meet"),
        (samples, "samples apply only with output_tolerance, or with balance"),
        ((*tolerance, *samples, "--tolerance", "1e-2"), "output_tolerance gives types; choose one"),
        ((*tolerance, *samples, "--dtype", "float16"), "an output tolerance chooses a type for each operator"),
        ((*tolerance, *samples, "--opset", "18"), "opset is 18; an output tolerance takes 22 or newer"),
        ((*tolerance, *samples, "--quantile", "1.5"), "quantile is 1.5; give a share of samples"),
        ((*tolerance, *samples, "--formats", "fp16,fp4"), "formats are ('fp16', 'fp4')"),
        ((*tolerance, *samples, "--formats", "fp8"), "A100 has no fp8; leave it out of --formats"),
        ((*tolerance, *samples, "--metric", "nowhere:f"), "nowhere:f cannot be imported"),
        ((*tolerance, *samples, "--metric", "f"), "'f' is not a function"),
        ((*tolerance, *samples, "--allocation", "x.json"), "an allocation is made already"),
        (("--formats", "fp16"), "formats and metric apply only with output_tolerance"),
        (("--output-tolerance", "0", *samples), "output_tolerance is 0.0; give a relative error above 0"),
        (("--output-tolerance", "nan", *samples), "output_tolerance is nan"),
        (("--allocation", "missing.json"), "missing.json cannot be read"),
        (("--state", "x"), "balance and state apply only with samples"),
    ):
        refused(exported(*arguments), said)
        assert not Path("out").exists()


def test_samples_that_the_model_does_not_take_are_refused() -> None:
    good = np.random.default_rng(0).standard_normal((24, 12, WIDTH)).astype(np.float32)
    broken = good.copy()
    broken[3, 2, 1] = np.nan
    np.savez("names.npz", ids=good)
    np.savez("more.npz", x=good, y=good)
    np.savez("shape.npz", x=good[..., :8])
    np.savez("rank.npz", x=good[:, 0])
    np.savez("types.npz", x=good.astype(np.int64))
    np.savez("long.npz", x=np.concatenate([good, good], 1))
    np.savez("few.npz", x=good[:7])
    np.savez("nan.npz", x=broken)
    Path("midway.py").write_text(
        "import torch\n\ndef batches():\n    for place in range(20):\n        if place == 5:\n"
        f"            raise OSError('the disk is gone')\n        yield torch.randn(1, 9, {WIDTH})\n"
    )
    Path("text.py").write_text("def batches():\n    return ['a'] * 9\n")
    for source, said in (
        ("names.npz", "batch 1 of the samples lacks x; the inputs are x"),
        ("more.npz", "batch 1 of the samples has y, which is no input; the inputs are x"),
        ("shape.npz", "x in batch 1 of the samples has 8 where it takes B,S,32:float32"),
        ("rank.npz", "x in batch 1 of the samples has 2 dimensions, (16, 32); the input has 3"),
        ("types.npz", "x in batch 1 of the samples is of type int64; the input is float32"),
        ("long.npz", "batch 1 of the samples has S=24; the export takes 1:12:20"),
        ("few.npz", "7 samples are too few to choose types and to certify them; give 8 or more"),
        ("nan.npz", "x in batch 1 of the samples has NaN or Inf"),
        ("midway.py", "midway.py fails: OSError: the disk is gone"),
        ("text.py", "x in batch 1 of the samples is a str; give a tensor or an array"),
    ):
        refused(exported("--output-tolerance", "1e-2", "--samples", source), said)
        assert not Path("out").exists()


def test_models_without_an_error_to_bound_are_refused() -> None:
    Path("mine.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Best(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.a = nn.Linear({WIDTH}, 9)\n    def forward(self, x):\n        return self.a(x).argmax(-1)\n\n"
        "class Same(Best):\n    def forward(self, x):\n        return self.a.weight * 1.0, x.sum(-1) > 0\n\n"
        "class Half(Best):\n    def forward(self, x):\n        return self.a(x)\n\n"
        "class Dropout(Best):\n    def forward(self, x):\n        return nn.Dropout().train()(self.a(x))\n\n"
        "def half():\n    return Half().half()\n\n"
    )
    data = (*QUICK, "--output-tolerance", "1e-2", "--samples", "samples.npz", "-o", "out")
    shape = f"x=B,S,{WIDTH}"
    refused(run("mine:Best", "--input", shape, *data), "no output is of floating-point numbers", "output (int64)")
    refused(run("mine:Same", "--input", shape, *data), "no output of floating-point numbers depends on the inputs")
    refused(
        run("mine:Dropout", "--input", shape, *data), "the model is random: two runs on one sample differ in output"
    )
    np.savez("samples.npz", x=np.zeros((9, 4, WIDTH), np.float16))
    refused(run("mine:half", "--input", f"{shape}:float16", *data), "the model has weights of float16")


def test_an_allocation_of_another_model_is_refused() -> None:
    assert exported("--output-tolerance", "3e-2", "--samples", "samples.npz", "--no-verify").exit_code == 0
    adaattn.save(adaattn.Encoder(WIDTH, 2, ("dense",)), "model.pt")
    refused(exported("--allocation", "out/allocation.json", out="new"), "the allocation is of another model")
    assert not Path("new").exists()


def test_options_say_whether_they_choose_types() -> None:
    assert not Options().typed
    assert Options(output_tolerance=1e-2, samples=[]).typed
