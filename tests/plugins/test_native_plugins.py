"""The native library: built from an exported model, loaded by a registry, driven as TensorRT drives it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import adaattn
from adaattn.errors import ConfigError, TargetError
from adaattn.export import Options, export
from adaattn.plugins.native import build as builder
from adaattn.plugins.native.cli import main as command
from adaattn.plugins.native.node_kinds import common_kinds, kinds
from adaattn.plugins.native.onnxruntime_copy import for_onnxruntime
from adaattn.plugins.op_variants import VARIANTS
from adaattn.system import cuda_driver
from tests.support import oracle
from tests.support.wheels import unpacked

HERE = Path(__file__).parent
CAPABILITY = cuda_driver.capability()
TYPES = {torch.float32: 0, torch.int32: 3, torch.bool: 4}
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture(scope="session")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TensorRT's: those that the environment names, or those that a wheel happens to carry."""
    named = os.environ.get("TENSORRT_INCLUDE")
    if named:
        return Path(named)
    carried = importlib.util.find_spec("kernel_lens")  # by `make gpu-wheels`
    if carried is not None and carried.origin is not None:
        return Path(carried.origin).parent / "include" / "tensorrt"
    return unpacked("kernel-lens==2.0.1", tmp_path_factory.mktemp("headers")) / "kernel_lens" / "include" / "tensorrt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    encoder = adaattn.Encoder(32, 2, ("adaptive",), causal=True)
    folder = tmp_path_factory.mktemp("model") / "out"
    inputs = {"x": "B,S,32", "attention_mask": "B,S:bool"}
    export(encoder, inputs, folder, options=Options(targets=("onnx",), opset=23))
    return folder / "model.onnx"


