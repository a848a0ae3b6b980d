"""TensorRT-RTX engines of each module, built with no GPU, and reports of the builder's failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
import torch
from torch import nn

import adaattn
from adaattn.errors import ConfigError, TargetError
from adaattn.export import Options, export
from adaattn.export.engines import build as engine_build
from adaattn.export.engines import options as engine_options
from adaattn.export.parity import compare
from adaattn.export.parity.golden_case import GoldenCase
from adaattn.export.verification import backends
from benchmarks.models import DIMS, MODELS, build

pytestmark = pytest.mark.skipif(not engine_options.installed("tensorrt-rtx"), reason="tensorrt-rtx is not installed")

BOTH = "both, grouped keys, causal"
MODULES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "dense": (adaattn.DenseAttention, {"causal": True}),
    "precision": (adaattn.AdaptivePrecisionAttention, {}),
    "int8_fp8": (adaattn.AdaptivePrecisionAttention, {"default_precision": "int8_fp8"}),
    "entropy": (adaattn.AdaptiveRankAttention, {}),
    "power": (adaattn.AdaptiveRankAttention, {"rank_estimation_method": "power"}),
    "random": (adaattn.AdaptiveRankAttention, {"rank_estimation_method": "random"}),
    BOTH: (adaattn.AdaptiveAttention, {"num_kv_heads": 2, "causal": True}),
}
ONNX = Options(("onnx",), opset=22, verify=False)
INPUTS = {"query": "B,S,64", "key": "B,K,64", "value": "B,K,64"}


ENGINES = [*((name, "none") for name in MODULES), (BOTH, "padding"), (BOTH, "additive")]
USUAL = (("dense", "none"), ("int8_fp8", "none"), (BOTH, "padding"))


@pytest.mark.parametrize(
    ("name", "mask"), [pytest.param(*each, marks=() if each in USUAL else pytest.mark.thorough) for each in ENGINES]
)
def test_engine_of_each_module(name: str, mask: str, tmp_path: Path) -> None:
    kind, options = MODULES[name]
    inputs = dict(INPUTS)
    if mask != "none":
        inputs["attention_mask"] = "B,K:bool" if mask == "padding" else "B,4,S,K"
    made = export(
        kind(64, 4, **options),
        inputs,
        tmp_path / "out",
        dims={"S": "1:64:256", "K": "1:64:256"},
        options=Options(("tensorrt-rtx",), verify=False),
    )
    target = made.report["targets"][1]
    assert target["verdict"] == "not run", target["reason"]
    assert (made.directory / "tensorrt-rtx.engine").stat().st_size > 10_000
    assert made.report["opset"] == 23


@pytest.mark.thorough
def test_two_layers_in_half_precision(tmp_path: Path) -> None:
    model = adaattn.Encoder(64, 4, ("adaptive", "adaptive"))
    made = export(model, output_dir=tmp_path / "out", options=Options(("tensorrt-rtx",), dtype="float16"))
    onnx_target, engine_target = made.report["targets"]
    assert made.passed, made.report["targets"]
    assert onnx_target["verdict"] == "passed"
    reason = engine_target["reason"]
    assert torch.cuda.is_available() or reason == "built, not run: a CUDA driver finds no GPU on this machine"


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_rotary_embeddings_and_norms_of_a_batch_build(tmp_path: Path) -> None:
    """From opset 23 on ONNX has operators for them, which TensorRT-RTX does not broadcast over a batch."""
    entry = MODELS["Llama"]
    inputs = dict(given.split("=", 1) for given in entry.inputs)
    options = Options(("tensorrt-rtx",), verify=False)
    made = export(build(entry), inputs, tmp_path / "out", dims={name: DIMS[name] for name in "BS"}, options=options)
    assert made.report["targets"][1]["verdict"] == "not run", made.report["targets"]


def test_newest_opset_builds_too(tmp_path: Path) -> None:
    """What is float32 is no Attention node at any opset: no fused kernel takes it."""
    options = Options(("tensorrt-rtx",), opset=24, verify=False)
    made = export(adaattn.DenseAttention(64, 4), INPUTS, tmp_path / "out", options=options)
    assert [each["reason"] for each in made.report["targets"]] == ["made, not verified: --no-verify"] * 2
    assert made.report["verdict"] == "not run"


def test_a_builder_that_refuses_fails_its_target_alone(tmp_path: Path) -> None:
    build = engine_options.BuildOptions(compute_capabilities=("7.5",))  # for which it has no products of float32
    options = Options(("onnx", "tensorrt-rtx"), build=build)
    made = export(adaattn.DenseAttention(64, 4), INPUTS, tmp_path / "out", options=options)
    assert not made.passed
    onnx_target, engine_target = made.report["targets"]
    assert onnx_target["verdict"] == "passed"
    assert engine_target["verdict"] == "failed"
    assert "FP32" in engine_target["reason"]
    assert {file.name for file in made.directory.iterdir()} >= {"model.onnx", "tensorrt-rtx.log"}
    assert not (made.directory / "tensorrt-rtx.engine").exists()


def test_the_log_says_which_node_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    graph = '<ir_version: 10, opset_import: ["" : 18]> g (float[3,4] x) => (int64[2,N] y) { y = NonZero(x) }'
    onnx.save(onnx.parser.parse_model(graph), model)
    with pytest.raises(TargetError, match="NonZero"):
        engine_build.engine_from_onnx(model, "tensorrt-rtx", tmp_path / "e.engine", [{"x": ((3, 4),) * 3}])


def test_an_engine_says_what_it_is(tmp_path: Path) -> None:
    made = export(adaattn.Encoder(64, 4, ("adaptive",)), {"x": "B,S,64"}, tmp_path / "out", options=ONNX)
    profiles = [{"x": ((1, 1, 64), (1, size, 64), (2, 4 * size, 64))} for size in (8, 32)]
    shares: list[float] = []
    options = engine_options.BuildOptions(compute_capabilities=("8.9",), optimization_level=1, workspace=256)
    file = tmp_path / "model.engine"
    info = engine_build.engine_from_onnx(
        made.directory / "model.onnx",
        "tensorrt-rtx",
        file,
        profiles,
        options,
        on_progress=lambda phase, share: shares.append(share),
    )
    assert sorted(path.name for path in tmp_path.glob("model.*")) == ["model.engine", "model.engine.json", "model.log"]
    assert info.compute_capabilities == ["8.9"]
    assert [x.shape for x in info.inputs] == [[-1, -1, 64]]
    assert [each["x"][2] for each in info.profiles] == [[2, 32, 64], [2, 128, 64]]
    assert len(info.ops) == 5  # moments of q, k and v, the plan, and the layer that is named after its module
    assert set(info.ops.values()) <= {"body", "unknown"}
    assert (info.target, info.model) == ("tensorrt-rtx", "out/model.onnx")
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_options_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    for given, said in (
        ({"plugins": "rust"}, "plugins is 'rust'"),
        ({"plugins": "native"}, "adaattn-plugins build"),
        ({"hardware_compatible": True}, "hardware_compatible needs plugins='none'"),
        ({"optimization_level": 6}, "choose 0 to 5"),
        ({"workspace": 0}, "give MiB"),
    ):
        with pytest.raises(ConfigError, match=said):
            engine_options.BuildOptions(**given)
    with pytest.raises(ConfigError, match="target 'openvino' is unknown"):
        engine_build.engine_from_onnx(tmp_path / "m.onnx", "openvino", tmp_path / "m.engine", [])
    options = engine_options.BuildOptions(timing_cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match="timing_cache applies only to targets tensorrt; selected targets:"):
        engine_build.engine_from_onnx(tmp_path / "m.onnx", "tensorrt-rtx", tmp_path / "m.engine", [], options)
    for targets, given, said in (
        (
            ("onnx", "tensorrt-rtx"),
            {"build": engine_options.BuildOptions(plugins="none")},
            "plugins applies only to targets tensorrt",
        ),
        (
            ("onnx",),
            {"build": engine_options.BuildOptions(workspace=1)},
            "workspace applies only to targets tensorrt, tensorrt-rtx",
        ),
        (("onnx",), {"profiles": ({"S": "1:1:1"},)}, "profiles apply only to targets tensorrt, tensorrt-rtx"),
        (
            ("tensorrt",),
            {"build": engine_options.BuildOptions(strip_weights=True), "serve": ("triton",)},
            "strip_weights does not go with",
        ),
        (("onnx",), {"serve": ("onnxruntime",)}, "serve onnxruntime applies only to target tensorrt"),
        (("onnx",), {"serve": ("torchserve",)}, "serve 'torchserve' is unknown; choose one of triton, onnxruntime"),
    ):
        with pytest.raises(ConfigError, match=said):
            Options(targets, **given)
    both = engine_options.BuildOptions(
        plugins="none", hardware_compatible=True, compute_capabilities=("8.9",), workspace=9
    )
    assert both.taken_by("tensorrt-rtx") == engine_options.BuildOptions(compute_capabilities=("8.9",), workspace=9)
    assert both.taken_by("tensorrt").given() == ["plugins", "workspace", "hardware_compatible"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_what_is_missing_is_said_with_the_versions_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    said = r"on the GPU that runs it, and there is none here \(tensorrt .*, no GPU that a CUDA driver finds\)"
    with pytest.raises(TargetError, match=said):
        engine_build.engine_from_onnx(tmp_path / "m.onnx", "tensorrt", tmp_path / "m.engine", [])
    # TensorRT-RTX needs a GPU to make an engine without weights.
    made = export(nn.Linear(8, 8), {"input": "B,8"}, tmp_path / "out", options=ONNX)
    options, shapes = engine_options.BuildOptions(strip_weights=True), {"input": ((1, 8), (1, 8), (8, 8))}
    model, file = made.directory / "model.onnx", tmp_path / "m.engine"
    with pytest.raises(TargetError, match=r"tensorrt_rtx \d.*, no GPU"):
        engine_build.engine_from_onnx(model, "tensorrt-rtx", file, [shapes], options)
    assert not file.exists()


def test_cases_that_no_profile_takes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification of an engine with narrow profiles, eager PyTorch in the engine's place."""
    model = nn.Linear(8, 8)
    ran: list[str] = []

    def backend(path: Path, log: Path, plugin_library: Path | None) -> compare.Backend:
        def run(of: GoldenCase) -> compare.BackendResult:
            ran.append(of.name)
            with torch.no_grad():
                return compare.BackendResult({"output": model(torch.from_numpy(of.inputs["input"])).numpy()}, {}, {})

        return run

    monkeypatch.setattr(backends, "engine_backend", backend)
    options = Options(("tensorrt-rtx",), profiles=({"B": "1:1:2"}, {"B": "4:7:7"}))
    made = export(model, {"input": "B,8"}, tmp_path / "out", dims={"B": "1:5:30"}, options=options)
    target = made.report["targets"][1]
    assert (target["verdict"], ran) == ("passed", ["shortest", "odd", "outliers"])
    assert target["reason"] == "not run on the golden inputs short, longest, which no profile takes"
    options = Options(("tensorrt-rtx",), profiles=({"B": "2:2:2"},))
    target = export(model, {"input": "B,8"}, tmp_path / "b", dims={"B": "1:5:30"}, options=options).report["targets"][1]
    assert target["verdict"] == "not run"
    assert target["reason"].startswith("built, not run: no profile takes the golden inputs shortest, ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="an engine runs only on a GPU")
def test_engine_agrees_with_eager(tmp_path: Path) -> None:
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    if capability not in engine_options.RTX_COMPUTE_CAPABILITIES:
        pytest.skip(f"TensorRT-RTX has no engine for compute capability {capability}")
    made = export(adaattn.Encoder(64, 4, ("adaptive", "adaptive")), output_dir=tmp_path / "out")
    assert made.passed, made.report["targets"]
    assert made.report["targets"][1]["verdict"] == "passed"
