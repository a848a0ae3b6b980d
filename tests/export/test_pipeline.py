"""The main road on every kind of attention: exported, run by stock ONNX Runtime, and compared with float64."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import adaattn
from adaattn.errors import ConfigError
from adaattn.export import Options, Result, export
from adaattn.export.onnx.lower import planned_nodes

WIDTH, HEADS = 32, 4
ONNX = Options(targets=("onnx",))


class EveryModule(nn.Module):
    """All modules on the same inputs; their fixed plans are in the table of tests/parity."""

    def __init__(self, causal: bool, kv_heads: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"causal": causal, "num_kv_heads": kv_heads}
        self.dense = adaattn.DenseAttention(WIDTH, HEADS, **options)
        self.precision = adaattn.AdaptivePrecisionAttention(WIDTH, HEADS, **options)
        self.entropy = adaattn.AdaptiveRankAttention(WIDTH, HEADS, 0.9, **options)
        self.both = adaattn.AdaptiveAttention(WIDTH, HEADS, tolerance=0.1, **options)

    def forward(self, query: Tensor, memory: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {name: attention(query, memory, memory, attention_mask)[0] for name, attention in self.named_children()}


class Alone(nn.Module):
    """Self-attention: one input for query, key and value."""

    def __init__(self, modules: EveryModule) -> None:
        super().__init__()
        self.every = modules

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.every(x, x, attention_mask)
        return outputs


MASKS = {"none": None, "padding": "B,{k}:bool", "query": "B,{q},{k}:bool", "additive": "B,4,{q},{k}"}


# Each option twice; more pairs of them are in the seeded part of tests/parity.
COVER = (
    ("padding", True, True, 4, "float16"),
    ("query", False, True, 2, "float32"),
)


@pytest.mark.parametrize(
    ("mask", "causal", "cross", "kv_heads", "dtype"),
    [
        pytest.param(*options, marks=() if options in COVER else pytest.mark.thorough)
        for options in product(MASKS, (False, True), (False, True), (4, 2), ("float32", "float16"))
    ],
)
def test_every_module_passes(mask: str, causal: bool, cross: bool, kv_heads: int, dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model: nn.Module = EveryModule(causal, kv_heads)
    inputs = {"query": f"B,S,{WIDTH}", "memory": f"B,K,{WIDTH}"}
    dims = {"B": "1:2:3", "S": "1:17:40", "K": "1:9:33"}
    if not cross:
        model, inputs = Alone(model), {"x": f"B,S,{WIDTH}"}  # type: ignore[arg-type]
        del dims["K"]
    text = MASKS[mask]
    if text is not None:
        inputs["attention_mask"] = text.format(q="S", k="K" if cross else "S")
    options = Options(targets=("onnx",), dtype=dtype)
    result = export(model, inputs, tmp_path / "out", dims=dims, options=options)
    (target,) = result.report["targets"]
    assert result.passed, target["reason"]
    cases = {row["case"] for row in target["outputs"]}
    usual = ("shortest", "short", "odd", "outliers", "longest")
    assert cases >= {f"{case}{at}" for case in usual for at in ("", " at fp32")}
    outputs = {row["name"] for row in target["outputs"] if row["case"] in usual}
    assert outputs == set(dict(EveryModule(False, 4).named_children()))
    assert target["plans"]["heads"] > 0
    graph = onnx.load(tmp_path / "out/model.onnx")
    ours = [node for node in graph.graph.node if node.domain == "adaattn"]
    assert {function.name for function in graph.functions} == {node.op_type for node in ours}
    for node in ours:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"adaattn", b"1")
    assert sum("adaptive_attention" in node.op_type for node in ours) == 3  # dense stays standard


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Return an encoder of every kind of layer, for the ONNX target."""
    torch.manual_seed(6)
    model = adaattn.Encoder(WIDTH, HEADS, ("dense", "adaptive_precision", "adaptive_rank", "adaptive"), causal=True)
    inputs = {"x": f"B,S,{WIDTH}", "attention_mask": "B,S:bool"}
    options = Options(targets=("onnx",), emit_plan=True)
    folder = tmp_path_factory.mktemp("encoder") / "out"
    return export(model, inputs, folder, dims={"S": "1:32:64"}, options=options)