def adaattn_plugins(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "adaattn.plugins.native.cli", *map(str, arguments)],
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def library(model: Path, headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "libadaattn_plugins.so"
    arch = ("--arch", CAPABILITY or 80)
    arguments = ("build", model, *arch, "--tensorrt-include", headers, "--output", path)
    done = adaattn_plugins(*arguments, CXXFLAGS="-Werror")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing else is left
    return path


@pytest.fixture(scope="module")
def tensorrt(headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a stand-in for TensorRT in C++."""
    path = tmp_path_factory.mktemp("driver") / "driver"
    include = ("-isystem", headers, "-isystem", builder.cuda_headers())
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
    subprocess.run(["g++", *flags, *include, HERE / "driver.cpp", "-ldl", "-o", path], check=True)
    return path


def test_the_example_of_deployment_compiles(headers: Path) -> None:
    include = ("-isystem", headers, "-isystem", builder.cuda_headers())
    source = HERE.parent.parent / "examples" / "deploy" / "main.cpp"
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only")
    subprocess.run(["g++", *flags, *include, source], check=True)


def test_a_plugin_answers_all_that_tensorrt_asks(library: Path, tensorrt: Path) -> None:
    done = subprocess.run([tensorrt, library], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "all as expected\n"), done.stderr


REGISTRY = """
import sys
import tensorrt_rtx as trt

class Log(trt.ILogger):
    def log(self, severity, message):
        print(message, flush=True)

log = Log()
registry = trt.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
print("creators", *sorted(c.name for c in registry.all_creators if c.plugin_namespace == "adaattn"), flush=True)
builder = trt.Builder(log)
network = builder.create_network()  # a parser does not keep it
parser = trt.OnnxParser(network, log)
parser.parse_from_file(sys.argv[2])  # TensorRT-RTX takes no plugins, and ends the process when it has made some
"""


def alone(model: Path, op: str, path: Path) -> Path:
    """Return the first node of an op as a separate model, with the function that exported files have for it."""
    import onnx

    whole = onnx.load(model)
    node = next(node for node in whole.graph.node if node.op_type == op)
    known = {value.name: value for value in (*whole.graph.value_info, *whole.graph.input)}
    outputs = [known[name] for name in node.output]
    graph = onnx.helper.make_graph([node], op, [known[name] for name in node.input], outputs)
    onnx.save(onnx.helper.make_model(graph, opset_imports=whole.opset_import, functions=whole.functions), path)
    return path


@pytest.mark.parametrize(
    ("op", "fields"),
    [("token_moments_masked", "center 1"), ("adaptive_attention_masked", "scale 0.25, is_causal 1")],
)
def test_a_registry_loads_the_library_and_a_parser_gives_nodes_to_it(
    op: str, fields: str, library: Path, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = [sys.executable, "-c", REGISTRY, library, alone(model, op, tmp_path / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    (names,) = [line.split()[1:] for line in said.splitlines() if line.startswith("creators")]
    assert names == sorted(VARIANTS)
    assert f"AdaAttn: {op} created, {fields}\n" in said


def test_a_model_without_our_ops_and_one_that_no_kernel_fits_are_refused(tmp_path: Path) -> None:
    import onnx

    def saved(*nodes: onnx.NodeProto, head_dim: int) -> Path:
        x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["B", 2, "S", head_dim])
        y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y])), tmp_path / "m.onnx")
        return tmp_path / "m.onnx"

    with pytest.raises(ConfigError, match="has no AdaAttn ops"):
        kinds(saved(onnx.helper.make_node("Relu", ["x"], ["y"]), head_dim=16))
    ours = onnx.helper.make_node("token_moments", ["x"], ["y"], domain="adaattn", center=0)
    with pytest.raises(ConfigError, match="head_dim is 320"):
        kinds(saved(ours, head_dim=320))
    hidden = onnx.helper.make_node("token_moments", ["z"], ["y"], domain="adaattn", center=0)
    with pytest.raises(ConfigError, match="nothing says what type and shape z of token_moments has"):
        kinds(saved(hidden, head_dim=16))


def test_the_form_for_onnxruntime_names_plugins_and_carries_no_bodies(model: Path, tmp_path: Path) -> None:
    import onnx

    whole = onnx.load(model)
    file = tmp_path / "model.onnx"
    onnx.save(whole, file)
    done = adaattn_plugins("onnxruntime", file)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/model.trt.onnx\n"), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.trt.onnx"]
    copy = onnx.load(tmp_path / "model.trt.onnx")
    onnx.checker.check_model(copy)
    ours = [node for node in copy.graph.node if node.domain == "trt.plugins"]
    assert {node.op_type for node in ours} <= set(VARIANTS)
    assert [node.op_type for node in ours] == [node.op_type for node in whole.graph.node if node.domain == "adaattn"]
    assert all(node.domain in ("", "trt.plugins") for node in copy.graph.node)
    assert not copy.functions
    assert {opset.domain for opset in copy.opset_import} == {"", "trt.plugins"}
    named = {value.name for value in (*copy.graph.value_info, *copy.graph.output)}
    assert all(name in named for node in ours for name in node.output)  # the provider's ops infer no types
    with pytest.raises(ConfigError, match="has no AdaAttn ops"):
        for_onnxruntime(tmp_path / "model.trt.onnx")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match=r"holds no NvInfer.h: give --tensorrt-include"):
        builder.library(common_kinds(), [80], tmp_path / "l.so", tmp_path)
    (tmp_path / "NvInfer.h").touch()
    with pytest.raises(TargetError, match=r"holds no cuda_runtime_api.h: install triton"):
        builder.library(common_kinds(), [80], tmp_path / "l.so", tmp_path, tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match="no C\\+\\+ compiler"):
        builder.library(common_kinds(), [80], tmp_path / "l.so", tmp_path)
    for text, said in (("eighty", "'eighty'; give numbers"), ("75,90", "sm_75 is too old")):
        with pytest.raises(TargetError, match=said):
            builder.architectures(text)
    if CAPABILITY is None:
        with pytest.raises(TargetError, match="no GPU to build for: give --arch"):
            builder.architectures("")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, bool]]:
    """Ask the cache for a library; returns it, and whether it was built."""
    include = tmp_path / "include"
    include.mkdir()
    (include / "NvInfer.h").write_text('#include "NvInferVersion.h"')
    (include / "NvInferRuntime.h").write_text('#include "NvInferVersion.h"')
    (include / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 10")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built: list[Path] = []

    def library(kinds: Any, architectures: Any, output: Path, *others: Any) -> Path:
        built.append(output)
        output.write_text(f"library {len(built)}")
        return output

    monkeypatch.setattr(builder, "library", library)

    def ask(kinds: Any = None, architectures: Any = (80,), place: Path = include, **options: Any) -> tuple[Path, bool]:
        count = len(built)
        return builder.cached(kinds or common_kinds(), architectures, place, **options), len(built) > count

    return ask


def test_a_library_is_kept_for_all_that_goes_into_it(
    kept: Callable[..., tuple[Path, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    include = tmp_path / "include"
    first, built = kept()
    assert built
    assert kept(common_kinds()[::-1]) == (first, False)
    assert kept(common_kinds()[1:])[1]
    assert kept(architectures=[80, 90])[1]
    assert kept(force=True)[1]
    shutil.copytree(include, tmp_path / "elsewhere")
    assert kept(place=tmp_path / "elsewhere")[1]  # paths of headers are compiled in
    (include / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 11")
    assert kept()[1]
    (include / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 10")
    assert not kept()[1]
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo 99; else exec g++ "$@"; fi\n')
    compiler.chmod(0o755)
    for name, value in (("CXX", str(compiler)), ("CXXFLAGS", "-O0"), ("TRITON_DEFAULT_FP_FUSION", "0")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            assert kept()[1], name
    with monkeypatch.context() as patched:
        import triton

        patched.setattr(triton, "__version__", "99")
        assert kept()[1]
    sources = tmp_path / "sources"
    shutil.copytree(builder.SOURCES, sources / "native")
    source = sources / "native" / "adaattn_plugins.cpp"
    source.write_text(source.read_text() + "// changed\n")
    with monkeypatch.context() as patched:
        patched.setattr(builder, "SOURCES", sources / "native")
        assert kept()[1]
    assert not kept()[1]


def test_a_library_that_is_damaged_or_lacks_its_headers_is_not_handed_out(
    kept: Callable[..., tuple[Path, bool]], tmp_path: Path
) -> None:
    library, _ = kept()
    (index,) = library.parent.glob("*.sha256")
    damages: list[Callable[[Path], object]] = [
        lambda library: library.write_text("text"),
        lambda library: library.unlink(),
        lambda library: index.write_text(""),
        lambda library: index.write_text("../" * 30),
    ]
    for damage in damages:
        damage(library)
        library, built = kept()
        assert built
        assert library.read_text().startswith("library")
        assert kept() == (library, False)
    (tmp_path / "include" / "NvInfer.h").unlink()
    with pytest.raises(TargetError, match=r"holds no NvInfer\.h"):
        kept()
    result = CliRunner().invoke(command, ["build", "--arch", "80", "--tensorrt-include", str(tmp_path / "include")])
    assert (result.exit_code != 0, result.stdout) == (True, "")
    assert "holds no NvInfer.h" in result.stderr


def test_a_cache_that_others_may_write_to_is_refused(
    kept: Callable[..., tuple[Path, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kept()[0].parent
    assert folder == tmp_path / "cache" / "adaattn"
    assert folder.stat().st_mode & 0o777 == 0o700
    for place, mode in ((folder, 0o777), (folder, 0o720), (folder.parent, 0o777)):
        before = place.stat().st_mode
        place.chmod(mode)
        with pytest.raises(TargetError, match="others may write to it"):
            kept()
        place.chmod(before)
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
        with pytest.raises(TargetError, match="belongs to somebody else"):
            kept()
        os.chown(folder, 0, -1)
    assert not kept()[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "XDG_CACHE_HOME", "cache"
    )  # not absolute, so it does not count: it would hang on the current folder
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert kept()[0].is_relative_to(tmp_path / "home" / ".cache")


@pytest.mark.skipif(CAPABILITY is None, reason="the CUDA driver shows no GPU")
def test_enqueue_computes_the_op(library: Path, tensorrt: Path, tmp_path: Path) -> None:
    q, k, v = (torch.randn(2, 2, tokens, 16) for tokens in (300, 300, 300))
    mask = torch.rand(2, 1, 1, 300) < 0.7
    precision = torch.tensor([[0, 3], [1, 4]], dtype=torch.int32)
    rank = torch.tensor([[16, 16], [12, 5]], dtype=torch.int32)
    inputs = (q, k, v, k.mean(2), v.abs().amax(2), precision, rank, mask)
    lines = ["op adaptive_attention_masked", "attribute scale f 0.25", "attribute is_causal i 1"]

    def line(what: str, x: Tensor, name: str) -> str:
        return f"{what} {TYPES[x.dtype]} {tmp_path / name} {' '.join(map(str, x.shape))}"

    for place, x in enumerate(inputs):
        (tmp_path / f"input{place}").write_bytes(x.contiguous().numpy().tobytes())
        lines.append(line("input", x, f"input{place}"))
    lines.append(line("output", q, "output"))
    (tmp_path / "manifest").write_text("\n".join(lines))
    checker = shutil.which("compute-sanitizer")
    command = [checker, "--error-exitcode", "1"] if checker else []
    done = subprocess.run(
        [*command, tensorrt, library, tmp_path / "manifest"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    output = torch.frombuffer(bytearray((tmp_path / "output").read_bytes()), dtype=torch.float32).view(q.shape)
    want = adaattn.ops.adaptive_attention(*inputs, scale=0.25, is_causal=True, impl="reference")
    error = oracle.error(output, want.double())
    assert (error < 0.05).all()
    assert error[0, 0] < 1e-6
