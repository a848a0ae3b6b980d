"""Every graph of the table on every backend that this machine has, against float64.

`make test` runs a seeded subset on ONNX Runtime, `make parity` all of it. `--backend ort-cuda,tensorrt` names others:
those of `adaattn.export.verification.backends`, and triton, the fused kernels in eager mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from adaattn.export.capture.captured import Captured
from adaattn.export.capture.module import capture_module
from adaattn.export.engines import build as engine_build
from adaattn.export.engines import options as engine_options
from adaattn.export.golden.cases import Case
from adaattn.export.golden.eager import EagerReference, array
from adaattn.export.golden.plan_mode import PlanMode, run_eager
from adaattn.export.onnx.lower import lower, planned_nodes
from adaattn.export.onnx.save import save
from adaattn.export.parity import compare
from adaattn.export.parity.golden_case import GoldenCase
from adaattn.export.runtime import session
from adaattn.export.verification import backends
from adaattn.input_spec import Dimension, InputSpec
from adaattn.system import cuda_driver
from tests.parity.table import DTYPES, GRAPHS, WIDTH, Graph, cases, some

BACKENDS = (*backends.BACKENDS, "triton")
DIMS = {"B": "1:2:3", "S": "1:17:130", "K": "5:17:130"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "graph" in metafunc.fixturenames:
        thorough = metafunc.config.getoption("--all-graphs")
        names = metafunc.config.getoption("--backend").split(",")
        dtypes = DTYPES[:2] if names == ["ort-cpu"] else DTYPES  # which has no bfloat16, and would only say so
        metafunc.parametrize("graph", GRAPHS if thorough else some(6, dtypes), ids=str)
        unknown = [name for name in names if name not in BACKENDS]
        if unknown:
            raise pytest.UsageError(f"backend {unknown[0]!r} is unknown; choose one of {', '.join(BACKENDS)}")
        metafunc.parametrize("backend", names)


def why_not(backend: str) -> str | None:
    """Why this machine does not run a backend."""
    if backend in session.PROVIDERS:
        onnxruntime = pytest.importorskip("onnxruntime")
        provider = session.PROVIDERS[backend]
        if provider not in onnxruntime.get_available_providers():
            return f"onnxruntime {onnxruntime.__version__} has no {provider}"
    elif backend in engine_options.PACKAGES and not engine_options.installed(backend):
        return f"{engine_options.PACKAGES[backend]} is not installed"
    if backend != "ort-cpu" and cuda_driver.capability() is None:
        return "a CUDA driver finds no GPU on this machine"
    return None


def test_outputs_agree_with_float64(graph: Graph, backend: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    reason = why_not(backend)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    captured, module = captured_of(graph)
    opset = 22 if backend in (*engine_options.PACKAGES, "ort-tensorrt") else 23
    names = {symbol: dim.name for symbol, dim in captured.dims.items()}
    lowered = lower(captured.program, opset, names, list(graph.inputs()), captured.output_names)
    layers = list(planned_nodes(lowered.graph))
    all_shapes = pytestconfig.getoption("--all-graphs")
    given = {name: Case(name, inputs) for name, inputs in cases(graph, all_shapes)}
    if backend == "triton":
        runs = fused(module.cuda(), given, layers)
    else:
        save(lowered.graph, tmp_path / "model.onnx")
        if backend in engine_options.PACKAGES:
            build(graph, backend, tmp_path)
        try:
            runs = backends.open_backend(backend, tmp_path, tmp_path / "run.log")
        except session.CannotRun as error:
            pytest.skip(f"{backend}: {error}")
    reference = EagerReference(captured)
    goldens = reference.goldens([reference.expect(case) for case in given.values()], layers)
    if backend not in session.PROVIDERS:  # which make their own plans alone
        goldens = [golden for golden in goldens if golden.whole]
    found = compare.compare(
        goldens, runs, lambda of, plans: reference.exact_at(given[of.name], [plans[name] for name in layers])
    )
    wrong = [f"{row['case']}: {row['reason']}" for row in found["outputs"] if row["verdict"] != "passed"]
    assert not wrong, f"{len(wrong)} of {len(found['outputs'])}\n" + "\n".join(wrong)


def captured_of(graph: Graph) -> tuple[Captured, torch.nn.Module]:
    module = graph.module().to(getattr(torch, graph.dtype))
    specs = [InputSpec.parse(name, text) for name, text in graph.inputs().items()]
    used = {size for spec in specs for size in spec.shape}
    dims = {name: Dimension.parse(name, text) for name, text in DIMS.items() if name in used}
    return capture_module(module, specs, dims), module


def build(graph: Graph, target: str, folder: Path) -> None:
    """Return an engine whose one profile takes all shapes."""
    points = [{name: int(text.split(":")[at]) for name, text in DIMS.items()} for at in range(3)]

    def shape(text: str, sizes: dict[str, int]) -> list[int]:
        return [sizes.get(size, WIDTH) if not size.isdecimal() else int(size) for size in text.split(":")[0].split(",")]

    profile = {name: tuple(shape(text, sizes) for sizes in points) for name, text in graph.inputs().items()}
    capability = f"{(cuda_driver.capability() or 0) / 10}"
    options = engine_options.BuildOptions(compute_capabilities=(capability,) if target == "tensorrt-rtx" else None)
    engine_build.engine_from_onnx(folder / "model.onnx", target, folder / f"{target}.engine", [profile], options)


def fused(module: torch.nn.Module, given: dict[str, Case], layers: Sequence[str]) -> compare.Backend:
    """Eager PyTorch on a GPU, whose ops are the Triton kernels."""

    def backend(of: GoldenCase) -> compare.BackendResult:
        mode = PlanMode()
        inputs = {name: x.cuda() for name, x in given[of.name].inputs.items()}
        (output, *_) = run_eager(module, inputs, mode)
        plans = {name: (array(p), array(r)) for name, (p, r) in zip(layers, mode.plans, strict=True)}
        return compare.BackendResult({name: array(output) for name in of.outputs}, plans, {})

    return backend
