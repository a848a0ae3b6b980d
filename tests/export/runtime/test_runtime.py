"""The runtime of deployment, on what an export made."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import adaattn
from adaattn.errors import ConfigError, TargetError
from adaattn.export import Options, export
from adaattn.export.cli.run import main
from adaattn.export.engines import description
from adaattn.export.engines import options as engine_options
from adaattn.export.engines.description import profile_of
from adaattn.export.engines.load import open_engine
from adaattn.export.golden.plan_mode import PlanMode
from adaattn.export.runtime import open_runtime
from adaattn.system import cuda_driver
from tests.support.engine_files import described

X = np.random.default_rng(0).standard_normal((2, 9, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(1)
    model = adaattn.Encoder(32, 2, ("adaptive",)).eval()
    folder = tmp_path_factory.mktemp("exported") / "out"
    export(model, {"x": "B,S,32"}, folder, options=Options(targets=("onnx",), verify=False))
    return model, folder


def test_arrays_give_arrays_and_tensors_give_tensors(exported: tuple[torch.nn.Module, Path]) -> None:
    model, folder = exported
    with torch.no_grad(), PlanMode():
        want = model(torch.from_numpy(X))
    with open_runtime(folder) as runtime:
        (name,) = runtime.outputs
        assert str(runtime.inputs["x"]) == "x: float32(B, S, 32)"
        array, tensor = runtime(x=X)[name], runtime(x=torch.from_numpy(X))[name]
        assert isinstance(array, np.ndarray)
        torch.testing.assert_close(torch.from_numpy(array), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tensor, torch.from_numpy(array), rtol=0, atol=0)
        timing = runtime.measure(calls=3, warmup=1, x=X)
        assert (timing.calls, timing.median <= timing.p99) == (3, True)


def test_what_is_wrong_with_a_call_is_said(exported: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    with open_runtime(exported[1]) as runtime:
        for inputs, said in (
            ({"y": X}, r"there is no input 'y'; the model takes x: float32\(B, S, 32\)"),
            ({}, "the input 'x' is missing"),
            ({"x": X.astype(np.float64)}, r"x is float64\(2, 9, 32\); expected x: float32\(B, S, 32\)"),
            ({"x": X[..., :8]}, r"x is float32\(2, 9, 8\)"),
            ({"x": X[0]}, r"x is float32\(9, 32\)"),
        ):
            with pytest.raises(ConfigError, match=said):
                runtime(**inputs)
        with pytest.raises(ConfigError, match="calls is 0"):
            runtime.measure(0, x=X)
    for path, options, said in (
        (tmp_path / "none", {}, "does not exist; give a folder"),
        (exported[1], {"target": "openvino"}, "target 'openvino' is unknown"),
        (exported[1], {"device": "tpu"}, "device is 'tpu'"),
        (exported[1], {"cuda_graph": True}, "cuda_graph is for engines"),
        (exported[1], {"target": "tensorrt"}, r"tensorrt\.engine does not exist"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_runtime(path, **options)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(TargetError, match=r"ONNX Runtime refuses .*bad\.onnx"):
        open_runtime(tmp_path / "bad.onnx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_an_engine_needs_its_description_and_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "m.engine"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"m\.engine has no m\.engine\.json beside it"):
        open_runtime(file)
    description.sidecar(file).write_text("{")
    with pytest.raises(ConfigError, match=r"m\.engine\.json is not what adaattn-export wrote"):
        open_runtime(file)
    about = described("tensorrt-rtx", compute_capabilities=["8.9"])
    description.sidecar(file).write_text(json.dumps(about))
    said = r"needs a GPU of compute capability 8\.9 \(tensorrt_rtx .*, no GPU that a CUDA driver finds\)"
    with pytest.raises(TargetError, match=said if engine_options.installed("tensorrt-rtx") else "is not installed"):
        open_runtime(file)
    (tmp_path / "m.onnx").touch()
    with pytest.raises(TargetError, match="has no CUDAExecutionProvider here: pip install onnxruntime-gpu"):
        open_runtime(tmp_path / "m.onnx", device="cuda")


TENSORRT = """
calls = []

def said(name, result=None):
    def call(*arguments):
        calls.append((name, *(str(x) for x in arguments if isinstance(x, (str, int)))))
        return result
    return call

class Engine:
    def __setattr__(self, name, value): calls.append((name, value))
    get_weight_streaming_automatic_budget = staticmethod(lambda: 123)

class Logger:
    WARNING = 1
    def __init__(self, level): pass

class Runtime:
    def __init__(self, logger): pass
    def __setattr__(self, name, value): calls.append((name, value))
    deserialize_cuda_engine = staticmethod(lambda content: Engine() if content == b"good" else None)

class Refitter:
    def __init__(self, engine, logger): pass
    refit_cuda_engine = staticmethod(said("refit", True))