def test_stock_onnxruntime_runs_the_file(encoder: Result, tmp_path: Path) -> None:
    """Compare in a process that cannot import AdaAttn, from golden.npz alone."""
    script = """
import sys, numpy as np, onnxruntime
folder = sys.argv[1]
golden = np.load(folder + "/golden.npz")
session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
for case in ("shortest", "short", "odd", "outliers", "longest"):
    feed = {i.name: golden[f"{case}/input/{i.name}"] for i in session.get_inputs()}
    (got,) = session.run(["output"], feed)
    want = golden[f"{case}/output/output"]
    print(case, np.sqrt(((got - want) ** 2).mean() / (want ** 2).mean()))
assert not {"torch", "adaattn"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(encoder.directory)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    errors = {case: float(error) for case, error in (line.split() for line in done.stdout.splitlines())}
    assert set(errors) == {"shortest", "short", "odd", "outliers", "longest"}
    assert max(errors.values()) < 2e-4  # int8 layers whose operands lie between two integers


def test_dimensions_have_the_users_names(encoder: Result) -> None:
    graph = onnx.load(encoder.directory / "model.onnx").graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["B", "S", WIDTH]
    assert [d.dim_param or d.dim_value for d in graph.output[0].type.tensor_type.shape.dim] == ["B", "S", WIDTH]


def test_emitted_plans_are_named_after_layers(encoder: Result) -> None:
    names = [output.name for output in onnx.load(encoder.directory / "model.onnx").graph.output]
    layers = [f"stack.{i}.attention" for i in (1, 2, 3)]
    assert names == ["output"] + [f"{layer}.{label}" for layer in layers for label in ("precision", "rank")]
    assert [layer["name"] for layer in encoder.report["layers"]] == layers


def test_errors_that_were_predicted_are_measured(encoder: Result) -> None:
    for layer in encoder.report["layers"]:
        assert len(layer["predicted"]) == len(layer["measured"]) == HEADS
        for predicted, measured in zip(layer["predicted"], layer["measured"], strict=True):
            assert measured <= 3 * predicted + 1e-6
            if layer["tolerance"] is not None:
                assert measured <= layer["tolerance"]


def test_report_and_manifest_are_whole(encoder: Result) -> None:
    report = json.loads((encoder.directory / "report.json").read_text())
    assert report == encoder.report
    assert report["verdict"] == "passed"
    files = set(json.loads((encoder.directory / "manifest.json").read_text())["files"])
    assert files == {"model.onnx", "golden.npz", "trace.npz", "report.json", "report.html"}


def test_the_file_names_no_path_of_the_machine_that_made_it(encoder: Result) -> None:
    content = (encoder.directory / "model.onnx").read_bytes()
    for path in (Path(adaattn.__file__).parent, Path(torch.__file__).parent):
        assert str(path).encode() not in content


def test_example_tensors_fix_the_sizes_and_are_verified(tmp_path: Path) -> None:
    torch.manual_seed(7)
    x = torch.randn(2, 5, WIDTH)
    inputs = dict.fromkeys(("query", "key", "value"), x)  # one tensor, three inputs
    result = export(adaattn.AdaptiveAttention(WIDTH, HEADS), inputs, tmp_path / "o", options=ONNX)
    assert result.passed
    assert result.report["inputs"]["query"] == f"2,5,{WIDTH}:float32"
    assert "example" in {row["case"] for row in result.report["targets"][0]["outputs"]}


def test_the_callers_model_is_left_as_it_is(tmp_path: Path) -> None:
    model = adaattn.AdaptiveAttention(WIDTH, HEADS, tolerance=1e-3).train()
    export(model, output_dir=tmp_path / "o", options=Options(("onnx",), dtype="float16", tolerance=0.1, verify=False))
    assert model.training
    assert model.tolerance == 1e-3
    assert model.q_proj.weight.dtype == torch.float32


def test_weights_go_to_one_external_file(tmp_path: Path) -> None:
    options = Options(("onnx",), external_data_threshold=512)
    result = export(adaattn.DenseAttention(WIDTH, HEADS), output_dir=tmp_path / "o", options=options)
    assert result.passed
    assert {a["path"] for a in result.report["targets"][0]["artifacts"]} == {"model.onnx", "model.onnx.data"}


def test_need_weights_exports(tmp_path: Path) -> None:
    class WithWeights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = adaattn.AdaptiveAttention(WIDTH, HEADS)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            output, weights = self.attention(x, x, x, need_weights=True)
            return output, weights

    result = export(WithWeights(), {"x": f"B,S,{WIDTH}"}, tmp_path / "o", options=ONNX)
    assert result.passed, result.report["targets"][0]["reason"]


class Returns(nn.Module):
    """A model whose outputs are unusual: an input, a parameter, one call made twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = adaattn.AdaptiveAttention(WIDTH, HEADS)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, self.gain, self.attention(x, x, x)[0] + self.attention(x, x, x)[0]


