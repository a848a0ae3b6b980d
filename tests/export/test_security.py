"""docs/security.md, line by line: a test for each, of the same name.

One file, though long: it follows the page, and a test at its end holds the two together.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import nn

import adaattn
from adaattn.errors import CheckpointError, ConfigError, TargetError
from adaattn.export.artifacts import folder
from adaattn.export.cli import parity as parity_command
from adaattn.export.cli import run as run_command
from adaattn.export.engines import build as engine_build
from adaattn.export.engines import description
from adaattn.export.engines import options as engine_options
from adaattn.export.engines.description import read_engine_info
from adaattn.export.engines.load import open_engine
from adaattn.export.parity import golden_case
from adaattn.export.runtime import open_runtime
from adaattn.plugins.native import build as builder
from adaattn.plugins.native.cli import main as plugins_command
from adaattn.plugins.native.onnxruntime_copy import for_onnxruntime
from adaattn.system import atomic_file, children, cuda_driver
from tests.support import models
from tests.support.cli import alive, refused, run, start
from tests.support.engine_files import described
from tests.support.paths import ROOT

LINEAR = ("tests.support.models:linear", "--input", "input=B,16", "--target", "onnx", "-q")
QUICK = (*LINEAR, "--no-verify")


class Trap:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("sprung",)


SPRING = "open('sprung', 'w').close()\n"


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    assert run(*LINEAR, "-o", out).exit_code == 0
    return out


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """Return an export that a test may change."""
    for path in exported.iterdir():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "out"


def parity(*arguments: object) -> Result:
    return CliRunner().invoke(parity_command.main, [str(argument) for argument in arguments])


def run_it(*arguments: object) -> Result:
    return CliRunner().invoke(run_command.main, [str(argument) for argument in arguments])


def not_sprung() -> bool:
    return not Path("sprung").exists()


def test_every_line_of_the_page_has_a_test_and_every_test_a_line() -> None:
    lines = re.findall(r"^- \*\*([a-z0-9-]+)\*\*: ", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
    assert len(lines) == len(set(lines))
    tests = [name.removeprefix("test_") for name in globals() if name.startswith("test_") and "every_line" not in name]
    assert sorted(lines) == sorted(name.replace("_", "-") for name in tests)


TRAPS = ("numpy", "torch", "click", "json", "pickle", "onnx", "onnxruntime", "adaattn", "polygraphy", "multiprocessing")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (
            "adaattn-export",
            ("tests.support.models:linear", "--input", "input=B,16", "--target", "tensorrt-rtx", "--no-verify"),
        ),
        pytest.param("adaattn-parity", ("out",), marks=pytest.mark.thorough),
        pytest.param("adaattn-run", ("out", "--input", "input=2,16"), marks=pytest.mark.thorough),
        pytest.param("adaattn-plugins", ("build", "--arch", "80", "--output", "x.so"), marks=pytest.mark.thorough),
    ],
)
def test_imports(command: str, arguments: tuple[str, ...], copied: Path, tmp_path: Path) -> None:
    """Traps of many names lie in the current folder; a package in the place of TensorRT-RTX says where it looks."""
    model = tmp_path / "model.pt"
    if command == "adaattn-export":  # a factory is imported from the current folder, a file is not
        adaattn.save(models.tiny(), model, inputs={"x": "B,S,16"})
        arguments = (str(model), *arguments[3:])
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "tensorrt_rtx.py").write_text("import numpy, sys; print('path', sys.path); sys.exit('[E] stop')")
    for name in TRAPS:
        (tmp_path / f"{name}.py").write_text(SPRING)
    process = start(*arguments, folder=tmp_path, path=packages, command=command)
    _, said = process.communicate(timeout=120)
    assert not_sprung(), said
    assert alive(process) == []
    if command == "adaattn-export":
        log = (tmp_path / "model-export" / "tensorrt-rtx.log").read_text()
        assert "[E] stop" in log, said
        assert str(tmp_path) not in log.replace(str(packages), "")
        assert "''" not in log
    # And there is no other way to start a process than `children`, which sees to it, and workers that are forked.
    allowed = {
        "adaattn/system/children.py": {"subprocess"},
        "adaattn/system/supervisor.py": {"os"},
        "plugins/native/build.py": set(),
    }
    for file in (path for home in ("adaattn", "export", "plugins") for path in (ROOT / home).rglob("*.py")):
        name, text = file.relative_to(ROOT).as_posix(), file.read_text()
        found = re.findall(
            r"\b(subprocess|os)\.(?:Popen|run|call|check_\w+|system|popen|exec\w+|spawn\w+|posix_spawn\w*)", text
        )
        assert set(found) <= allowed.get(name, set()), name
        assert "multiprocessing" not in text or name == "plugins/native/build.py", name
    assert 'get_context("fork")' in (ROOT / "plugins/native/build.py").read_text()


def test_pythonpath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "mine.py").write_text("print('from PYTHONPATH')")
    (tmp_path / "mine.py").write_text(SPRING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "named"))
    assert children.run([*children.python(), "-c", "import mine"]) == (0, "from PYTHONPATH\n")
    monkeypatch.delenv("PYTHONPATH")
    assert children.run([*children.python(), "-c", "import mine"])[0] == 1
    isolated = [sys.executable, "-I", "-c", "from adaattn.system import children; print(*children.python())"]
    said = subprocess.run(isolated, capture_output=True, text=True, check=True).stdout
    assert said.split()[1:] == ["-P", "-E", "-s"]  # what holds for the command holds for its processes
    assert not_sprung()


def test_environment() -> None:
    named = set()
    for file in (path for home in ("adaattn", "export", "plugins") for path in (ROOT / home).rglob("*.py")):
        for found in re.findall(r"os\.(?:environ|getenv)[^\n]*", file.read_text()):
            named |= set(re.findall(r"\"([A-Z_]{2,})\"", found))
    named -= {"POLYGRAPHY_USE_TENSORRT_RTX"}  # it is set, for another package
    line = re.search(r"\*\*environment\*\*: (.*?)\n- ", (ROOT / "docs/security.md").read_text(), re.DOTALL)
    assert line is not None
    assert named <= set(re.findall(r"[A-Z_]{2,}", line[1])), named
    steering = re.search(
        r'name in \((.*?)\) or name.startswith\("(.*?)"\)', (ROOT / "plugins/native/build.py").read_text()
    )
    assert steering is not None
    assert {*re.findall(r'"(\w+)"', steering[1]), steering[2]} <= set(re.findall(r"[A-Z_]{2,}", line[1]))


def test_network(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run(*LINEAR, "-o", "out").exit_code == 0
    assert parity(exported).exit_code == 0
    assert run_it(exported, "--input", "input=2,16").exit_code == 0
    assert run("hf:google/bert", "-q").exit_code == 2  # a folder, never a name on a hub


def test_signals(tmp_path: Path) -> None:
    """`tests/export/cli/test_signals.py` has all moments; here a scratch folder of a process that was killed."""
    code = "import os; from adaattn.system.atomic_file import scratch_folder as s\nwith s(): os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert (done.returncode, len(os.listdir(tmp_path))) == (-9, 1)
    with atomic_file.scratch_folder(tmp_path) as mine:
        assert os.listdir(tmp_path) == [mine.name]
    assert os.listdir(tmp_path) == []


def test_files(exported: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.touch(0o600)
    assert parity(exported, "--html", page).exit_code == 0
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    before = os.umask(0o027)
    try:
        assert run_it(exported, "--input", "input=2,16", "--output", "new.npz").exit_code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path("new.npz").stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["new.npz", "page.html"]


def test_links(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    Path("link.html").symlink_to("there/page.html")
    Path("out").symlink_to("there/out")
    assert parity(exported, "--html", "link.html").exit_code == 0
    assert run(*QUICK, "-o", "out").exit_code == 0
    assert sorted(os.listdir("there")) == ["out", "page.html"]
    assert Path("link.html").is_symlink()
    assert Path("out").is_symlink()
    if os.geteuid() == 0:
        tmp_path.chmod(0o1777)
        os.lchown("link.html", 12345, 12345)
        result = parity(exported, "--html", "link.html")
        assert (result.exit_code, "somebody else" in result.stderr) == (2, True)


def test_model_pt() -> None:
    """A program that is named model.pt, and a saved model with a trap in place of its weights."""
    program = torch.export.export(nn.Linear(16, 8), (torch.ones(3, 16),))
    torch.export.save(program, "model.pt2")
    Path("model.pt2").rename("model.pt")
    refused(run("model.pt", "-q"), "model.pt")
    adaattn.save(models.tiny(), "good.pt")
    payload = torch.load("good.pt", weights_only=True)
    torch.save(payload | {"state": Trap()}, "model.pt")
    refused(run("model.pt", "-q"), "model.pt")
    with pytest.raises(CheckpointError):
        adaattn.load("model.pt")
    assert not_sprung()


def test_pickle() -> None:
    torch.save(Trap(), "trap.pt")
    Path("trap.pkl").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pt", "trap.pkl"):
        refused(run(name, "-q"), "--allow-pickle")
    torch.save({"weight": Trap()}, "weights.pt")
    refused(run(*LINEAR, "--weights", "weights.pt"), "weights.pt")
    assert not_sprung()
    run("trap.pt", "-q", "--allow-pickle")
    assert not not_sprung()


def test_pt2() -> None:
    program = torch.export.export(nn.Linear(16, 8), (torch.ones(3, 16),))
    torch.export.save(program, "program.pt2")
    refused(run("program.pt2", "-q"), "--allow-pickle")
    options = ("-q", "--target", "onnx", "--no-verify", "--allow-pickle")
    assert run("program.pt2", *options).exit_code == 0


def test_factory(tmp_path: Path) -> None:
    where = "import sys, torch\nassert sys.path[0] == {!r}\n"
    Path("shop.py").write_text(where.format(str(tmp_path)) + "import part\nranker = lambda: torch.nn.Linear(16, 8)\n")
    Path("part.py").write_text("")
    options = ("--input", "input=B,16", "--target", "onnx", "--no-verify", "-q")
    path = list(sys.path)
    try:
        assert run("shop:ranker", *options).exit_code == 0
    finally:
        for name in ("shop", "part"):
            sys.modules.pop(name, None)
    Path("data").mkdir()
    Path("data/samples.py").write_text(
        where.format(str(tmp_path / "data")) + "def batches():\n    yield {'x': torch.randn(4, 8, 16)}\n"
    )
    adaattn.save(adaattn.Encoder(16, 2, ("adaptive",)), "model.pt")
    result = run("model.pt", "-q", "--target", "onnx", "--no-verify", "--balance", "--samples", "data/samples.py")
    assert result.exit_code == 0, result.stderr
    assert sys.path == path


def test_huggingface() -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    hf.BertModel(hf.BertConfig(vocab_size=20, **sizes)).save_pretrained("folder")
    config = json.loads(Path("folder/config.json").read_text())
    Path("folder/modeling_shop.py").write_text(SPRING)
    changed = config | {
        "model_type": "shop",
        "auto_map": {"AutoConfig": "modeling_shop.C", "AutoModel": "modeling_shop.M"},
    }
    Path("folder/config.json").write_text(json.dumps(changed))
    refused(run("hf:folder", "-q"), "folder")
    Path("folder/config.json").write_text(json.dumps(config))
    Path("folder/model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Trap()}, "folder/pytorch_model.bin")
    refused(run("hf:folder", "-q"), "--allow-pickle")
    assert not_sprung()


def test_sample_data() -> None:
    adaattn.save(adaattn.Encoder(16, 2, ("adaptive",)), "model.pt")
    np.savez("data.npz", x=np.array([Trap()], dtype=object))
    refused(run("model.pt", "-q", "--balance", "--samples", "data.npz"), "data.npz")
    assert not_sprung()


def test_output(tmp_path: Path) -> None:
    Path("full").mkdir()
    Path("full/mine").touch()
    refused(run(*QUICK, "-o", "full"), "full exists")
    Path("empty").mkdir()
    assert run(*QUICK, "-o", "empty").exit_code == 0
    with pytest.raises(ConfigError), folder.staging(tmp_path / "out", force=True) as made:  # noqa: PT012 - it appears
        (made.folder / "file").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
    assert os.listdir("out") == os.listdir("full") == ["mine"]
    assert sorted(os.listdir(tmp_path)) == ["empty", "full", "out"]


def test_force(copied: Path) -> None:
    for name in ("departure.onnx", "model.trt.onnx", "report-2.html", "timing.cache"):
        (copied / name).touch()
        refused(run(*QUICK, "-o", copied, "--force"), name, "no export wrote")
        (copied / name).unlink()
    content = (copied / "report.json").read_bytes()
    (copied / "report.json").write_text("{}")
    refused(run(*QUICK, "-o", copied, "--force"), "report.json, which was changed")
    (copied / "report.json").write_bytes(content)
    before = (copied / "manifest.json").stat().st_ino
    assert run(*QUICK, "-o", copied, "--force").exit_code == 0
    assert (copied / "manifest.json").stat().st_ino != before


def test_force_inputs(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(nn.Linear(16, 8).state_dict(), copied / "weights.safetensors")
    adaattn.save(models.tiny(), copied / "model.pt")
    np.savez(copied / "data.npz", x=np.ones((2, 8, 16), np.float32))
    inside = {name: str(copied / name) for name in ("weights.safetensors", "model.pt", "data.npz", "state.pt", "cache")}
    force = ("-o", copied, "--force", "-q", "--no-verify")
    refused(run(*LINEAR, "--weights", inside["weights.safetensors"], *force), "which this export reads")
    refused(run(inside["model.pt"], "--target", "onnx", *force), "which this export reads")
    Path("model.pt").write_bytes(Path(inside["model.pt"]).read_bytes())
    data = ("--balance", "--samples", inside["data.npz"])
    refused(run("model.pt", "--target", "onnx", *data, *force), "which this export reads")
    refused(
        run("model.pt", "--target", "tensorrt", "--timing-cache", inside["cache"], *force), "which this export reads"
    )
    native = ("--plugins", "native", "--plugin-library", inside["cache"])
    refused(run("model.pt", "--target", "tensorrt", *native, *force), "which this export reads")
    for name in ("weights.safetensors", "model.pt", "data.npz"):
        Path(inside[name]).unlink()
    monkeypatch.chdir(copied)
    for out in (".", "..", copied):
        refused(run(*QUICK, "-o", out, "--force"), "current folder")
    refused(run(*QUICK, "-o", "/", "--force"), "mount point")


def test_atomic(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cli/test_signals.py` kills exports at random moments; here DIR is looked at all the way through one."""
    before = (copied / "manifest.json").stat().st_ino
    seen = []
    for name in ("exchange", "remove", "sync"):
        function = getattr(atomic_file, name)

        def looked(*arguments: Any, function: Callable[..., Any] = function) -> Any:
            for step in (function, None):
                folder.check_output(copied, force=True)  # refuses what is not whole
                seen.append((copied / "manifest.json").stat().st_ino)
                if step is not None:
                    step(*arguments)

        monkeypatch.setattr(atomic_file, name, looked)
    assert run(*QUICK, "-o", copied, "--force").exit_code == 0
    assert seen[0] == before
    assert seen[-1] not in (None, before)
    assert len(set(seen)) == 2