class OnnxParserRefitter:
    def __init__(self, refitter, logger): pass
    refit_from_file = staticmethod(said("weights", True))

class get_plugin_registry:
    load_library = staticmethod(lambda path: said("library")(path) or ("handle" if "lib.so" in path else None))
"""


def test_an_engine_gets_what_its_options_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of TensorRT, recorded by a stand-in; an engine runs only where there is a GPU."""
    stand_in = ModuleType("tensorrt")
    stand_in.__spec__ = ModuleSpec("tensorrt", None)
    exec(TENSORRT, stand_in.__dict__)
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    monkeypatch.setattr(cuda_driver, "capability", lambda: 90)
    file = tmp_path / "m.engine"
    file.write_bytes(b"good")
    options: dict[str, object] = dict.fromkeys(engine_options.BuildOptions.__dataclass_fields__)
    library, other = tmp_path / "lib.so", tmp_path / "other"
    library.touch()
    other.touch()

    def opened(given: Path | None = None, **changes: object) -> list[tuple[object, ...]]:
        description.sidecar(file).write_text(json.dumps(described("tensorrt", options=options | changes)))
        stand_in.calls.clear()
        open_engine(file, given)
        return list(stand_in.calls)

    native = {"plugins": "native", "plugin_library": "lib.so"}
    assert opened() == [("engine_host_code_allowed", False)]
    assert opened(library, **native, version_compatible=True, weight_streaming=True) == [
        ("library", str(library)),
        ("engine_host_code_allowed", True),
        ("weight_streaming_budget_v2", 123),
    ]
    with pytest.raises(TargetError, match=r"takes them from .*model\.onnx, which is not there"):
        opened(strip_weights=True)
    (tmp_path / "model.onnx").touch()
    assert opened(strip_weights=True)[1:] == [("weights", f"{tmp_path}/model.onnx"), ("refit",)]
    with pytest.raises(TargetError, match=r"does not load the plugins .*other"):
        opened(other, **native)
    file.write_bytes(b"bad")
    with pytest.raises(TargetError, match=r"m\.engine, which 10\.14 built, does not open \(tensorrt "):
        opened()
    monkeypatch.setattr(cuda_driver, "capability", lambda: 80)
    with pytest.raises(TargetError, match=r"needs a GPU of compute capability 9\.0"):
        opened()


def test_profiles_are_chosen_by_shape() -> None:
    short, long = {"x": ((1, 1), (1, 8), (4, 16))}, {"x": ((1, 17), (1, 64), (4, 128))}
    assert [profile_of([short, long], {"x": (2, tokens)}) for tokens in (16, 17)] == [0, 1]
    with pytest.raises(
        ConfigError, match=r"no profile for x \(5, 8\); it takes x \(1, 1\) to \(4, 16\); or x \(1, 17\)"
    ):
        profile_of([short, long], {"x": (5, 8)})


def test_the_command(exported: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    run = CliRunner().invoke
    found = run(main, [str(exported[1]), "--input", f"x=@{tmp_path}/x.npy", "-o", f"{tmp_path}/out.npz"])
    assert found.exit_code == 0, found.output
    assert "float32(2, 9, 32), mean" in found.output
    with np.load(tmp_path / "out.npz") as kept, open_runtime(exported[1]) as runtime:
        (output,) = runtime(x=X).values()
        np.testing.assert_array_equal(next(iter(kept.values())), output)
    found = run(main, [str(exported[1]), "--input", "x=1,5,32", "--time", "--calls", "2", "--json"])
    assert json.loads(found.stdout)["milliseconds"]["calls"] == 2
    refused = run(main, [str(exported[1]), "--input", "x=1,5,32", "-o", "/dev/null"])
    assert (refused.exit_code, Path("/dev/null").is_char_device()) == (2, True)
    assert "it is a folder or a device" in refused.output
    for given, said in (
        ("z=1,5,32", "'z=1,5,32' is not an input"),
        ("x=one", "x=one: give @FILE.npy, or sizes"),
        (f"x=@{tmp_path}/none.npy", "cannot be read as a NumPy array"),
        ("x=1,5,7", "x is float32(1, 5, 7); expected"),
    ):
        refused = run(main, [str(exported[1]), "--input", given])
        assert refused.exit_code == 2
        assert said in refused.output


def test_neither_models_nor_the_exporter_nor_torch_are_imported(exported: tuple[torch.nn.Module, Path]) -> None:
    banned = ("torch", "onnx", "onnxscript", "adaattn.attention", "adaattn.export.pipeline")
    code = f"""
import sys
import numpy
from adaattn.export.runtime import open_runtime
with open_runtime({str(exported[1])!r}) as model:
    model(x=numpy.zeros((1, 3, 32), numpy.float32))
print(*(name for name in {banned!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
