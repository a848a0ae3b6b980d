"""The command as a whole: what it prints, where it writes, and that it ends cleanly whatever ends it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
import torch

import adaattn
from adaattn.export.artifacts import folder
from adaattn.export.cli import export as export_command
from adaattn.export.engines import options as engine_options
from tests.support import models
from tests.support.cli import alive, refused, run, start

LINEAR = ("tests.support.models:linear", "--input", "input=B,16")
QUICK = ("-q", "--target", "onnx", "--no-verify")
INTERRUPTED = "adaattn-export: interrupted; nothing was written"


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    adaattn.save(models.tiny(), path, inputs={"x": "B,S,16"}, dims={"S": "1:9:17"})
    return path


def test_help_names_every_option_and_imports_nothing_heavy() -> None:
    code = f"""if True:
        import sys
        from adaattn.export.cli.export import main
        status = main({["--help"]!r}, standalone_mode=False)
        heavy = {{"torch", "numpy", "onnx", "onnxruntime", "rich", "jinja2", "matplotlib", "sympy"}}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    words = done.stdout.split()
    for option in export_command.main.params:
        if isinstance(option, click.Option):
            assert all(name.rstrip(",") in words or f"{name}," in words for name in option.opts), option.opts
            assert option.help
    for example in ("model.pt", "program.pt2", "package.module:factory", "Exit status"):
        assert example in done.stdout


def test_a_user_exports_a_model(model: Path, tmp_path: Path) -> None:
    process = start(model, "--target", "onnx", folder=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    stages = [line.split()[0] for line in err.splitlines()]
    assert stages == ["import", "load", "capture", "attention", "onnx", "eager", "verify", "report"]
    heading, row, compared, attention, last = out.splitlines()
    assert heading.split() == ["target", "verdict", "error", "eager's", "limit", "size", "time"]
    assert row.split()[:2] == ["onnx", "passed"]
    assert compared.startswith("onnx: compared 5 cases, ")
    assert attention == "attention: 1 of 1 attentions are adaptive"
    assert last == "passed  model-export/report.html"
    assert os.listdir(tmp_path) == ["model-export"]


def test_torch_adds_nothing_to_the_one_line(model: Path, tmp_path: Path) -> None:
    process = start(model, "--input", "x=B,S,15", "-q", folder=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "x (B=3, S=4, 15:float32)" in err
    assert os.listdir(tmp_path) == []


def ended(process: subprocess.Popen[str], tmp_path: Path) -> None:
    """Assert that a process which was interrupted says so and leaves nothing, on the disk or running."""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.splitlines()[-1] == INTERRUPTED
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir() if path.name != "packages"] == []
    assert alive(process) == []


@pytest.mark.parametrize("name", [pytest.param("Interrupted", marks=pytest.mark.thorough), "Terminated"])
def test_a_signal_while_the_model_is_captured(name: str, tmp_path: Path) -> None:
    ended(start(f"tests.support.models:{name}", "--input", "x=B,S", "--target", "onnx", folder=tmp_path), tmp_path)


def test_ctrl_c_while_parts_of_torch_are_still_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "export", interrupted)
    monkeypatch.delattr(torch, "_dynamo")
    refused(run(*LINEAR, *QUICK), "interrupted; nothing was written")
    assert os.listdir() == []


# Builders are C++ and do not answer Ctrl-C; this one sees to it that there is one to kill.
STUBBORN = """
import os, signal
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
with open(f"/proc/{{os.getppid()}}/stat") as file:
    command = int(file.read().rpartition(")")[2].split()[1])
{send}
signal.pause()
"""


@pytest.mark.parametrize(
    "send",
    [
        "os.killpg(command, signal.SIGINT)",
        pytest.param("os.kill(command, signal.SIGTERM)", marks=pytest.mark.thorough),
        pytest.param("os.kill(command, signal.SIGHUP)", marks=pytest.mark.thorough),
    ],
)
def test_a_signal_while_an_engine_is_built(send: str, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "tensorrt_rtx.py").write_text(STUBBORN.format(send=send))
    ended(start(*LINEAR, "--target", "tensorrt-rtx", "-o", "a/b/out", folder=tmp_path, path=packages), tmp_path)


