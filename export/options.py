"""Define the options of an export: targets, opset, types, engines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adaattn.checks import (
    as_bool,
    as_choice,
    as_int,
    as_path,
    as_sequence,
    check_instance,
    check_mapping,
    described,
)
from adaattn.errors import ConfigError
from adaattn.export.engines import options as engine_options
from adaattn.export.onnx import lower
from adaattn.input_spec import Dimension
from adaattn.planning.budget import as_tolerance

TARGETS = ("onnx", "tensorrt-rtx", "tensorrt")
SERVERS = ("triton", "onnxruntime")
"""What artifacts can be packaged for: Triton Inference Server, and ONNX Runtime's TensorRT execution provider."""
# TensorRT builds torch's opset-23 Attention only where a fused kernel takes its types and shapes, and TensorRT-RTX 1.7
# crashes on self-attention of a tensor with itself; up to 22 torch writes MatMul and Softmax.
NEWEST_OPSET = {"onnx": lower.NEWEST_OPSET, "tensorrt-rtx": 22, "tensorrt": 22}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Options of an export.

    Args:
        targets: of TARGETS; None for onnx and every TensorRT target whose package is here.
        serve: of SERVERS, to package the artifacts for. "triton" writes a model repository of the tensorrt engine where
            that is a target, else of the ONNX file; "onnxruntime" an ONNX file that names the tensorrt engine.
        opset: 18 to 24; None for the newest that all targets take.
        dtype: float32, float16 or bfloat16, to convert the model to; None leaves it.
        tolerance: accepted relative error of all adaptive attention; None keeps each module's own.
        emit_plan: add each layer's precision and rank to the graph's outputs.
        verify: run the artifacts on golden inputs and compare.
        external_data_threshold: bytes above which a tensor goes to the external file.
        build: options of the engine builder.
        profiles: of engines: for each profile the sizes of the dimensions that are narrower in it, as "min:opt:max" or
            a Dimension; none for one profile of all sizes.
        calibrate: batches of sample data, as of `adaattn.calibrate`, to calibrate a copy of the model with.
        calibration_state: checkpoint of the calibration statistics, from which an interrupted calibration resumes.
        force: replace an output folder that exists.

    Raises:
        ConfigError: a value out of range.
    """

    targets: tuple[str, ...] | None = None
    serve: tuple[str, ...] = ()
    opset: int | None = None
    dtype: str | None = None
    tolerance: float | None = None
    emit_plan: bool = False
    verify: bool = True
    external_data_threshold: int | None = None
    build: engine_options.BuildOptions = field(default_factory=engine_options.BuildOptions)
    profiles: Sequence[Mapping[str, str | Dimension]] = ()
    calibrate: Iterable[Any] | None = None
    calibration_state: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.targets is not None:
            object.__setattr__(self, "targets", as_sequence("targets", self.targets))
        object.__setattr__(self, "serve", as_sequence("serve", self.serve))
        for name, given, known in (("target", self.targets or (), TARGETS), ("serve", self.serve, SERVERS)):
            unknown = [each for each in given if not isinstance(each, str) or each not in known]
            if unknown:
                raise ConfigError(f"{name} {described(unknown[0])} is unknown; choose one of {', '.join(known)}")
        wanted = f"{lower.OLDEST_OPSET} to {lower.NEWEST_OPSET}"
        if self.opset is not None and as_int("opset", self.opset, wanted, lower.OLDEST_OPSET) > lower.NEWEST_OPSET:
            raise ConfigError(f"opset is {described(self.opset)}; choose {wanted}")
        if self.dtype is not None:
            as_choice("dtype", self.dtype, DTYPES)
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", as_tolerance(self.tolerance))
        if self.external_data_threshold is not None:
            as_int("external_data_threshold", self.external_data_threshold, "bytes, 0 or more", least=0)
        for name in ("emit_plan", "verify", "force"):
            as_bool(name, getattr(self, name))
        check_instance("build", self.build, engine_options.BuildOptions, "BuildOptions")
        profiles = as_sequence("profiles", self.profiles)
        for profile in profiles:
            check_mapping("profiles", profile, (str, Dimension), "sizes such as '1:128:4096'")
        object.__setattr__(self, "profiles", profiles)
        object.__setattr__(self, "profiles", self.chosen_profiles() if profiles else ())
        if self.calibration_state is not None:
            as_path("calibration_state", self.calibration_state)
        targets = self.chosen_targets()
        self.build.check_targets(targets)
        if self.profiles and not set(engine_options.PACKAGES) & set(targets):
            takers = ", ".join(sorted(engine_options.PACKAGES))
            raise ConfigError(f"profiles apply only to targets {takers}; selected targets: {', '.join(targets)}")
        if self.calibration_state is not None and self.calibrate is None:
            raise ConfigError("calibration_state applies only with sample data to calibrate with")
        if self.build.strip_weights and self.serve:
            raise ConfigError("strip_weights does not go with serve: servers put no weights into engines")
        if "onnxruntime" in self.serve and "tensorrt" not in targets:
            raise ConfigError(f"serve onnxruntime applies only to target tensorrt; selected: {', '.join(targets)}")

    def chosen_targets(self) -> tuple[str, ...]:
        """Return the targets, the ONNX file first, from which the others are built."""
        if self.targets is None:
            return ("onnx", *(target for target in engine_options.PACKAGES if engine_options.installed(target)))
        return tuple(target for target in TARGETS if target == "onnx" or target in self.targets)

    def chosen_profiles(self) -> tuple[Mapping[str, Dimension], ...]:
        """Return the profiles, one of all sizes where none is given."""
        return tuple({name: Dimension.of(name, x) for name, x in each.items()} for each in self.profiles or ({},))

    def chosen_opset(self) -> int:
        """Return the opset, by default the newest that all targets take."""
        return self.opset or min(NEWEST_OPSET[target] for target in self.chosen_targets())
