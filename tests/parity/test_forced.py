"""What a verdict rests on: plans that are forced, plans that are probed, and enough that was compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import adaattn
from adaattn.errors import ConfigError
from adaattn.export import Options, export
from adaattn.export.engines import build as engine_build
from adaattn.export.engines import options as engine_options
from adaattn.export.engines.description import read_engine_info, sidecar
from adaattn.export.parity import compare, criterion, golden_case
from adaattn.export.verification import backends, graph_copies
from adaattn.export.verification.verify import verify_export
from adaattn.planning.precision import PRECISIONS
from tests.support.engine_files import described

WIDTH, HEADS = 32, 4
INPUTS = dict.fromkeys(("query", "key", "value"), f"B,S,{WIDTH}")


def exported(model: nn.Module, inputs: dict[str, str], folder: Path, **options: Any) -> dict[str, Any]:
    made = export(model.eval(), inputs, folder, dims={"S": "1:17:33"}, options=Options(("onnx",), **options))
    (target,) = made.report["targets"]
    return dict(target)


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a module whose inputs lead to one precision alone."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("adaptive") / "out"
    target = exported(adaattn.AdaptiveAttention(WIDTH, HEADS, tolerance=1e-2), INPUTS, folder)
    assert target["verdict"] == "passed", target["reason"]
    return folder


def test_every_step_of_the_ladder_is_run(adaptive: Path) -> None:
    (target,) = verify_export(adaptive, ["ort-cpu"])["targets"]
    compared = target["compared"]
    ranks = [f"rank {quarters} of 4" for quarters in (1, 2, 3)]
    assert sorted(compared["forced"]) == sorted([*PRECISIONS, *ranks])
    assert compared["plan_steps"] >= 6
    assert compared["cases"] == 5
    assert compared["elements"] == compared["of_elements"] > 0
    natural = golden_case.load(adaptive / "golden.npz")[0]
    (layer,) = natural.layers.values()
    assert len(np.unique(layer.precision)) == 1  # which alone would leave the other steps untried


def test_a_plan_that_is_forced_is_the_one_that_runs(adaptive: Path, tmp_path: Path) -> None:
    """By a copy of the graph whose plans are inputs, and by one whose plans are constants, for engines."""
    whole = backends.onnxruntime_backend(adaptive / "model.onnx")
    exact = backends.onnxruntime_backend(graph_copies.exact_copy(adaptive / "model.onnx", tmp_path / "exact.onnx"))
    for case in golden_case.load(adaptive / "golden.npz"):
        if case.forced == criterion.EXACT:
            same = dataclasses.replace(case, forced="", layers={})
            np.testing.assert_array_equal(whole(case).outputs["output"], exact(same).outputs["output"])


def test_the_copy_with_constant_plans_builds_as_an_engine(adaptive: Path, tmp_path: Path) -> None:
    if not engine_options.installed("tensorrt-rtx"):
        pytest.skip("tensorrt_rtx is not installed")
    model = export(
        adaattn.AdaptiveAttention(WIDTH, HEADS, tolerance=1e-2).eval(),
        dict.fromkeys(INPUTS, f"1,S,{WIDTH}"),
        tmp_path / "out",
        dims={"S": "1:17:33"},
        options=Options(("onnx",), opset=22, verify=False),
    ).directory
    copy = graph_copies.exact_copy(model / "model.onnx", tmp_path / "exact.onnx")
    profile = dict.fromkeys(INPUTS, ((1, 1, WIDTH), (1, 17, WIDTH), (1, 33, WIDTH)))
    options = engine_options.BuildOptions(compute_capabilities=("8.9",), optimization_level=0)
    info = engine_build.engine_from_onnx(copy, "tensorrt-rtx", tmp_path / "exact.engine", [profile], options)
    assert info.inputs


def test_an_engine_runs_with_plans_of_its_own_or_with_exact_ones(adaptive: Path, tmp_path: Path) -> None:
    engine = tmp_path / "tensorrt.engine"
    sidecar(engine).write_text(json.dumps(described()))
    run = backends.EngineBackend(engine, tmp_path / "log", read_engine_info(engine))
    case = next(case for case in golden_case.load(adaptive / "golden.npz") if case.forced)
    with pytest.raises(backends.TargetError, match="no engine has plans that are forced to fp32"):
        run(case)


def test_a_probe_takes_moments_alone(tmp_path: Path) -> None:
    output = golden_case.ExpectedOutput(np.zeros((242, 2), np.int32), "int32", 0.0, 0.0)
    outputs = {f"layer.{name}": output for name in ("precision", "rank")}
    for inputs in ({"query_mean": np.array("text")}, {"query_mean": np.ones((1, 2, 3))}):
        golden_case.save(
            tmp_path / "golden.npz", [golden_case.GoldenCase("plan of layer", inputs, outputs, probes="layer")]
        )
        with pytest.raises(ConfigError, match="the moment query_mean of plan of layer is"):
            golden_case.load(tmp_path / "golden.npz")
    with pytest.raises(ConfigError, match="'query_means', which is not a moment"):
        criterion.probe_inputs(
            golden_case.GoldenCase("plan", {"query_means": np.ones((1, 2, 3), np.float32)}, {}, probes="layer")
        )


class Partly(nn.Module):
    """NaN for a share of the elements, in float64 as well."""

    def __init__(self, above: float) -> None:
        super().__init__()
        self.linear, self.above = nn.Linear(WIDTH, 8), above

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[..., :8] > self.above, torch.nan, self.linear(x))


class Zeros(nn.Module):
    """A head that has not been trained yet, as torchvision's ViT begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(x))


