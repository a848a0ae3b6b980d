"""What all four commands have in common: one line for an error, its status, and names that are never markup.

One file, though long: every table runs over all four commands.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from adaattn.command_line import LONGEST, Command, one_line, printable, verbose_option
from adaattn.errors import ConfigError
from adaattn.export.artifacts import manifest
from adaattn.export.artifacts.arrays import save_arrays
from adaattn.export.artifacts.files import mismatch
from adaattn.export.cli import export as export_command
from adaattn.export.cli import parity as parity_command
from adaattn.export.cli import run as run_command
from adaattn.export.parity import compare, golden_case
from adaattn.export.report import console, junit
from adaattn.export.serving import triton_server
from adaattn.plugins.native import cli as plugins

COMMANDS = {
    "adaattn-export": export_command.main,
    "adaattn-parity": parity_command.main,
    "adaattn-run": run_command.main,
    "adaattn-plugins": plugins.main,
}
HOSTILE = "[/x][bold]\x1b[2J\x07 \"';<b>&\\ $\\frac{1}{2}$ \u202e\nbackend: \x00"


def call(name: str, *arguments: object) -> Result:
    return CliRunner().invoke(COMMANDS[name], [str(argument) for argument in arguments])


def refused(result: Result, name: str, *words: str) -> None:
    """Assert status 2 and one line with these words."""
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{name}: ")
    assert line.isprintable()
    assert len(line) <= LONGEST + 20
    for word in words:
        assert word in line


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with model.onnx, which returns its input x (B, S) and its rows by numbers out of range."""
    folder = tmp_path_factory.mktemp("identity")
    nodes = [
        helper.make_node("Identity", ["x"], ["y"]),
        helper.make_node("Gather", ["x", "ids"], ["rows"], axis=0),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S"]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "rows")]
    graph = helper.make_graph(nodes, "identity", inputs, outputs)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), folder / "model.onnx"
    )
    return folder


def test_text_for_a_terminal() -> None:
    assert printable("a\x1b[31m\u202e\udcff\t×") == "a\\x1b[31m\\u202e\\udcff\\t×"
    assert one_line(" a\n\n b\x00 ") == "a b\\x00"
    long = one_line("x" * 10**6 + " do this")
    assert len(long) <= LONGEST
    assert " … " in long
    for character in map(chr, range(sys.maxunicode + 1)):
        assert printable(character).isprintable()


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_documents_its_statuses_and_refuses_what_it_does_not_know(name: str) -> None:
    done = call(name, "--help")
    assert done.exit_code == 0
    assert "Exit status" in done.stdout
    for status in (0, 2):
        assert f"\n  {status}  " in done.stdout.replace("\n    ", "\n  ")
    assert call(name, "-h").stdout == done.stdout
    assert call(name, "--version").stdout.startswith(name)
    refused(call(name), name, "Missing", "see --help")
    refused(call(name, f"--{HOSTILE}"), name, "see --help")
    sub = {"adaattn-plugins": ["build"], "adaattn-parity": ["check"]}.get(name, [])
    refused(call(name, *sub, "--nonsense"), name, "No such option")
    refused(call(name, *sub, HOSTILE.replace("\x00", ""), "--output"), name, "--output")
    assert "--verbose" in call(name, *sub, "--help").stdout


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("wrong\nin two lines"), "x: wrong in two lines"),
        (KeyError("a\nb"), "x: unexpected KeyError: 'a\\nb' (-v shows where)"),
        (EOFError("No data left in file"), "x: unexpected EOFError: No data left in file (-v shows where)"),
        (RecursionError("too deep"), "x: unexpected RecursionError: too deep (-v shows where)"),
        (MemoryError(), "x: there is too little memory: give smaller sizes"),
        (KeyboardInterrupt(), "x: interrupted"),
        (SystemExit(0), "x: the code of the model or of its data ended the program, with status 0"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "x: a/b: No such file"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "x: the output: Broken pipe"),
        (click.UsageError("Bad."), "x: Bad; see --help"),
        (click.Abort(), "x: interrupted"),
        (ConfigError("\x1b[31m" + "9" * 10**6), None),
    ],
)
def test_whatever_a_command_raises_is_one_line(error: BaseException, said: str | None) -> None:
    @click.command("x", cls=Command)
    @verbose_option
    def command() -> int:
        raise error

    result = CliRunner().invoke(command, [])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert said is None or line == said
    assert len(line) < LONGEST + 20
    assert "\x1b" not in line
    loud = CliRunner().invoke(command, ["-v"])
    assert loud.exit_code == 2
    assert "Traceback" in loud.stderr or isinstance(error, click.ClickException)
    assert loud.stderr.splitlines()[-1] == line


