"""TensorRT and TensorRT-RTX engines, built and run in a child process: their builders can end the process they are in.

The two packages share one API, so one piece of code serves both. This file is also the child:
`python -m adaattn.export.engine JOB.json`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaattn.errors import TargetError

if TYPE_CHECKING:
    import torch

PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {
    "tensorrt": "pip install 'adaattn[tensorrt]', on a machine with an NVIDIA GPU and its driver",
    "tensorrt-rtx": "pip install 'adaattn[tensorrt-rtx]'",
}
# What TensorRT-RTX 1.7 compiles float32 products for; 7.5 has none ("FP32 GEMM is not supported").
RTX_COMPUTE_CAPABILITIES = ("8.6", "8.9", "12.0")

Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]


def installed(target: str) -> bool:
    """Whether the package of a TensorRT target is here."""
    return importlib.util.find_spec(PACKAGES[target]) is not None


def build(
    target: str, model: Path, engine: Path, log: Path, profile: Profile, compute_capabilities: Sequence[str] = ()
) -> None:
    """Build an engine from an ONNX file; the bodies of our ops are compiled like any other nodes.

    Args:
        target: "tensorrt", for the GPU of this machine, or "tensorrt-rtx", ahead of time and without one.
        model: the ONNX file.
        engine, log: files to write.
        profile: for each input of the model its least, usual and largest shape.
        compute_capabilities: of tensorrt-rtx, such as "8.9".

    Raises:
        TargetError: the package is missing, or the builder refused or crashed; the message is its own first error.
    """
    if not installed(target):
        raise TargetError(f"{PACKAGES[target]} is not installed: {INSTALL[target]}")
    job = {
        "do": "build",
        "package": PACKAGES[target],
        "model": str(model),
        "engine": str(engine),
        "profile": {name: [list(shape) for shape in shapes] for name, shapes in profile.items()},
        "compute_capabilities": list(compute_capabilities or RTX_COMPUTE_CAPABILITIES) if "rtx" in target else [],
    }
    _run_child(job, engine.with_suffix(".job.json"), log)


def run(target: str, engine: Path, log: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of an engine on the GPU of this machine, by name.

    Raises:
        TargetError: the engine does not load or run.
    """
    import torch

    files = {"inputs": engine.with_suffix(".inputs.pt"), "outputs": engine.with_suffix(".outputs.pt")}
    torch.save(dict(inputs), files["inputs"])
    job = {"do": "run", "package": PACKAGES[target], "engine": str(engine), **{n: str(f) for n, f in files.items()}}
    try:
        _run_child(job, engine.with_suffix(".job.json"), log)
        outputs: dict[str, torch.Tensor] = torch.load(files["outputs"], weights_only=True)
        return outputs
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


def _run_child(job: Mapping[str, Any], job_file: Path, log: Path) -> None:
    job_file.write_text(json.dumps(job))
    try:
        with log.open("wb") as stream:
            child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(job_file)], stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
            )
            try:
                code = child.wait()
            finally:  # interrupted: the child must be gone before its folder is
                child.kill()
                child.wait()
    finally:
        job_file.unlink(missing_ok=True)
    if code < 0:
        raise TargetError(f"the process that had to {job['do']} the engine crashed with {signal.Signals(-code).name}")
    if code:
        raise TargetError(_first_error(log.read_text(errors="replace")))


def _first_error(log: str) -> str:
    """The line of a TensorRT log that says what went wrong."""
    # Without a GPU each log starts with complaints about CUDA that are of no consequence.
    lines = [line for line in log.splitlines() if line.strip() and "catchCudaError" not in line]
    errors = [line for line in lines if "[E]" in line]
    return re.sub(r"^.*?\[E\]\s*", "", errors[0]) if errors else (lines or ["the log is empty"])[-1].strip()


def _child(job: Mapping[str, Any]) -> None:
    if job["do"] == "build":
        _child_build(job)
    else:
        _child_run(job)


def _child_build(job: Mapping[str, Any]) -> None:
    trt = importlib.import_module(job["package"])
    logger = trt.Logger(trt.Logger.INFO)
    builder = trt.Builder(logger)
    # Types as the graph has them; from TensorRT 11 on there is no other way, and no flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["model"]):
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            print(f"[E] node {error.node_name()} ({error.node_operator()}): {error.desc()}")
        sys.exit(1)
    _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    # On by default, and then a float32 head would have errors near 3e-4.
    config.clear_flag(trt.BuilderFlag.TF32)
    if job["compute_capabilities"]:
        config.num_compute_capabilities = len(job["compute_capabilities"])
        for index, capability in enumerate(job["compute_capabilities"]):
            name = "SM" + capability.replace(".", "")
            if not hasattr(trt.ComputeCapability, name):
                sys.exit(f"[E] compute capability {capability} is unknown to {job['package']} {trt.__version__}")
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    profile = builder.create_optimization_profile()
    for name, shapes in job["profile"].items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        sys.exit(1)
    Path(job["engine"]).write_bytes(engine)


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let standard Attention nodes that no fused kernel takes (float32, say) be built from simpler ones."""
    attention = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # since 10.14
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if attention is not None and layer.type == attention:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _child_run(job: Mapping[str, Any]) -> None:
    import os

    # Polygraphy's switch for the whole process, read when it is imported.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if job["package"] == "tensorrt_rtx" else "0"
    import torch
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    inputs = torch.load(job["inputs"], weights_only=True)
    with TrtRunner(EngineFromBytes(BytesFromPath(job["engine"]))) as runner:
        outputs = runner.infer(inputs)
        torch.save({name: torch.as_tensor(value).clone() for name, value in outputs.items()}, job["outputs"])


if __name__ == "__main__":
    _child(json.loads(Path(sys.argv[1]).read_text()))
