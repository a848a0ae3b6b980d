"""`--output-tolerance` as a user gives it: the whole way to a verified file, and what bad input gets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result

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


def test_a_model_gets_types_and_proof_and_a_fault_in_its_file_is_found() -> None:
    options = ("--output-tolerance", "3e-2", "--samples", "samples.npz", "--state", "state.json")
    result = run("model.pt", "--target", "onnx", "--dim", "S=1:12:20", *options, "-o", "out")
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("types: "))
    assert "of 3.0e-02 on 12 certifying samples (95% quantile; too few to promise it for others); work: " in line
    assert "estimated for A100: 0." in line
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
    assert page.index("Types of the operators") < page.index("budget-caption") < page.index('<h2 id="targets"')

    again = exported("--allocation", "out/allocation.json", "--no-verify", out="again")
    assert again.exit_code == 0, again.output
    assert Path("again/model.onnx").read_bytes() == Path("out/model.onnx").read_bytes()
    assert json.loads(Path("again/allocation.json").read_text()) == json.loads(Path("out/allocation.json").read_text())

    adaattn.save(adaattn.Encoder(WIDTH, 2, ("dense",)), "model.pt")
    refused(exported("--allocation", "out/allocation.json", out="new"), "the allocation is of another model")
    assert not Path("new").exists()

    weight = next(x for x in model.graph.initializer if len(x.dims) == 2 and x.data_type == onnx.TensorProto.FLOAT16)
    numbers = onnx.numpy_helper.to_array(weight).copy()
    numbers[3] *= 1.01
    weight.CopyFrom(onnx.numpy_helper.from_array(numbers, weight.name))
    onnx.save(model, "out/model.onnx")
    result = CliRunner().invoke(parity, ["check", "out", "--backend", "ort-cpu"])
    assert result.exit_code == 1, result.output
    assert "at fp32): error" in result.output


@pytest.mark.thorough
def test_attention_becomes_the_op_with_constant_plans_and_a_fault_is_found() -> None:
    options = ("--output-tolerance", "3e-2", "--samples", "samples.npz", "--attention", "plugin")
    result = exported(*options)
    assert result.exit_code == 0, result.output
    report, model = json.loads(Path("out/report.json").read_text()), onnx.load("out/model.onnx")
    nodes = [node.op_type for node in model.graph.node if node.domain == "adaattn"]
    assert nodes == ["adaptive_attention"] * 2
    assert report["verdict"] == "passed"
    planned = [site["heads"]["plans"] for site in report["allocation"]["sites"] if site["format"] == "plugin"]
    assert len(planned) == 2
    assert {name for plans in planned for name, _ in plans} <= {"fp16", "int8"}  # an A100 has no fp8
    assert "plugin" in Path("out/report.html").read_text()
    again = exported("--allocation", "out/allocation.json", out="again")
    assert again.exit_code == 0, again.output
    assert Path("again/model.onnx").read_bytes() == Path("out/model.onnx").read_bytes()
    assert CliRunner().invoke(parity, ["check", "out", "--backend", "ort-cpu"]).exit_code == 0
    node = next(node for node in model.graph.node if node.op_type == "adaptive_attention")
    node.input[0], node.input[1] = node.input[1], node.input[0]
    onnx.save(model, "out/model.onnx")
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
        (("--formats", "fp16"), "formats, metric and attention apply only with output_tolerance"),
        (("--output-tolerance", "0", *samples), "output_tolerance is 0.0; give a relative error above 0"),
        (("--output-tolerance", "nan", *samples), "output_tolerance is nan"),
        (("--allocation", "missing.json"), "missing.json cannot be read"),
        (("--state", "x"), "balance and state apply only with samples"),
    ):
        refused(exported(*arguments), said)
        assert not Path("out").exists()


def test_options_say_whether_they_choose_types() -> None:
    assert not Options().typed
    assert Options(output_tolerance=1e-2, samples=[]).typed
