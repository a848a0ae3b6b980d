"""Models as people write them pass at all sizes that they take, at every opset: their masks and their guards."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from adaattn.export import Options, export
from adaattn.export.capture.captured import Captured
from adaattn.export.capture.module import capture_module
from adaattn.export.engines import options as engine_options
from adaattn.export.golden.cases import cases
from adaattn.export.golden.eager import EagerReference
from adaattn.export.onnx.lower import lower
from adaattn.export.onnx.save import save
from adaattn.export.parity import compare
from adaattn.export.parity.golden_case import GoldenCase
from adaattn.export.verification import backends
from adaattn.input_spec import InputSpec
from tests.support.attention_models import ORDINARY


@functools.cache
def captured(name: str, dtype: str = "float32") -> tuple[Captured, list[GoldenCase]]:
    kind = ORDINARY[name]
    model = kind.build().to(getattr(torch, dtype))
    found = capture_module(model, [InputSpec.parse(*item) for item in kind.inputs.items()], {})
    reference = EagerReference(found)
    return found, [reference.golden(reference.expect(case), ()) for case in cases(found)]


OPSETS = [*(pytest.param(opset, marks=pytest.mark.thorough) for opset in (18, 22, 23)), 24]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", ORDINARY)
def test_every_opset_passes(name: str, dtype: str, opset: int, tmp_path: Path) -> None:
    found, goldens = captured(name, dtype)
    assert {dim.name: str(dim) for dim in found.dims.values()} == ORDINARY[name].dims
    names = {symbol: dim.name for symbol, dim in found.dims.items()}
    lowered = lower(found.program, opset, names, [item.name for item in found.inputs], found.output_names)
    save(lowered.graph, tmp_path / "model.onnx")
    verdict = compare.compare(goldens, backends.onnxruntime_backend(tmp_path / "model.onnx"))
    assert verdict["verdict"] == "passed", verdict["reason"]
    sizes = {case.name: case.shapes for case in goldens}
    assert {"shortest", "odd", "longest"} <= set(sizes)


@pytest.mark.parametrize(
    "name", [name if name == "padded encoder" else pytest.param(name, marks=pytest.mark.thorough) for name in ORDINARY]
)
def test_default_options_verify_the_file_and_build_an_engine(name: str, tmp_path: Path) -> None:
    if not engine_options.installed("tensorrt-rtx"):
        pytest.skip("tensorrt-rtx is not installed")
    result = export(ORDINARY[name].build(), ORDINARY[name].inputs, tmp_path / "out", options=Options(("tensorrt-rtx",)))
    verdicts = {target["name"]: (target["verdict"], target["reason"]) for target in result.report["targets"]}
    assert result.passed, verdicts
    assert result.report["dims"] == ORDINARY[name].dims
    assert verdicts["tensorrt-rtx"][0] != "failed", verdicts
    assert (tmp_path / "out" / "tensorrt-rtx.engine").stat().st_size > 0
