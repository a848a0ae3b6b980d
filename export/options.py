"""Define the options of an export: targets, opset, types, engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adaattn.checks import (
    as_bool,
    as_choice,
    as_float,
    as_int,
    as_names,
    as_path,
    as_sequence,
    check_function,
    check_instance,
    check_mapping,
    described,
)
from adaattn.errors import ConfigError
from adaattn.export.allocation.allocation import Allocation
from adaattn.export.allocation.apply import ATTENTION
from adaattn.export.engines import options as engine_options
from adaattn.export.formats import TYPES
from adaattn.export.onnx import lower
from adaattn.export.targets import TARGETS, newest_opset
from adaattn.input_spec import Dimension
from adaattn.planning.budget import as_tolerance

SERVERS = ("triton", "onnxruntime")
"""What artifacts can be packaged for: Triton Inference Server, and ONNX Runtime's TensorRT execution provider."""
TYPED_OPSET = 22  # the first whose convolutions take bfloat16
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Options of an export.

    Args:
        targets: of `targets.TARGETS`; None for onnx and every TensorRT target whose package is here.
        serve: of SERVERS, to package the artifacts for. "triton" writes a model repository of the tensorrt engine where
            that is a target, else of the ONNX file; "onnxruntime" an ONNX file that names the tensorrt engine.
        opset: 18 to 24; None for the newest that all targets take.
        dtype: float32, float16 or bfloat16, to convert the model to; None leaves it.
        tolerance: accepted relative error of all adaptive attention; None keeps each module's own.
        output_tolerance: accepted relative error of what the model returns: a compile-time plan gives each operator the
            cheapest type with which it is kept on `samples`. None keeps the model's types.
        quantile: the share of samples that must keep the output tolerance.
        formats: that the plan may use, of "fp32", "bf16", "fp16", "fp8"; None for all that the engines' GPUs have.
        attention: what attention becomes beside fp32 in that plan. "operators": ONNX's own, which every compiler takes.
            "plugin": the op `adaptive_attention` with a constant plan for each head, for TensorRT's plugins.
        metric: what is bounded instead of the relative error: a function of the outputs and the reference outputs, by
            name, that returns a number, smaller is better.
        allocation: a plan that was made before, or its file, instead of a tolerance and samples.
        emit_plan: add each layer's precision and rank to the graph's outputs.
        verify: run the artifacts on golden inputs and compare.
        external_data_threshold: bytes above which a tensor goes to the external file.
        build: options of the engine builder.
        profiles: of engines: for each profile the sizes of the dimensions that are narrower in it, as "min:opt:max" or
            a Dimension; none for one profile of all sizes.
        samples: batches of sample data: each a tensor, a tuple or list, or a mapping of inputs by name.
        balance: calibrate a copy of the model with the samples first, as `adaattn.calibrate` does.
        state: checkpoint of what was measured on the samples, from which an interrupted export resumes.
        force: replace an output folder that exists.

    Raises:
        ConfigError: a value out of range.
    """

    targets: tuple[str, ...] | None = None
    serve: tuple[str, ...] = ()
    opset: int | None = None
    dtype: str | None = None
    tolerance: float | None = None
    output_tolerance: float | None = None
    quantile: float = 0.95
    formats: tuple[str, ...] | None = None
    attention: str = ATTENTION[0]
    metric: Callable[[Any, Any], float] | None = None
    allocation: Allocation | Path | None = None
    emit_plan: bool = False
    verify: bool = True
    external_data_threshold: int | None = None
    build: engine_options.BuildOptions = field(default_factory=engine_options.BuildOptions)
    profiles: Sequence[Mapping[str, str | Dimension]] = ()
    samples: Iterable[Any] | None = None
    balance: bool = False
    state: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.targets is not None:
            object.__setattr__(self, "targets", as_sequence("targets", self.targets))
        object.__setattr__(self, "serve", as_sequence("serve", self.serve))
        for name, given, known in (("target", self.targets or (), TARGETS), ("serve", self.serve, SERVERS)):
            unknown = [each for each in given if not isinstance(each, str) or each not in known]
            if unknown:
                raise ConfigError(f"{name} {described(unknown[0])} is unknown; choose one of {', '.join(known)}")
        newest = newest_opset(["onnx"])
        wanted = f"{lower.OLDEST_OPSET} to {newest}"
        if self.opset is not None and as_int("opset", self.opset, wanted, lower.OLDEST_OPSET) > newest:
            raise ConfigError(f"opset is {described(self.opset)}; choose {wanted}")
        if self.dtype is not None:
            as_choice("dtype", self.dtype, DTYPES)
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", as_tolerance(self.tolerance))
        if self.external_data_threshold is not None:
            as_int("external_data_threshold", self.external_data_threshold, "bytes, 0 or more", least=0)
        self._check_allocation()
        for name in ("emit_plan", "verify", "force", "balance"):
            as_bool(name, getattr(self, name))
        check_instance("build", self.build, engine_options.BuildOptions, "BuildOptions")
        profiles = as_sequence("profiles", self.profiles)
        for profile in profiles:
            check_mapping("profiles", profile, (str, Dimension), "sizes such as '1:128:4096'")
        object.__setattr__(self, "profiles", profiles)
        object.__setattr__(self, "profiles", self.chosen_profiles() if profiles else ())
        if self.state is not None:
            as_path("state", self.state)
        targets = self.chosen_targets()
        self.build.check_targets(targets)
        if self.profiles and not set(engine_options.PACKAGES) & set(targets):
            takers = ", ".join(sorted(engine_options.PACKAGES))
            raise ConfigError(f"profiles apply only to targets {takers}; selected targets: {', '.join(targets)}")
        if self.build.strip_weights and self.serve:
            raise ConfigError("strip_weights does not go with serve: servers put no weights into engines")
        if "onnxruntime" in self.serve and "tensorrt" not in targets:
            raise ConfigError(f"serve onnxruntime applies only to target tensorrt; selected: {', '.join(targets)}")

    def _check_allocation(self) -> None:
        """Check the options of the compile-time plan, and those that go with samples."""
        if self.output_tolerance is not None:
            object.__setattr__(self, "output_tolerance", as_tolerance(self.output_tolerance, "output_tolerance"))
            if self.tolerance is not None:
                raise ConfigError(
                    "tolerance is that of adaptive attention, and output_tolerance gives types; choose one"
                )
            if self.samples is None:
                raise ConfigError(
                    "output_tolerance needs samples: types are chosen by errors on data like what the model will meet, "
                    "and random inputs have other outliers"
                )
            if self.allocation is not None:
                raise ConfigError("an allocation is made already; give it or output_tolerance")
        elif self.samples is not None and not as_bool("balance", self.balance):
            raise ConfigError("samples apply only with output_tolerance, or with balance")
        wanted = "a share of samples between 0 and 1, such as 0.95"
        object.__setattr__(self, "quantile", as_float("quantile", self.quantile, wanted, lambda x: 0 < x < 1))
        if self.formats is not None:
            object.__setattr__(self, "formats", as_names("formats", self.formats, TYPES))
        if self.metric is not None:
            check_function("metric", self.metric)
        as_choice("attention", self.attention, ATTENTION)
        given = self.formats is not None or self.metric is not None or self.attention != ATTENTION[0]
        if self.output_tolerance is None and given:
            raise ConfigError("formats, metric and attention apply only with output_tolerance")
        if self.allocation is not None:
            kinds = (Allocation, str, os.PathLike)
            check_instance("allocation", self.allocation, kinds, "an adaattn.export.Allocation or the path of its file")
        if self.samples is None and (self.balance or self.state is not None):
            raise ConfigError("balance and state apply only with samples")
        if self.typed and self.dtype is not None:
            raise ConfigError("dtype converts the whole model; an output tolerance chooses a type for each operator")
        if self.typed and self.opset is not None and self.opset < TYPED_OPSET:
            raise ConfigError(f"opset is {self.opset}; an output tolerance takes {TYPED_OPSET} or newer")

    @property
    def typed(self) -> bool:
        """Whether operators get a type each."""
        return self.output_tolerance is not None or self.allocation is not None

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
        return self.opset or newest_opset(self.chosen_targets())