def test_json_is_alone_on_standard_output(tmp_path: Path) -> None:
    result = run("tests.support.models:talkative", "--input", "input=B,16", "--target", "onnx", "--json", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert result.stderr == "a factory may print\n"


def test_quiet_prints_nothing() -> None:
    result = run(*LINEAR, *QUICK, "-o", "out")
    assert (result.exit_code, result.output) == (0, "")


def test_a_crash_of_the_builder_fails_its_target_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\necho the last words\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    monkeypatch.setattr(engine_options, "installed", lambda target: True)
    result = run(*LINEAR, "--target", "tensorrt-rtx", "-o", "out")
    assert result.exit_code == 1
    assert "crashed with SIGSEGV" in " ".join(result.stdout.split())
    onnx, rtx = json.loads((tmp_path / "out" / "report.json").read_text())["targets"]
    assert (onnx["verdict"], rtx["verdict"]) == ("passed", "failed")
    assert (tmp_path / "out" / "tensorrt-rtx.log").read_text() == "the last words\n"
    expected = {
        "golden.npz",
        "manifest.json",
        "model.onnx",
        "report.html",
        "report.json",
        "tensorrt-rtx.log",
        "trace.npz",
    }
    assert set(os.listdir("out")) == expected


def test_a_package_that_is_missing_fails_its_target_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_options, "installed", lambda target: False)
    result = run(*LINEAR, "--target", "tensorrt", "--no-verify", "-o", "out")
    assert result.exit_code == 1
    said = " ".join(result.stdout.split())
    assert "tensorrt is not installed: pip install 'adaattn[tensorrt]', on a machine with an NVIDIA GPU" in said
    assert (Path("out") / "model.onnx").exists()


def test_a_gpu_that_there_is_not_is_refused_before_the_export(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    for given in ("8.9,99.9", "banana", "8.9\x1b[2J", "9" * 5000):
        refused(run(*LINEAR, *QUICK, "--target", "tensorrt-rtx", "--compute-capability", given), "8.6, 8.9, 12.0")
    refused(run(*LINEAR, *QUICK, "--target", "tensorrt-rtx", "--workspace", 2**60), "give MiB, 1 to 8796093022207")
    assert os.listdir(tmp_path) == []


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is full after so many bytes; for want of one, a limit to the size of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "arguments"),
    [(50_000, ()), (2_000, ("--external-data-threshold", "100")), (90_000, ("--dim", "S=1:9:700"))],
    ids=["model.onnx", "model.onnx.data", "golden.npz"],
)
def test_a_full_disk(size: int, arguments: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    with files_of_at_most(size):
        result = run(model, "-q", "--target", "onnx", "-o", "a/out", *arguments)
    refused(result, "File too large; nothing was written")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("out", "arguments", "words"),
    [
        ("file", (), ["file is a file", "give a folder"]),
        ("file/out", (), ["file is a file", "give a folder"]),
        ("full", (), ["full exists", "--force"]),
        ("full", ("--force",), ["holds no manifest.json", "--force would delete it"]),
        (".", ("--force",), ["current folder", "give a folder in it"]),
        ("..", ("--force",), ["current folder", "give a folder in it"]),
        ("/", ("--force",), ["mount point", "give a folder in it"]),
        ("/proc/out", (), ["/proc/out cannot be made: ", "give another folder"]),
    ],
)
def test_folders_that_cannot_be_written(
    out: str, arguments: tuple[str, ...], words: list[str], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    refused(run(model, *QUICK, "-o", out, *arguments), *words)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["file", "full", "full/mine"]


def test_an_export_replaces_an_earlier_one_only_by_force_and_only_when_done(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")  # results often live on another disk
    assert run(*LINEAR, *QUICK, "-o", "out").exit_code == 0
    before = (tmp_path / "out" / "manifest.json").read_text()
    refused(run(*LINEAR, *QUICK, "-o", "out"), "out exists", "--force")
    refused(run("tests.support.models:Nothing", "--input", "x=B", *QUICK, "-o", "out", "--force"), "returns no tensor")
    assert (tmp_path / "out" / "manifest.json").read_text() == before
    (tmp_path / "out" / "mine").touch()
    refused(run(*LINEAR, *QUICK, "-o", "out", "--force"), "out holds mine, which no export wrote there")
    (tmp_path / "out" / "mine").unlink()
    assert run(*LINEAR, *QUICK, "-o", "out", "--force").exit_code == 0
    assert (tmp_path / "out" / "manifest.json").read_text() != before
    assert (tmp_path / "out").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["out", "there"]


def test_an_error_that_nobody_foresaw_is_one_line_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr("adaattn.export.artifacts.folder.check_output", broken)
    refused(run(model, *QUICK), "unexpected KeyError: 'a\\nb' (-v shows where)")


@pytest.mark.parametrize(
    ("name", "out"),
    [("a/model.pt", "model-export"), ("shop.models:ranker", "ranker-export"), ("m.v2.pt2", "m.v2-export")],
)
def test_the_folder_is_named_after_the_model(name: str, out: str) -> None:
    assert f"{folder.model_name(name)}-export" == out