class Tokens(nn.Module):
    """NaN for more than one token: only the trivial case has numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.ones_like(x[:, :, :1]).cumsum(1)
        return torch.where(counts.amax(1, keepdim=True) > 1.5, torch.nan, self.linear(x))


def test_what_was_hardly_compared_does_not_pass(tmp_path: Path) -> None:
    target = exported(Tokens(), {"x": f"B,S,{WIDTH}"}, tmp_path / "tokens")
    assert target["verdict"] == "not run"
    assert "nothing to compare: eager PyTorch has NaN or Inf for all of it" in target["reason"]
    target = exported(Zeros(), {"x": f"B,S,{WIDTH}"}, tmp_path / "zeros")
    assert target["verdict"] == "passed"
    said = "every number of every output is 0: nothing of the graph shows in them; 2 values inside it agree"
    assert said in target["reason"]
    model = onnx.load(tmp_path / "zeros/model.onnx")
    weight = next(x for x in model.graph.initializer if x.name == "linear.bias")
    weight.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, tmp_path / "zeros/model.onnx")
    (target,) = verify_export(tmp_path / "zeros", ["ort-cpu"])["targets"]
    assert (target["verdict"], target["reason"][:24]) == ("failed", "linear, inside the graph")


@pytest.mark.parametrize(
    ("above", "verdict", "said"), [(0, "passed", "are not compared"), (-1, "not run", "needs 25%")]
)
def test_a_share_of_an_output_must_have_been_compared(above: float, verdict: str, said: str, tmp_path: Path) -> None:
    target = exported(Partly(above), {"x": f"B,S,{WIDTH}"}, tmp_path / "out")
    assert target["verdict"] == verdict
    assert said in target["reason"]
    assert 0 < target["compared"]["elements"] < target["compared"]["of_elements"]


def test_nan_of_eager_where_float64_has_numbers_is_a_finding(tmp_path: Path) -> None:
    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * 1e4 * 1e4 / 1e8

    target = exported(Overflows(), {"x": f"B,S,{WIDTH}"}, tmp_path / "out", dtype="float16")
    assert target["verdict"] == "failed"
    assert "eager PyTorch itself has NaN or Inf in" in target["reason"]
    assert "the model fails in its type" in target["reason"]
    report = verify_export(tmp_path / "out", ["ort-cpu"])  # and it is one where the file went
    assert report["verdict"] == "failed"


def test_a_plan_that_predicts_another_error_fails() -> None:
    layer = golden_case.ExpectedAttention(
        *(np.full((1, 2), x) for x in (2, 8)),
        np.zeros((1, 2), bool),
        predicted=np.array([[1e-3, np.inf]]),
        predicted_limit=np.full((1, 2), 1e-4),
    )
    output = golden_case.ExpectedOutput(np.ones(3), "float32", 1e-7, 1e-6)
    goldens = [golden_case.GoldenCase("case", {}, {"y": output}, {"layer": layer})]

    def found(*predicted: float) -> dict[str, Any]:
        ran = compare.BackendResult(
            {"y": np.ones(3, np.float32)},
            {"layer": (layer.precision, layer.rank)},
            {},
            {"layer": np.array([predicted], np.float32)},
        )
        return compare.compare(goldens, lambda _: ran)

    assert found(1e-3, np.inf)["verdict"] == "passed"
    for predicted in ((1.01e-3, np.inf), (np.nan, np.inf), (1e-3, 5.0)):
        assert "layer, batch 0, head" in found(*predicted)["reason"], predicted
        assert "the plan predicts an error of" in found(*predicted)["reason"]
