"""Everything that MODEL may be, exported by the command and verified; and each option that changes what comes out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.export import Dim

import adaattn
from adaattn.errors import ConfigError
from adaattn.export import Options, export
from adaattn.export.sources import model as sources
from tests.support import models
from tests.support.cli import refused, run

ARTIFACTS = {"golden.npz", "model.onnx", "report.html", "report.json"}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def exported(*arguments: object, out: str = "out") -> dict[str, Any]:
    """Return the report of an export to ONNX that must pass, its folder checked against its manifest."""
    result = run(*arguments, "--target", "onnx", "--json", "-o", out)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    manifest = json.loads(Path(out, "manifest.json").read_text())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(out).iterdir()}
    del files["manifest.json"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == files
    assert files.keys() >= ARTIFACTS
    return report


def passed(report: dict[str, Any]) -> None:
    (target,) = report["targets"]
    assert (report["verdict"], target["name"], target["verdict"]) == ("passed", "onnx", "passed"), target["reason"]
    assert {row["case"] for row in target["outputs"]} >= {"odd", "outliers"}


def saved_model() -> list[object]:
    inputs = {"x": "batch,t,16", "attention_mask": "batch,t:bool"}
    adaattn.save(models.tiny(), "model.pt", inputs=inputs, dims={"t": "1:9:17"})
    return ["model.pt"]


def saved_tensor() -> list[object]:
    """Describe anew inputs that the file fixes by an example."""
    adaattn.save(models.tiny(), "model.pt", inputs={"x": torch.ones(2, 5, 16)}, dims={"t": "1:9:17"})
    return ["model.pt", "--input", "x=2,S,16:float32", "--dim", "S=1:9:17"]


def program(model: nn.Module, limit: int | None = 17, **inputs: torch.Tensor) -> None:
    """Write program.pt2, dynamic in the batch and in the length, which may be without an end."""
    batch, length = Dim("batch", max=5), Dim("length", max=limit)
    shapes = {name: {0: batch, x.dim() - 2: length} for name, x in inputs.items()}
    torch.export.save(torch.export.export(model, (), inputs, dynamic_shapes=shapes), "program.pt2")


def program_of_ours() -> list[object]:
    program(models.tiny(), x=torch.randn(2, 7, 16))
    return ["program.pt2", "--allow-pickle"]


def program_of_functions() -> list[object]:
    program(models.Functional(), **{name: torch.randn(2, 2, 7, 16) for name in "qkv"})
    return ["program.pt2", "--allow-pickle"]


def program_without_an_end() -> list[object]:
    program(models.tiny(), None, x=torch.randn(2, 7, 16))
    result = run("program.pt2", "--allow-pickle", "-q")
    assert result.exit_code == 2
    symbol = result.stderr.split("--dim ")[1].split("=")[0]
    return ["program.pt2", "--allow-pickle", "--dim", f"{symbol}=2:9:17"]


def factory_and_safetensors() -> list[object]:
    save_file(models.tiny().state_dict(), "weights.safetensors")
    return ["tests.support.models:tiny", "--weights", "weights.safetensors", "--dim", "S=1:9:17"]


def factory_and_pt() -> list[object]:
    torch.save(models.transformer_layer().state_dict(), "weights.pt")
    return [
        "tests.support.models:transformer_layer",
        "--weights",
        "weights.pt",
        "--input",
        "src=B,S,16",
        "--dim",
        "S=1:9:17",
    ]


def factory_of_ones_own() -> list[object]:
    """In the folder where the command runs."""
    Path("own_models.py").write_text("import torch\n\n\ndef relu():\n    return torch.nn.ReLU()\n")
    return ["own_models:relu", "--input", "input=B,S"]


def tied_weights() -> list[object]:
    """Load a file in which safetensors kept one of two names of a tensor."""
    save_model(models.Tagger(), "weights.safetensors")
    ids = ["--input", "ids=B,S:int64<100", "--input", "mask=B,S", "--dim", "S=1:8:16"]
    return ["tests.support.models:Tagger", "--weights", "weights.safetensors", *ids]


def weights_of_a_wrapper() -> list[object]:
    """Its names begin with those of the wrappers; the module itself waits for them on the meta device."""
    torch.save(torch.compile(nn.DataParallel(nn.Linear(16, 8))).state_dict(), "weights.pt")
    return ["tests.support.models:distributed", "--weights", "weights.pt", "--input", "input=B,16"]


def compiled() -> list[object]:
    return ["tests.support.models:compiled", "--input", "input=B,16"]


@pytest.mark.parametrize(
    "source",
    [
        saved_model,
        saved_tensor,
        program_of_ours,
        program_of_functions,
        program_without_an_end,
        factory_and_safetensors,
        factory_and_pt,
        factory_of_ones_own,
        tied_weights,
        weights_of_a_wrapper,
        compiled,
    ],
)
def test_a_model_from_everywhere_passes(source: Callable[[], list[object]]) -> None:
    passed(exported(*source()))


def test_the_weights_are_those_of_the_file() -> None:
    weights = {"weight": torch.randn(8, 16), "bias": torch.randn(8)}
    save_file(weights, "weights.safetensors")
    exported("tests.support.models:linear", "--weights", "weights.safetensors", "--input", "input=B,16")
    session = onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(3, 16)
    (got,) = session.run(None, {"input": x.numpy()})
    np.testing.assert_allclose(got, nn.functional.linear(x, weights["weight"], weights["bias"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", [save_model, lambda model, path: torch.save(model.state_dict(), path)])
def test_tied_weights_stay_tied(save: Callable[[nn.Module, str], None]) -> None:
    name = "weights.safetensors" if save is save_model else "weights.pt"
    save(models.Tagger(), name)
    model = sources.load("tests.support.models:Tagger", name).model
    assert isinstance(model, models.Tagger)
    assert model.scores.weight is model.words.weight
    assert name not in Path("/proc/self/maps").read_text()  # mapped, a truncated file would crash the process


def test_tied_weights_that_differ_are_named() -> None:
    state = models.Tagger().state_dict()
    save_file(state | {"scores.weight": torch.zeros(100, 8)}, "weights.safetensors")
    refused(
        run("tests.support.models:Tagger", "--weights", "weights.safetensors", "-q"),
        "words.weight and scores.weight are one tensor there, and two that differ in the file",
    )


def lazy() -> nn.Module:
    return nn.LazyLinear(8)


def sparse() -> nn.Module:
    (model := nn.Linear(16, 8)).weight = nn.Parameter(torch.eye(8, 16).to_sparse())
    return model


def buffer_on_meta() -> nn.Module:
    (model := nn.Linear(16, 8)).register_buffer("mask", torch.empty(3, device="meta"), persistent=False)
    return model


def scripted_part() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), torch.jit.script(nn.Linear(16, 8)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lazy, "weight weight of LazyLinear is a parameter without a shape.*run the module once"),
        (sparse, r"weight weight of Linear is a sparse tensor; convert it by \.to_dense"),
        (models.on_meta, "weight weight of Linear is a tensor without numbers.*load its weights first"),
        (buffer_on_meta, "weight mask of Linear is a tensor without numbers"),
        (scripted_part, "its part 1 is a TorchScript module.*give the module that it was made from"),
        (lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), "the model is a TorchScript module"),
        (lambda: nn.Linear(2, 2).state_dict(), "model is of type OrderedDict; give a torch.nn.Module"),
        (lambda: "model.pt", "model is 'model.pt'; give a torch.nn.Module"),
    ],
)
def test_models_that_cannot_be_captured(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(make(), {"input": "B,16"})
    assert not Path("export").exists()


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is", "ignore:The tensor attribute self.weight was")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
def test_weights_that_are_computed(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = norm(nn.Linear(16, 8))
    model(torch.ones(2, 16))
    assert export(model, {"input": "B,16"}, options=Options(("onnx",))).passed


@pytest.mark.parametrize("opset", [18, 24])
def test_opset(opset: int) -> None:
    report = exported("tests.support.models:tiny", "--opset", opset, "--dim", "S=1:9:17")
    passed(report)
    versions = {item.domain: item.version for item in onnx.load("out/model.onnx").opset_import}
    assert (report["opset"], versions[""]) == (opset, opset)


def test_plans_become_outputs() -> None:
    report = exported("tests.support.models:tiny", "--emit-plan", "--dim", "S=1:9:17")
    passed(report)
    assert [layer["name"] for layer in report["layers"]] == ["stack.0.attention"]
    outputs = [output.name for output in onnx.load("out/model.onnx").graph.output]
    assert outputs == ["output", "stack.0.attention.precision", "stack.0.attention.rank"]


def test_large_tensors_go_to_a_file_of_their_own() -> None:
    passed(exported("tests.support.models:tiny", "--external-data-threshold", "1000", "--dim", "S=1:9:17"))
    graph = onnx.load("out/model.onnx", load_external_data=False).graph
    outside = [item for item in graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL]
    assert outside
    assert all(np.prod(item.dims) * 4 > 1000 for item in outside)
    assert Path("out/model.onnx.data").stat().st_size >= sum(np.prod(item.dims) * 4 for item in outside)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(dtype: str) -> None:
    report = exported("tests.support.models:tiny", "--dtype", dtype, "--dim", "S=1:9:17")
    assert report["model"]["dtype"] == dtype
    assert report["inputs"] == {"x": f"B,S,16:{dtype}"}
    (target,) = report["targets"]
    if dtype == "float16":
        passed(report)
    else:
        assert target["verdict"] == "not run"
        assert target["reason"].startswith("CPUExecutionProvider cannot run it: ")


def test_a_tolerance_reaches_every_layer() -> None:
    report = exported("tests.support.models:tiny", "--tolerance", "0.25", "--dim", "S=1:9:17")
    passed(report)
    assert [layer["tolerance"] for layer in report["layers"]] == [0.25]


def test_golden_inputs_lie_where_they_were_said_to() -> None:
    exported("tests.support.models:Tagger", "--input", "ids=B,S:int64<100", "--dim", "S=2:8:16", "--dim", "B=1:3:4")
    with np.load("out/golden.npz") as golden:
        ids = {name.split("/")[0]: golden[name] for name in golden if name.endswith("/input/ids")}
    assert ids["shortest"].shape == (1, 2)
    assert ids["odd"].shape == ids["outliers"].shape == (3, 7)
    assert ids["longest"].shape[1] == 16
    together = np.concatenate([values.ravel() for values in ids.values()])
    assert 0 <= together.min() < 10
    assert 90 <= together.max() < 100