def test_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "tensorrt_rtx.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setattr(engine_options, "installed", lambda target: True)
    with pytest.raises(TargetError, match="crashed with SIGSEGV"):
        engine_build.engine_from_onnx(tmp_path / "model.onnx", "tensorrt-rtx", tmp_path / "m.engine", [])
    assert sorted(os.listdir(tmp_path)) == ["m.log", "packages"]


def test_report(exported: Path) -> None:
    page = (exported / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not re.findall(r"<script|<iframe|<link|@import|\bsrc=|url\((?!#)", page)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', page))


def test_matplotlib(exported: Path) -> None:
    import matplotlib

    from adaattn.export.report.html import render

    report = json.loads((exported / "report.json").read_text())
    page = render(report)
    assert "<svg" in page
    with matplotlib.rc_context({"lines.linewidth": 99, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert render(report) == page


def test_external_data(copied: Path, tmp_path: Path) -> None:
    secret = np.arange(8, dtype=np.float32)
    (tmp_path / "secret").write_bytes(secret.tobytes())
    (copied / "link").symlink_to(tmp_path / "secret")
    for place in ("../secret", str(tmp_path / "secret"), "link"):
        model = onnx.load(exported_model(copied))
        weights = model.graph.initializer[0]
        weights.ClearField("raw_data")
        weights.ClearField("float_data")
        weights.data_location = onnx.TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=place)
        (copied / "bad.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(TargetError, match=r"bad\.onnx"):
            open_runtime(copied / "bad.onnx")


def exported_model(place: Path) -> Path:
    return place / "model.onnx"


def test_arrays(copied: Path) -> None:
    trap = np.array([Trap()], dtype=object)
    np.savez("traps.npz", **{"case/input/x": trap})
    np.save("trap.npy", trap)
    with pytest.raises(ConfigError):
        golden_case.load(Path("traps.npz"))
    result = run_it(copied, "--input", "input=@trap.npy")
    assert result.exit_code == 2
    assert not_sprung()


def test_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/export/engines/test_load.py` tries all types in all places."""
    Path("planted.py").write_text(SPRING)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "tensorrt.engine"
    file.touch()
    for target in ("planted", "tensorrt"):
        description.sidecar(file).write_text(json.dumps({**described(), "target": target, "package": "planted"}))
        for read in (open_engine, read_engine_info):
            with pytest.raises(ConfigError, match=r"target is .*, which is not of package planted"):
                read(file)
    assert not_sprung()


def test_plugin_library(tmp_path: Path) -> None:
    file = tmp_path / "tensorrt.engine"
    file.touch()
    options = described()["options"] | {"plugins": "native", "plugin_library": "evil.so"}
    description.sidecar(file).write_text(json.dumps(described(options=options)))
    with pytest.raises(ConfigError, match=r"plugins of evil\.so.*name the one that you trust"):
        open_runtime(file)
    result = run_it(file)
    assert (result.exit_code, "--plugin-library" in result.stderr) == (2, True)
    for command in (run_command.main, parity_command.main.commands["check"]):
        assert any("--plugin-library" in option.opts for option in command.params)


def test_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class Runtime:
        def __init__(self, logger: object) -> None: ...

        def __setattr__(self, name: str, value: Any) -> None:
            said.append((name, value))

        def deserialize_cuda_engine(self, content: bytes) -> object:
            return object()

    class Logger:
        WARNING = 1

        def __init__(self, level: int) -> None: ...

    module = type(sys)("tensorrt")
    module.__spec__ = type("Spec", (), {"name": "tensorrt"})()
    module.Runtime, module.Logger = Runtime, Logger
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(cuda_driver, "capability", lambda: 90)
    file = tmp_path / "tensorrt.engine"
    file.touch()
    for flag in (False, True):
        options = described()["options"] | {"version_compatible": flag}
        description.sidecar(file).write_text(json.dumps(described(options=options)))
        open_engine(file)
    assert said == [("engine_host_code_allowed", False), ("engine_host_code_allowed", True)]
    assert "origin you trust" in (ROOT / "docs/deploy.md").read_text()


def test_reports(exported: Path, tmp_path: Path) -> None:
    before = sorted(os.listdir(exported))
    assert parity(exported).exit_code == 0
    assert run_it(exported, "--input", "input=2,16").exit_code == 0
    parity("bisect", exported)
    assert os.listdir(tmp_path) == []
    assert parity(exported, "--html", "a.html", "--junit", "a.xml").exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["a.html", "a.xml"]
    assert sorted(os.listdir(exported)) == before
    (output,) = [x for x in parity_command.main.commands["bisect"].params if "--output" in x.opts]
    assert str(output.default) == "departure.onnx"


def test_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "g++").touch(0o755)
    mine = tmp_path / "mine"
    mine.touch(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TargetError, match=r"no C\+\+ compiler"):
        builder._compiler()  # the one in the current folder is not found
    monkeypatch.setenv("PATH", str(tmp_path))
    assert builder._compiler() == str(tmp_path / "g++")
    monkeypatch.setenv("CXX", str(mine))
    assert builder._compiler() == str(mine)


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = builder._private_cache()
    assert (folder, stat.S_IMODE(folder.stat().st_mode)) == (tmp_path / "adaattn", 0o700)
    folder.chmod(0o777)
    with pytest.raises(TargetError, match="others may write to it"):
        builder._private_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", ".")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert builder._private_cache() == tmp_path / "home" / ".cache" / "adaattn"


def test_cache_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/plugins/test_native_plugins.py` changes each part of the key."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "NvInfer.h").touch()
    keys = iter(["one", "one", "one", "two"])
    monkeypatch.setattr(builder, "_key_of", lambda *arguments: next(keys))
    monkeypatch.setattr(builder, "library", lambda kinds, arch, output, *rest: (output.write_text("good"), output)[1])
    library = builder.cached([], [80], tmp_path)
    library.write_text("evil")
    assert builder.cached([], [80], tmp_path).read_text() == "good"
    monkeypatch.setattr(builder, "library", lambda *arguments: pytest.fail("it is in the cache"))
    assert builder.cached([], [80], tmp_path) == library
    with pytest.raises(pytest.fail.Exception):
        builder.cached([], [80], tmp_path)
    result = CliRunner().invoke(plugins_command, ["build", "--arch", "80", "--tensorrt-include", "/nowhere"])
    assert (result.exit_code != 0, result.stdout) == (True, "")


def test_copy(tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2, 3, 16])
    node = onnx.helper.make_node("token_moments", ["x"], ["y"], domain="adaattn")
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [x]))
    onnx.save(model, tmp_path / "model.onnx")
    assert for_onnxruntime(tmp_path / "model.onnx") == tmp_path / "model.trt.onnx"
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.trt.onnx"]


def test_load() -> None:
    adaattn.save(models.tiny(), "model.pt")
    payload = torch.load("model.pt", weights_only=True)
    Path("planted.py").write_text(SPRING)
    for name in ("os:system", "planted:Model", "tests.support.models:Add", "adaattn.errors:ConfigError"):
        torch.save(payload | {"class": name}, "bad.pt")
        with pytest.raises(CheckpointError, match="not a class of this package"):
            adaattn.load("bad.pt")
    torch.save(Trap(), "trap.pt")
    with pytest.raises(CheckpointError):
        adaattn.load("trap.pt")
    assert not_sprung()


def test_export(tmp_path: Path) -> None:
    class Model(nn.Linear):
        called = False

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            Model.called = True
            return super().forward(input)

    from adaattn.export import Options, export

    export(Model(16, 8), {"input": "B,16"}, tmp_path / "out", options=Options(("onnx",), verify=False))
    assert Model.called
    assert os.listdir(tmp_path) == ["out"]
