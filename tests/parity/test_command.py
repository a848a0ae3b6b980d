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

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import numpy_helper
from torch import nn

import adaattn
from adaattn.errors import ConfigError
from adaattn.export.artifacts.arrays import save_arrays
from adaattn.export.cli.parity import main
from adaattn.export.cli.run import main as run_main
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
    """Return the same with a weight of its last layer that is not the model's."""
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
    tests = suites["ort-cpu"].attrib.pop("tests")
    assert int(tests) == 19  # 5 cases, as planned and at fp32; the attention alone at 7 other plans; its plan alone
    assert suites["ort-cpu"].attrib == {"name": "ort-cpu", "failures": "0", "skipped": "0"}
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
    assert int(suite.get("failures", 0)) == 10  # not attention and plan by themselves, which have no weights
    assert "over the limit" in suite[0][0].get("message", "")

    found = run("bisect", bad, "-o", tmp_path / "part.onnx")
    assert found.exit_code == 1
    assert "linear_5, relative error" in found.stdout
    assert "Add node_linear_5" in found.stdout
    part = onnx.load(tmp_path / "part.onnx")
    assert [node.op_type for node in part.graph.node][-1] == "Add"
    onnx.checker.check_model(part)


def test_bisect_finds_nothing_in_a_good_folder(good: Path, tmp_path: Path) -> None:
    result = run("bisect", good, "-o", tmp_path / "part.onnx")
    assert (result.exit_code, result.stdout) == (0, "no output departs on the small case\n")
    assert not (tmp_path / "part.onnx").exists()


def test_bisect_says_where_it_cannot_look(good: Path, tmp_path: Path) -> None:
    renamed = Path(shutil.copytree(good, tmp_path / "renamed"))
    model = onnx.load(renamed / "model.onnx")
    model.graph.node.add(op_type="Identity", input=["output"], output=["other"])
    model.graph.output[0].name = "other"
    onnx.save(model, renamed / "model.onnx")
    result = run("bisect", renamed, "-o", tmp_path / "part.onnx")
    assert (result.exit_code, "has no output 'output', which the export had" in result.stderr) == (2, True)

    longer = Path(shutil.copytree(good, tmp_path / "longer"))
    model = onnx.load(longer / "model.onnx")
    (maker,) = (node for node in model.graph.node if "output" in node.output)
    maker.output[0] = "whole"
    # Wrong from the tenth token on: the small case has nine.
    for name, values in (("at", [0]), ("ten", [10]), ("end", [2**60]), ("axis", [1])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values), name))
    nodes = model.graph.node
    nodes.add(op_type="Slice", input=["whole", "at", "ten", "axis"], output=["first"])
    nodes.add(op_type="Slice", input=["whole", "ten", "end", "axis"], output=["rest"])
    nodes.add(op_type="Neg", input=["rest"], output=["wrong"])
    nodes.add(op_type="Concat", input=["first", "wrong"], output=["output"]).attribute.add(name="axis", i=1, type=2)
    onnx.save(model, longer / "model.onnx")
    result = run("bisect", longer, "-o", tmp_path / "part.onnx")
    assert result.exit_code == 1, result.output
    assert "no output departs on the small case\nbut on the golden inputs: output (" in result.stdout


def test_bisect_does_not_blame_rounding_where_outputs_are_integers(tmp_path: Path) -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.norm(x)).argmax(-1)

    folder = adaattn.export.export(
        Picks().eval(), {"x": "B,S,16"}, tmp_path / "out", options=adaattn.export.Options(("onnx",))
    ).directory
    model = onnx.load(folder / "model.onnx")
    bias = next(x for x in model.graph.initializer if x.name == "linear.bias")
    bias.CopyFrom(numpy_helper.from_array(np.arange(16, dtype=np.float32), bias.name))
    onnx.save(model, folder / "model.onnx")
    result = run("bisect", folder, "-o", tmp_path / "part.onnx")
    assert (result.exit_code, result.stdout.split()[:3]) == (1, ["first", "mismatch:", "linear,"]), result.output


@pytest.mark.parametrize("name", ["golden.npz", "trace.npz", "report.json", "manifest.json", "model.onnx"])
@pytest.mark.parametrize("left", [0, 0.5])
def test_files_that_were_cut_off_are_one_line(name: str, left: float, good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "cut"))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(left * len(content))])
    command = ["bisect", folder, "-o", tmp_path / "part.onnx"] if name == "trace.npz" else [folder]
    result = run(*command, "--backend", "ort-cpu")
    if name == "model.onnx":
        assert (result.exit_code, "ort-cpu: ONNX Runtime refuses" in result.stdout) == (1, True)
        result = run("bisect", folder, "-o", tmp_path / "part.onnx")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert name in line


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a case is gone": lambda arrays: [arrays.pop(name) for name in list(arrays) if name.startswith("longest/")],
    "limits are larger": lambda arrays: arrays.update({n: 10 * x for n, x in arrays.items() if "/limit/" in n}),
    "limits are none": lambda arrays: arrays.update({n: x * np.nan for n, x in arrays.items() if "/limit/" in n}),
    "cases are swapped": lambda arrays: arrays.update(dict(zip(arrays, reversed(arrays.values()), strict=True))),
    "all is zero": lambda arrays: arrays.update({n: np.zeros_like(x) for n, x in arrays.items() if "dtype" not in n}),
}


