"""Runtimes as the parity rule sees them: a case in, named outputs and plans out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from adaattn.errors import TargetError
from adaattn.export import engine
from adaattn.export.golden import Case
from adaattn.export.parity import Backend
from adaattn.export.yardstick import PlanPair

PlanNames = Sequence[tuple[str, str]]  # names of precision and rank, one pair a layer


class CannotRun(Exception):
    """This machine cannot run the artifact: a fact to report, no fault of it."""


def onnxruntime_backend(path: Path, plan_names: PlanNames) -> Backend:
    """ONNX Runtime on the CPU, with nothing of ours installed.

    Outputs come from the file as it is. Plans come from a copy beside it that shows them: its graph has them inside.

    Raises:
        CannotRun: ONNX Runtime's CPU provider has no kernel for a type of the model.
        TargetError: ONNX Runtime refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3

    def session(file: Path) -> onnxruntime.InferenceSession:
        try:
            return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no public base class
            reason = str(error).strip().splitlines()[-1]
            if "NOT_IMPLEMENTED" in reason or "Could not find an implementation" in reason:
                raise CannotRun(f"ONNX Runtime's CPU provider cannot run it: {reason.split(' : ')[-1]}") from error
            raise TargetError(f"ONNX Runtime refuses the file: {reason}") from error

    plain = session(path)
    names = [output.name for output in plain.get_outputs()]
    flat = [name for pair in plan_names for name in pair]
    shown = None
    if flat:
        copy = path.with_suffix(".plans.onnx")
        try:
            _show(path, copy, flat)
            shown = session(copy)
        finally:
            copy.unlink(missing_ok=True)

    def backend(case: Case) -> tuple[Mapping[str, Tensor], Sequence[PlanPair] | None]:
        feed = {item.name: case.inputs[item.name].numpy() for item in plain.get_inputs()}
        try:
            outputs = {n: torch.from_numpy(x) for n, x in zip(names, plain.run(names, feed), strict=True)}
            found = [torch.from_numpy(x) for x in shown.run(flat, feed)] if shown else []
        except Exception as error:  # as above
            raise TargetError(f"ONNX Runtime fails on {case.name}: {str(error).strip().splitlines()[-1]}") from error
        return outputs, list(zip(found[::2], found[1::2], strict=True))

    return backend


def engine_backend(path: Path, log: Path, about: Mapping[str, Any]) -> Backend:
    """An engine on the GPU of this machine.

    Args:
        log: of the runs.
        about: what the engine's sidecar says.

    Raises:
        CannotRun: there is no GPU that the engine was built for.
    """
    if not torch.cuda.is_available():
        raise CannotRun("built, not run: torch sees no GPU on this machine")
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    if capability not in about["compute_capabilities"] and not about["options"]["hardware_compatible"]:
        raise CannotRun(f"built, not run: this GPU has compute capability {capability}")

    def backend(case: Case) -> tuple[Mapping[str, Tensor], Sequence[PlanPair] | None]:
        return engine.run(about["target"], path, log, case.inputs), None

    return backend


def _show(path: Path, copy: Path, names: Sequence[str]) -> None:
    """A copy of the model in the same folder, where its external data is found, with more outputs."""
    model = onnx.load(path, load_external_data=False)
    have = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in have)
    onnx.save(model, copy)