def test_warnings_and_logs_of_packages_are_shown_only_on_request() -> None:
    import logging
    import warnings

    @click.command("x", cls=Command)
    @verbose_option
    def command() -> int:
        warnings.warn("about its own code", UserWarning, stacklevel=1)
        return 1

    assert CliRunner().invoke(command, []).exit_code == 1
    with pytest.warns(UserWarning, match="its own code"):
        CliRunner().invoke(command, ["-v"])
    assert logging.root.manager.disable == logging.NOTSET


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path, **environment},
    )


def python(name: str) -> str:
    module = {"adaattn-plugins": "plugins.native.cli"}.get(name, f"export.cli.{name.removeprefix('adaattn-')}")
    return f"{sys.executable} -m adaattn.{module}"


@pytest.mark.parametrize("name", ["adaattn-run", pytest.param("adaattn-plugins", marks=pytest.mark.thorough)])
def test_output_that_goes_nowhere(name: str) -> None:
    done = shell(f"{python(name)} --help > /dev/full")
    assert (done.returncode, done.stderr) == (2, f"{name}: the output: No space left on device\n")
    done = shell(f"{python(name)} --help | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.strip() in ("0", "2")  # as the reader was there still, or not
    assert done.stderr in ("", f"{name}: the output: Broken pipe\n")
    for closed in (">&-", "2>&-", "2> /dev/full"):
        done = shell(f"{python(name)} --nonsense {closed}")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_an_ascii_terminal_gets_escapes(identity: Path) -> None:
    shutil.copytree(identity, "é")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    done = shell(f"{python('adaattn-run')} é --input x=2,3 --input ids=1", **ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    done = shell(f"{python('adaattn-run')} é --input ×=2,3", **ascii_only)
    assert done.returncode == 2
    assert done.stderr.isascii()
    assert done.stderr.count("\n") == 1


# ---- names from files


def report() -> dict[str, Any]:
    row = {"name": HOSTILE, "case": HOSTILE, "verdict": "failed", "reason": HOSTILE, "error": 1.0, "limit": None}
    target: dict[str, Any] = {"name": HOSTILE, "verdict": "failed", "reason": HOSTILE, "seconds": 1.0, "ops": None}
    target |= {
        "artifacts": [],
        "plans": None,
        "compared": None,
        "outputs": [row | {"eager_error": 1.0}],
        "heads": [],
        "histogram": None,
    }
    package = {"name": HOSTILE, "artifacts": [{"path": HOSTILE, "bytes": 1}], "command": HOSTILE}
    return {"verdict": "failed", "targets": [target], "serving": [package], "warnings": [HOSTILE]}


def test_names_are_text_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_report(report(), HOSTILE)
    out = capsys.readouterr().out
    assert "[/x][bold]" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_names_are_text_in_junit() -> None:
    root = ElementTree.fromstring(junit.junit_xml(report()))
    (case,) = root[0]
    assert case.get("name") == printable(HOSTILE)
    assert case[0].get("message") == printable(HOSTILE)


def test_names_are_text_in_the_configuration_of_a_server(tmp_path: Path) -> None:
    name = 'a" backend: "python'
    info = helper.make_tensor_value_info(f"x{name}\n", TensorProto.FLOAT, ["B", 3])
    graph = helper.make_graph([helper.make_node("Identity", [info.name], ["y"])], "g", [info], [info])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    config, *_ = triton_server.triton_repository(tmp_path / "triton", name, tmp_path / "model.onnx", {}, None)
    lines = config.read_text().splitlines()
    assert lines[:2] == ['name: "a\\" backend: \\"python"', 'backend: "onnxruntime"']
    assert [line.split("[")[0] for line in lines[3:]] == ["input ", "output "]
    assert r'name: "xa\" backend: \"python\n"' in lines[3]


def test_an_output_folder_may_have_any_name(tmp_path: Path) -> None:
    name = "[/x]\x1b[31m"
    done = call(
        "adaattn-export",
        "tests.support.models:linear",
        "--input",
        "input=B,16",
        "--target",
        "onnx",
        "--no-verify",
        "-o",
        name,
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "not run  [/x]\\x1b[31m/report.html"
    assert (tmp_path / name / "model.onnx").exists()


def test_quiet_says_why_a_target_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    from adaattn.export.engines import options as engine_options

    monkeypatch.setattr(engine_options, "installed", lambda target: False)
    arguments = ("tests.support.models:linear", "--input", "input=B,16", "--target", "tensorrt", "--no-verify", "-q")
    done = call("adaattn-export", *arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("adaattn-export: tensorrt: tensorrt is not installed: pip install")


# ---- adaattn-run


@pytest.fixture
def files(tmp_path: Path) -> None:
    """Files that are no arrays, each in its own way."""
    np.save("x.npy", np.ones((2, 3), np.float32))
    np.save("double.npy", np.ones((2, 3)))
    np.save("objects.npy", np.array([{}, None], object), allow_pickle=True)
    np.savez("archive.npy", x=np.ones(3))
    os.replace("archive.npy.npz", "archive.npy")
    Path("empty.npy").touch()
    Path("cut.npy").write_bytes(Path("x.npy").read_bytes()[:-1])
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 1000), }\n"
    Path("huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    os.mkfifo("pipe.npy")
    Path("endless.npy").symlink_to("/dev/zero")
    Path("loop.npy").symlink_to("loop.npy")
    Path("folder.npy").mkdir()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        *((f"x=@{name}.npy", [name]) for name in ("objects", "empty", "cut", "huge", "none")),
        *((f"x=@{name}.npy", ["is not a file"]) for name in ("pipe", "endless", "loop", "folder", "none")),
        ("x=@archive.npy", ["is an archive of arrays"]),
        ("x=@double.npy", ["x is float64(2, 3); expected x: float32(B, S)"]),
        *(
            (f"x={sizes}", ["such as 1,128,256"])
            for sizes in ("-1,9", "", "1,,2", "a", "1.5", "9" * 5000, "1,9\x1b[31m")
        ),
        ("x=1000000,1000000,1000", ["more than the memory of this machine"]),
        ("x=1,2,3", ["expected x: float32(B, S)"]),
        ("x", ["is not an input", "x: float32(B, S), ids: int64(N)"]),
        ("[/x]=1", ["is not an input"]),
        ("=1", ["is not an input"]),
        ("ids=3", ["ids is given twice"]),
    ],
)
def test_inputs_that_are_none(given: str, words: list[str], identity: Path, files: None) -> None:
    refused(call("adaattn-run", identity, "--input", "ids=2", "--input", given), "adaattn-run", *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "-1"], "-1 is not in the range"),
        (["--calls", "0"], "0 is not in the range"),
        (["--calls", "9" * 5000], "is not a valid integer"),
        (["-o", "none/out.npz"], "none/out.npz: No such file or directory"),
        (["-o", "."], "'.' is a directory"),
        (["-o", "/dev/full"], "it is a folder or a device"),
        (["--cuda-graph"], "cuda_graph is for engines"),
        (["--target", "tensorrt"], "tensorrt.engine does not exist"),
    ],
)
def test_arguments_of_a_run_that_cannot_be(arguments: list[str], words: str, identity: Path) -> None:
    inputs = ("--input", "x=2,3", "--input", "ids=2")
    refused(call("adaattn-run", identity, *inputs, *arguments), "adaattn-run", words)
    assert os.listdir() == []


