"""`adaattn-parity` as its user meets it, and `assert_parity` in a user's own tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import numpy_helper
from torch import nn

import adaattn
from adaattn.errors import ConfigError
from adaattn.export.check import main
from adaattn.export.testing import assert_parity as assert_directly

pytest_plugins = ["pytester"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "out"
    torch.manual_seed(3)
    model = adaattn.Encoder(16, 2, ("adaptive",)).eval()
    return adaattn.export.export(model, {"x": "B,S,16"}, folder, options=adaattn.export.Options(("onnx",))).directory


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    """The same with a weight of its last layer that is not the model's."""
    folder = Path(shutil.copytree(good, tmp_path / "bad"))
    model = onnx.load(folder / "model.onnx")
    bias = next(x for x in model.graph.initializer if x.name == "stack.0.mlp.2.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias)[::-1].copy(), bias.name))
    onnx.save(model, folder / "model.onnx")
    return folder


def test_a_good_folder_passes_and_says_what_did_not_run(good: Path, tmp_path: Path) -> None:
    result = run(good, "--junit", tmp_path / "junit.xml", "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1][:2] == ["ort-cpu", "passed"]
    assert lines[-1] == ["passed", str(tmp_path / "page.html")]
    assert "Side by side" in (tmp_path / "page.html").read_text()
    suites = {suite.get("name"): suite for suite in ElementTree.parse(tmp_path / "junit.xml").getroot()}
    assert suites["ort-cpu"].attrib == {"name": "ort-cpu", "tests": "5", "failures": "0", "skipped": "0"}
    assert [case.get("classname") for case in suites["ort-cpu"]][:2] == ["ort-cpu.shortest", "ort-cpu.short"]
    if "ort-cuda" in suites and suites["ort-cuda"].get("skipped") == "1":
        assert "CUDAExecutionProvider" in suites["ort-cuda"][0][0].get("message", "")


def test_a_bad_folder_fails_by_number_and_by_name(bad: Path, tmp_path: Path) -> None:
    result = run("check", bad, "--backend", "ort-cpu", "--json", "--junit", tmp_path / "junit.xml")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    (target,) = report["targets"]
    assert (report["verdict"], target["name"], target["verdict"]) == ("failed", "ort-cpu", "failed")
    assert "over the limit" in target["reason"]
    (suite,) = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert int(suite.get("failures", 0)) == 5
    assert "over the limit" in suite[0][0].get("message", "")

    found = run("bisect", bad, "-o", tmp_path / "part.onnx")
    assert found.exit_code == 1
    assert "linear_5 departs: error" in found.stdout
    assert "Add node_linear_5" in found.stdout
    part = onnx.load(tmp_path / "part.onnx")
    assert [node.op_type for node in part.graph.node][-1] == "Add"
    onnx.checker.check_model(part)


def test_bisect_finds_nothing_in_a_good_folder(good: Path, tmp_path: Path) -> None:
    result = run("bisect", good, "-o", tmp_path / "part.onnx")
    assert (result.exit_code, result.stdout) == (0, "no output departs on the small case\n")
    assert not (tmp_path / "part.onnx").exists()


def test_what_cannot_be_checked_is_one_line(good: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((tmp_path,), "holds no manifest.json; give a folder that adaattn-export made"),
        ((good, "--backend", "ort-tpu"), "backend 'ort-tpu' is unknown; choose of ort-cpu"),
        (("bisect", tmp_path), "trace.npz holds no trace of eager PyTorch"),
        ((good, "--junit", tmp_path / "none" / "j.xml"), "No such file"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.splitlines()
        assert line.startswith("adaattn-parity: ")
        assert said in line
    assert run(good, "--backend", "tensorrt").exit_code == 1  # nothing could run
    assert run(tmp_path / "none").exit_code == 2


def test_neither_the_model_nor_torch_is_needed(good: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # an import of it fails
from adaattn.export.check import main
try:
    main([{str(good)!r}, "--backend", "ort-cpu"])
except SystemExit as end:
    assert end.code == 0, end.code
try:
    main(["bisect", {str(good)!r}])
except SystemExit as end:
    assert not end.code, end.code
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_user_asserts_parity(assert_parity: Callable[..., Any], adaattn_export: Callable[..., Path]) -> None:
    report = assert_parity(nn.Linear(8, 4), {"input": "B,8"})
    assert report["verdict"] == "passed"
    folder = adaattn_export(nn.Linear(8, 4), {"input": "B,8"})
    assert assert_parity(folder, backends=["ort-cpu"])["verdict"] == "passed"
    with pytest.raises(AssertionError, match=r"tensorrt: there is no tensorrt\.engine"):
        assert_parity(folder, backends=["ort-cpu", "tensorrt"])


def test_a_failed_assertion_names_the_outputs(bad: Path) -> None:
    with pytest.raises(AssertionError, match=r"ort-cpu: output \(shortest\): .*\n  output on shortest: error .*over"):
        assert_directly(bad, backends=["ort-cpu"])
    with pytest.raises(ConfigError, match="manifest"):
        assert_directly(bad.parent)


def test_pytest_brings_the_fixtures(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_mine(assert_parity, adaattn_export): assert callable(assert_parity)")
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