@pytest.mark.parametrize(
    ("name", "change"), [*(("golden.npz", change) for change in CHANGES), ("trace.npz", "all is zero")]
)
def test_changed_results_prove_nothing(name: str, change: str, good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "copy"))
    with np.load(folder / name) as archive:
        arrays = dict(archive)
    CHANGES[change](arrays)
    save_arrays(folder / name, arrays)
    command = ("bisect", folder, "-o", tmp_path / "part.onnx") if name == "trace.npz" else (folder,)
    result = run(*command, "--backend", "ort-cpu")
    said = f"{folder / name} is not the file that was exported; export the model again" in result.stderr
    assert (result.exit_code, said) == (2, True), result.output
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(*command, "--backend", "ort-cpu").exit_code == 2


@pytest.mark.parametrize("name", ["golden.npz", "manifest.json", "model.onnx", "../out/model.onnx"])
def test_an_output_replaces_no_file_of_the_export(name: str, good: Path) -> None:
    before = (good / name).read_bytes()
    for command in ((good, "--html"), (good, "--junit"), ("bisect", good, "-o")):
        result = run(*command, good / name)
        assert (result.exit_code, "is a file of the export" in result.stderr) == (2, True)
    ran = CliRunner().invoke(run_main, [str(good), "--input", "x=1,9,16", "-o", str(good / name)])
    assert (ran.exit_code, "is a file of the export" in ran.stderr) == (2, True)
    assert (good / name).read_bytes() == before


def test_an_edited_report_changes_no_verdict_and_is_told_of(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "copy"))
    report = json.loads((folder / "report.json").read_text())
    report["targets"], report["verdict"] = [], "failed"
    (folder / "report.json").write_text(json.dumps(report))
    result = run(folder, "--backend", "ort-cpu")
    assert result.exit_code == 0, result.stderr
    assert "warning: report.json is not the file that was exported" in result.stdout
    report["layers"][0]["rank"] = "all"
    (folder / "report.json").write_text(json.dumps(report))
    result = run(folder, "--backend", "ort-cpu")
    assert (result.exit_code, "layers[0].rank is a str" in result.stderr) == (2, True)


def test_another_models_results_are_no_crash(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "copy"))
    model = onnx.load(folder / "model.onnx")
    model.graph.node.insert(0, onnx.helper.make_node("Identity", ["renamed"], ["x"]))
    model.graph.input[0].name = "renamed"
    onnx.save(model, folder / "model.onnx")
    result = run(folder, "--backend", "ort-cpu")
    assert result.exit_code == 1
    assert "model.onnx has an input 'renamed', of which the golden results know nothing" in result.stdout


def test_junit_fails_where_the_command_does(good: Path, tmp_path: Path) -> None:
    result = run(good, "--backend", "tensorrt,tensorrt", "--junit", tmp_path / "junit.xml")
    assert result.exit_code == 1
    suites = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["tensorrt", "verdict"]
    assert suites[1].get("failures") == "1"


def test_a_provider_that_falls_back_to_the_cpu_has_not_run(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    from adaattn.system import cuda_driver

    if cuda_driver.capability() is not None:
        pytest.skip("for machines without a GPU")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(cuda_driver, "capability", lambda: 90)
    result = run(good, "--backend", "ort-cuda")
    assert result.exit_code == 1
    assert "CUDAExecutionProvider does not load here" in result.stdout
    result = run("bisect", good, "--backend", "ort-cuda")
    assert (result.exit_code, "CUDAExecutionProvider does not load here" in result.stderr) == (2, True)


def test_what_cannot_be_checked_is_one_line(good: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((tmp_path,), "holds no manifest.json; give a folder that adaattn-export made"),
        ((good, "--backend", "ort-tpu"), "backend 'ort-tpu' is unknown; choose one of ort-cpu"),
        (("bisect", tmp_path), "holds no manifest.json; give a folder that adaattn-export made"),
        ((good, "--junit", tmp_path / "none" / "j.xml"), f"{tmp_path / 'none' / 'j.xml'}: No such file"),
        (("bisect", good, "--backend", "ort-cuda"), "CUDAExecutionProvider"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.splitlines()
        assert line.startswith("adaattn-parity: ")
        assert said in line
    assert run(good, "--backend", "tensorrt").exit_code == 1  # nothing could run
    for arguments in (("--backend", " , "), ("--html", "same", "--junit", "same")):
        assert run(good, *arguments).exit_code == 2
    assert run(tmp_path / "none").exit_code == 2


def test_neither_the_model_nor_torch_is_needed(good: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # an import of it fails
from adaattn.export.cli.parity import main
from adaattn.export.parity.golden_case import save_arrays
from adaattn.export.cli.run import main as run_main
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


def test_an_assertion_needs_something_that_ran(assert_parity: Callable[..., Any], tmp_path: Path) -> None:
    model, inputs = nn.Linear(8, 4), {"input": "B,8"}
    with pytest.raises(AssertionError, match="onnx: made, not verified"):
        assert_parity(model, inputs, options=adaattn.export.Options(("onnx",), verify=False))
    with pytest.raises(AssertionError, match=r"tensorrt: there is no tensorrt\.engine"):
        assert_parity(model, inputs, backends=["ort-cpu", "tensorrt"])
    with pytest.raises(ConfigError, match="backend 'nonsense' is unknown"):
        assert_parity(model, inputs, backends=["nonsense"])
    with pytest.raises(ConfigError, match="give a list of names"):
        assert_parity(model, inputs, backends="ort-cpu")
    with pytest.raises(ConfigError, match="a folder is exported already"):
        assert_parity(tmp_path, inputs)


def test_a_failed_assertion_names_the_outputs(bad: Path) -> None:
    with pytest.raises(AssertionError, match=r"ort-cpu: output \(shortest at fp32\): .*\n  output on shortest: .*over"):
        assert_directly(bad, backends=["ort-cpu"])
    with pytest.raises(ConfigError, match="manifest"):
        assert_directly(bad.parent)


def test_pytest_brings_the_fixtures(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_mine(assert_parity, adaattn_export): assert callable(assert_parity)")
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