def test_a_target_chooses_in_a_folder_alone(identity: Path) -> None:
    done = call("adaattn-run", identity / "model.onnx", "--input", "x=2,3", "--target", "tensorrt")
    refused(done, "adaattn-run", "chooses an artifact of a folder")


def test_what_onnxruntime_logs_is_in_the_error_alone(identity: Path, capfd: pytest.CaptureFixture[str]) -> None:
    np.save("ids.npy", np.array([7]))
    refused(
        call("adaattn-run", identity, "--input", "x=2,3", "--input", "ids=@ids.npy"), "adaattn-run", "indices element"
    )
    Path("bad.onnx").write_bytes(b"\x08\x09" + bytes(100))
    refused(call("adaattn-run", "bad.onnx", "--input", "x=2,3"), "adaattn-run", "ONNX Runtime refuses bad.onnx")
    broken = onnx.load(identity / "model.onnx")
    broken.graph.node[0].op_type = "NoSuchOp"
    onnx.save(broken, "broken.onnx")
    refused(call("adaattn-run", "broken.onnx", "--input", "x=2,3"), "adaattn-run", "NoSuchOp")
    assert capfd.readouterr() == ("", "")


def test_json_has_no_nan(identity: Path) -> None:
    np.save("x.npy", np.array([[np.nan, 1, np.inf]], np.float32))
    done = call("adaattn-run", identity, "--input", "x=@x.npy", "--input", "ids=0", "--json", "-o", "out.npz")
    assert (done.exit_code, done.stderr) == (0, "")

    def fail(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(done.stdout, parse_constant=fail)
    assert [(row["name"], row["mean"], row["finite"]) for row in found["outputs"]] == [
        ("y", None, False),
        ("rows", None, True),
    ]
    assert os.path.getsize("out.npz") > 0


def test_a_changed_artifact_is_not_silent(identity: Path) -> None:
    shutil.copytree(identity, "changed")
    about = {"files": {"model.onnx": {"bytes": 1, "sha256": "0"}, "model.onnx.data": {"bytes": 1, "sha256": "0"}}}
    Path("changed/manifest.json").write_text(json.dumps(about))
    done = call("adaattn-run", "changed", "--input", "x=2,3", "--input", "ids=2", "--json")
    assert done.exit_code == 0
    assert len(json.loads(done.stdout)["outputs"]) == 2
    line = "warning: model.onnx is not the file that was exported; model.onnx.data is missing"
    assert done.stderr == f"adaattn-run: {line}\n"


# ---- adaattn-plugins


@pytest.mark.parametrize("command", ["build", "onnxruntime"])
def test_files_that_are_no_onnx(command: str, identity: Path, files: None) -> None:
    Path("text.json").write_text("{}")
    Path("half.onnx").write_bytes((identity / "model.onnx").read_bytes()[:50])
    Path("noise.onnx").write_bytes(bytes(range(256)))
    for name, words in (
        *((name, "is no ONNX file") for name in ("text.json", "noise.onnx", "half.onnx", "empty.npy", "x.npy")),
        *((name, "is not a file") for name in ("pipe.npy", "endless.npy")),
        *((name, "does not exist") for name in ("none", "loop.npy")),
        ("folder.npy", "is a directory"),
        (identity / "model.onnx", "has no AdaAttn ops"),
    ):
        refused(call("adaattn-plugins", command, name), "adaattn-plugins", words)


def test_plugins_answer_usage_with_status_2() -> None:
    for arguments in (["nonsense"], ["build", "--arch", "ninety"], ["build", "--arch", "9" * 5000], ["onnxruntime"]):
        refused(call("adaattn-plugins", *arguments), "adaattn-plugins")


# ---- what a folder says


@pytest.mark.parametrize(
    ("schema", "value", "said"),
    [
        (int, 1, None),
        (int, True, "it is a bool"),
        (int, 1.5, "it is a float"),
        (manifest.NUMBER, None, None),
        (manifest.NUMBER, "1", "it is a str"),
        ([int], [1, "2"], "it[1] is a str"),
        ([int], {"0": 1}, "it is a dict"),
        ({str: int}, {"a": 1, "b": None}, "b is a NoneType"),
        ({"a": {"b": [int]}}, {"a": {"b": [1, 2, None]}, "c": 0}, "a.b[2] is a NoneType"),
        ({"a": int}, {}, "a is missing"),
        ((None, {"a": int}), {"a": ""}, "a is a str"),
    ],
)
def test_schemas(schema: Any, value: object, said: str | None) -> None:
    assert mismatch(value, schema) == said


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", '"x"', "NaN", "[" * 100_000, "9" * 5000, "\x00", "{}"])
def test_json_that_no_export_wrote(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    refused(call("adaattn-parity", tmp_path), "adaattn-parity", "manifest.json is not what adaattn-export wrote")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x"])
def test_a_manifest_lists_its_own_folder(name: str, tmp_path: Path) -> None:
    about = {"files": {name: {"bytes": 1, "sha256": "0"}}}
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    refused(call("adaattn-parity", tmp_path), "adaattn-parity", f"{name} is outside the folder")


@pytest.mark.parametrize("limit", [np.nan, -1.0, -np.inf])
def test_a_limit_that_is_none_passes_nothing(limit: float, tmp_path: Path) -> None:
    x = np.ones((2, 3))
    output = golden_case.ExpectedOutput(x, "float32", 0.0, limit)
    ran = compare.BackendResult({"y": x.astype(np.float32) * 2}, {}, {})
    given = golden_case.GoldenCase("case", {"x": x}, {"y": output})
    assert compare.compare([given], lambda case: ran)["verdict"] != "passed"
    golden_case.save(tmp_path / "golden.npz", [given])
    with pytest.raises(ConfigError, match="the limits of y are"):
        golden_case.load(tmp_path / "golden.npz")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("case/limit/y", np.zeros(2), "the limits of y are"),
        ("case/limit/y", np.zeros(4, np.int64), "the limits of y are"),
        ("case/output/y", np.zeros((2, 3), np.complex64), "y is complex64"),
        ("case/output/y", np.zeros((2, 3), np.float32), "y is float32"),
        ("case/dtype/y", np.array("int64"), "y is float64"),
        ("case/lost/y", np.zeros(3, bool), "y is float64"),
        ("case/layer.rank/a", np.zeros((1, 3)), "the rank of a has shape"),
        ("case/layer.eager_error/a", np.zeros((2, 2)), "the eager_error of a has shape"),
        ("case", np.zeros(3), "not enough values"),
    ],
)
def test_golden_results_that_do_not_fit_together(key: str, value: Any, said: str, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"case/input/x": np.ones(3), "case/output/y": np.ones((2, 3))}
    arrays |= {"case/limit/y": np.zeros(4), "case/dtype/y": np.array("float32")}
    arrays["case/about/fields"] = np.array(["", "", "False"])
    arrays |= {f"case/layer.{kind}/a": np.zeros((1, 2), np.int32) for kind in ("precision", "rank")}
    arrays |= {"case/layer.edge/a": np.zeros((1, 2), bool), "case/layer.eager_error/a": np.zeros(2)}
    save_arrays(tmp_path / "golden.npz", arrays)
    (case,) = golden_case.load(tmp_path / "golden.npz")
    assert list(case.layers) == ["a"]
    save_arrays(tmp_path / "golden.npz", arrays | {key: value})
    with pytest.raises(ConfigError, match=said):
        golden_case.load(tmp_path / "golden.npz")


def test_memory_that_there_is_not_is_one_line(identity: Path) -> None:
    np.save("x.npy", np.ones((2, 3), np.float32))
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    try:
        result = call("adaattn-run", identity, "--input", "x=20000,20000", "--input", "ids=1")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    refused(result, "adaattn-run", "there is too little memory")
    assert torch.ones(3).sum() == 3