def test_unusual_outputs(tmp_path: Path) -> None:
    result = export(Returns(), {"x": f"B,S,{WIDTH}"}, tmp_path / "o", options=ONNX)
    assert result.passed, result.report["targets"][0]["reason"]
    names = [row["name"] for row in result.report["targets"][0]["outputs"] if row["case"] == "odd"]
    assert names == ["output_0", "output_1", "output_2"]
    assert any("its plans are neither compared nor forced" in line for line in result.report["warnings"])


def test_a_model_that_fails_on_golden_inputs_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fails on the golden inputs"):
        export(nn.Embedding(100, 8), {"input": "B,S:int64<200"}, tmp_path / "o", options=ONNX)
    assert not (tmp_path / "o").exists()


def test_layers_of_a_functional_model_get_numbers(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            once = adaattn.adaptive_attention(x, x, x, tolerance=1e-2)
            return adaattn.adaptive_attention(once, x, x, is_causal=True, tolerance=1e-2)

    result = export(Twice(), {"x": "B,2,S,16"}, tmp_path / "o", options=ONNX)
    assert result.passed, result.report["targets"][0]["reason"]
    import onnx_ir

    assert list(planned_nodes(onnx_ir.load(result.directory / "model.onnx"))) == ["attention_0", "attention_1"]


@pytest.mark.thorough  # of external data, thresholds and embedding there are tests with less to write
def test_a_model_above_2_gib(tmp_path: Path) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = adaattn.AdaptiveAttention(WIDTH, HEADS)
            self.wide = nn.Parameter(torch.zeros(WIDTH, 17_500_000))

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.attention(x, x, x)[0]
            return output + (output @ self.wide).mean(-1, keepdim=True)

    options = Options(("onnx",), verify=False)
    result = export(Large(), {"x": f"1,4,{WIDTH}"}, tmp_path / "o", options=options)
    data = result.directory / "model.onnx.data"
    assert data.stat().st_size > 2 << 30
    import onnxruntime

    session = onnxruntime.InferenceSession(result.directory / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": np.ones((1, 4, WIDTH), np.float32)})
    assert np.isfinite(got).all()


def test_too_little_memory_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaattn.export.prepare.free_memory", lambda: 1000)
    stages: list[str] = []
    with pytest.raises(ConfigError, match="takes about 0 GiB beside it, for its float64 copies, and 0 GiB are free"):
        export(adaattn.DenseAttention(8, 2), output_dir=tmp_path / "out", on_stage=stages.append)
    assert stages == []
    assert list(tmp_path.iterdir()) == []
    options = Options(("onnx",), verify=False)
    assert export(adaattn.DenseAttention(8, 2), output_dir=tmp_path / "out", options=options).directory.exists()
