"""From a model to a folder of verified artifacts, whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaattn.attention.base import PlannedAttention
from adaattn.calibration import Calibration, calibrate
from adaattn.checks import (
    as_bool,
    as_choice,
    as_int,
    as_path,
    as_sequence,
    check_function,
    check_instance,
    check_mapping,
    described,
)
from adaattn.config import Budget
from adaattn.errors import AdaAttnError, ConfigError, TargetError
from adaattn.export import cases, engine, folder, golden, onnx, parity, serving, summary, trace, verify
from adaattn.export.capture import Captured, capture_module, capture_program, default_inputs, with_specs
from adaattn.export.html import render
from adaattn.export.reference import Expected, Reference, disagreements
from adaattn.export.source import usable
from adaattn.input_spec import Dimension, InputSpec
from adaattn.integrations import transformers as integration

TARGETS = ("onnx", "tensorrt-rtx", "tensorrt", "triton")
# TensorRT builds torch's opset-23 Attention only where a fused kernel takes its types and shapes, and TensorRT-RTX 1.7
# crashes on self-attention of a tensor with itself; up to 22 torch writes MatMul and Softmax.
NEWEST_OPSET = {"onnx": onnx.NEWEST_OPSET, "tensorrt-rtx": 22, "tensorrt": 22, "triton": onnx.NEWEST_OPSET}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What to make of a model.

    Args:
        targets: of TARGETS; None for onnx and every TensorRT target whose package is here. "triton" serves the
            tensorrt engine where that is a target too, else the ONNX file.
        opset: 18 to 24; None for the newest that all targets take.
        dtype: float32, float16 or bfloat16, to convert the model to; None leaves it.
        tolerance: of every adaptive module; None leaves them.
        emit_plan: add each layer's precision and rank to the graph's outputs.
        verify: run golden inputs and compare.
        external_data_threshold: bytes above which a tensor goes to the external file.
        build: how engines are built.
        profiles: of engines: for each profile the sizes of dimensions, "min:opt:max", that are narrower in it; none for
            one profile of all sizes.
        calibrate: batches of sample data, as of `adaattn.calibrate`, that a copy of the model is calibrated with.
        calibration_state: a file that keeps the statistics, so that a calibration that was interrupted goes on.
        force: replace an output folder that exists.

    Raises:
        ConfigError: a value out of range.
    """

    targets: tuple[str, ...] | None = None
    opset: int | None = None
    dtype: str | None = None
    tolerance: float | None = None
    emit_plan: bool = False
    verify: bool = True
    external_data_threshold: int | None = None
    build: engine.BuildOptions = field(default_factory=engine.BuildOptions)
    profiles: tuple[Mapping[str, str], ...] = ()
    calibrate: Iterable[Any] | None = None
    calibration_state: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.targets is not None:
            object.__setattr__(self, "targets", as_sequence("targets", self.targets))
        unknown = [each for each in self.targets or () if not isinstance(each, str) or each not in TARGETS]
        if unknown:
            raise ConfigError(f"target {described(unknown[0])} is unknown; choose of {', '.join(TARGETS)}")
        wanted = f"{onnx.OLDEST_OPSET} to {onnx.NEWEST_OPSET}"
        if self.opset is not None and as_int("opset", self.opset, wanted, onnx.OLDEST_OPSET) > onnx.NEWEST_OPSET:
            raise ConfigError(f"opset is {described(self.opset)}; choose {wanted}")
        if self.dtype is not None:
            as_choice("dtype", self.dtype, DTYPES)
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", Budget(self.tolerance).tolerance)
        if self.external_data_threshold is not None:
            as_int("external_data_threshold", self.external_data_threshold, "bytes, 0 or more", least=0)
        for name in ("emit_plan", "verify", "force"):
            as_bool(name, getattr(self, name))
        check_instance("build", self.build, engine.BuildOptions, "BuildOptions")
        for profile in as_sequence("profiles", self.profiles):
            check_mapping("profiles", profile, (str,), "sizes such as '1:128:4096'")
        if self.calibration_state is not None:
            as_path("calibration_state", self.calibration_state)
        targets = self.chosen_targets()
        self.build.check(targets)
        for profile in self.profiles:
            for name, text in profile.items():
                Dimension.parse(name, text)  # refuses what is none
        if self.profiles and not set(engine.PACKAGES) & set(targets):
            raise ConfigError(f"profiles have nothing to act on: they are of engines, not of {', '.join(targets)}")
        if self.calibration_state is not None and self.calibrate is None:
            raise ConfigError("calibration_state has nothing to act on: there is no sample data to calibrate with")
        if self.build.strip_weights and "triton" in targets:
            raise ConfigError("strip_weights does not go with triton: the server puts no weights into engines")

    def chosen_targets(self) -> tuple[str, ...]:
        """The targets, the ONNX file first: all others are made from it."""
        if self.targets is None:
            return ("onnx", *(target for target in engine.PACKAGES if engine.installed(target)))
        return tuple(target for target in TARGETS if target == "onnx" or target in self.targets)

    def chosen_opset(self) -> int:
        return self.opset or min(NEWEST_OPSET[target] for target in self.chosen_targets())


@dataclass
class Result:
    """What an export came to: the folder and its report.

    Args:
        leftover: what is left of the folder that was replaced, where it could not be deleted.
    """

    directory: Path
    report: dict[str, Any] = field(repr=False)
    leftover: Path | None = None

    @property
    def passed(self) -> bool:
        """Whether every target was made, one at least was run and compared, and none that was run failed."""
        return bool(self.report["verdict"] == "passed")


Stage = Callable[[str], None]


def export(
    model: nn.Module | ExportedProgram,
    inputs: Mapping[str, str | Tensor] | None = None,
    output_dir: str | os.PathLike[str] = "export",
    *,
    dims: Mapping[str, str] | None = None,
    options: Options | None = None,
    source: str | None = None,
    command: str | None = None,
    reads: Sequence[Path] = (),
    on_written: Callable[[], None] = lambda: None,
    on_stage: Stage = lambda stage: None,
    on_progress: engine.Progress = lambda phase, share: None,
) -> Result:
    """Export a model to ONNX and TensorRT, verify each artifact against eager PyTorch, and write a report.

    Args:
        model: a module, or a program captured by torch.export.
        inputs: for each argument of forward a specification such as "B,S,512:float32", or an example tensor, whose
            sizes are then fixed. Modules of this package need none, and programs need none but where an export asks
            how large integers are, or what a mask means.
        output_dir: the folder; it appears, or replaces an earlier one, only when all is done.
        dims: for each dynamic dimension its sizes, "min:opt:max".
        options: targets and the rest.
        source, command: what the report names as the model and the command.
        reads: files and folders that were read for the model; an output folder that holds one is refused.
        on_written: called once the folder is in its place; what fails or interrupts after that does not undo it.
        on_stage: called with the name of each stage as it begins.
        on_progress: called, while an engine is built, with the builder's phase and the share that is done, 0 to 1.

    Returns:
        The folder and the report. A target that fails is in the report; the others stand.

    Example:
        >>> result = export(adaattn.DenseAttention(64, 4), output_dir="out")
        >>> result.passed
        True

    Raises:
        ConfigError: arguments that do not go together, or that the model does not take.
        ExportError: the model cannot be captured or lowered.
    """
    options = Options() if options is None else options
    inputs, dims = {} if inputs is None else inputs, {} if dims is None else dims
    check_instance("model", model, (nn.Module, ExportedProgram), "a torch.nn.Module or a program of torch.export")
    check_instance("options", options, Options, "adaattn.export.pipeline.Options")
    check_mapping("inputs", inputs, (str, Tensor), "a specification such as 'B,S,512:float32' or a tensor")
    check_mapping("dims", dims, (str,), "sizes such as '1:128:4096'")
    check_function("on_stage", on_stage)
    check_function("on_progress", on_progress)
    model = usable(model)
    specs, examples = _split_inputs(inputs)
    sizes = {name: Dimension.parse(name, text) for name, text in dims.items()}
    out = as_path("output_dir", output_dir)

    clock = _Clock(on_stage)
    notes: list[str] = []
    of_options = (options.build.plugin_library, options.build.timing_cache, options.calibration_state)
    reads = [*reads, *(path for path in of_options if path is not None)]
    with folder.staging(out, options.force, reads, on_written) as staging:
        staged = staging.folder
        calibrated = None
        if options.calibrate is not None:
            with clock.stage("calibrate"):
                model, calibrated = _calibrate(model, options, on_progress)
        with clock.stage("capture"):
            captured, module = _capture(model, specs, examples, sizes, options, notes)
            notes += captured.notes
            profiles = [_profile(captured, narrower) for narrower in options.profiles or ({},)]
        with clock.stage("onnx"):
            lowered = _lower(captured, options)
            names_out = (*captured.output_names, *lowered.written.values())
            captured = replace(captured, output_names=names_out, written=tuple(lowered.written))
            names = list(onnx.planned_nodes(lowered.graph))
            files = onnx.save(lowered.graph, staged / "model.onnx", options.external_data_threshold)
        targets = {"onnx": verify.target("onnx", staged, files)}
        for target in options.chosen_targets()[1:]:
            with clock.stage(target):
                if target == "triton":
                    name = folder.model_name(source or type(model).__name__)
                    targets[target] = _serve(name, staged, captured, options, targets.get("tensorrt"))
                else:
                    targets[target] = _build(target, staged, profiles, options, on_progress)
        layers: list[dict[str, Any]] = []
        expected: list[Expected] = []
        unproven: list[str] = []
        if options.verify:
            with clock.stage("eager"):
                captured = cases.settle(captured, notes)
                reference = Reference(captured)
                expected = [reference.expect(case) for case in cases.cases(captured)]
                goldens = reference.goldens(expected, names)
                if any(want.mode.plans for want in expected) and not any(
                    each.forced or each.layers for each in goldens
                ):
                    notes.append(
                        "calls of adaptive attention are not told apart in the graph (one made twice, or in a branch): "
                        "its plans are neither compared nor forced to fp32, and limits are those of plans that round"
                    )
                golden.save(staged / "golden.npz", goldens)
                golden.save(staged / "trace.npz", trace.record(reference, lowered, cases.small(captured), names))
                layers = summary.layers(names, expected, module)
            unproven = [*cases.unproven(captured), *disagreements(goldens)]
            given = {want.case.name: want.case for want in expected}

            def exact_at(of: golden.Golden, plans: Mapping[str, parity.PlanPair]) -> Mapping[str, golden.Array]:
                return reference.exact_at(given[of.name], [plans[name] for name in names])

            for name, entry in targets.items():
                if entry["verdict"] != "failed" and name != "triton":
                    with clock.stage(f"verify {name}"):
                        backend = "ort-cpu" if name == "onnx" else name
                        verify.verify(entry, backend, staged, goldens, exact_at, options.build.plugin_library)
            verify.withhold(list(targets.values()), unproven)
        else:
            for entry in targets.values():
                entry["reason"] = entry["reason"] or "made, not verified: --no-verify"
        with clock.stage("report"):
            for name, entry in targets.items():
                entry["seconds"] = clock.seconds[name]
            report = summary.report(captured, source or type(model).__name__, options.chosen_opset(), command, notes)
            report["unproven"] = unproven
            report |= {"targets": list(targets.values()), "layers": layers, "seconds": clock.seconds}
            report["calibration"] = None if calibrated is None else summary.calibration(calibrated)
            report["tokens"] = {want.case.name: cases.length(want.case, captured) for want in expected}
            verdicts = {entry["verdict"] for entry in targets.values()}
            verdict = next((each for each in ("failed", "passed") if each in verdicts), "not run")
            report = verify.plain(report | {"verdict": verdict})
            (staged / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
            (staged / "report.html").write_text(render(report), encoding="utf-8")
            summary.write_manifest(staged, report)
    return Result(out, report, staging.leftover)


class _Clock:
    """Seconds of each stage, and word of its beginning."""

    def __init__(self, on_stage: Stage) -> None:
        self.seconds: dict[str, float] = {}
        self._on_stage = on_stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._on_stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _calibrate(
    model: nn.Module | ExportedProgram, options: Options, on_progress: engine.Progress
) -> tuple[nn.Module, Calibration]:
    """A copy of the model in a better basis."""
    if isinstance(model, ExportedProgram):
        raise ConfigError("--calibrate cannot change a program that is captured already; calibrate its model")
    assert options.calibrate is not None
    model = copy.deepcopy(model).eval().cpu()

    def on_batch(done: int) -> None:
        on_progress(f"{done} batches", 0.0)  # of how many only the data knows

    try:
        found = calibrate(model, options.calibrate, resume=options.calibration_state, on_batch=on_batch)
    except AdaAttnError:
        raise
    except Exception as error:  # the user's own code
        raise ConfigError(f"the model fails on the sample data: {type(error).__name__}: {error}") from error
    if not found.layers:
        reasons = (
            "; ".join(dict.fromkeys(found.refused.values())) or "the model has no attention that calibration knows"
        )
        raise ConfigError(f"--calibrate has nothing to act on: {reasons}")
    return model, found


def _split_inputs(inputs: Mapping[str, str | Tensor]) -> tuple[list[InputSpec], dict[str, Tensor]]:
    specs, examples = [], {}
    for name, given in inputs.items():
        if isinstance(given, str):
            specs.append(InputSpec.parse(name, given))
        elif isinstance(given, Tensor):
            specs.append(InputSpec(name, tuple(given.shape), str(given.dtype).removeprefix("torch.")))
            examples[name] = given.detach().cpu().clone()
        else:
            raise ConfigError(f"input {name!r} is a {type(given).__name__}; give a specification or a tensor")
    if examples and len(examples) < len(specs):
        raise ConfigError("some inputs are tensors and some specifications; give all of one kind")
    return specs, examples


def _capture(
    model: nn.Module | ExportedProgram,
    specs: list[InputSpec],
    examples: dict[str, Tensor],
    sizes: dict[str, Dimension],
    options: Options,
    notes: list[str],
) -> tuple[Captured, nn.Module | None]:
    """The captured program, and the module that it is of, where there is one."""
    if isinstance(model, ExportedProgram):
        if examples:
            raise ConfigError("a program has its own example inputs; give specifications, such as ids=B,S:int64<30522")
        for name, given in (("--dtype", options.dtype), ("--tolerance", options.tolerance)):
            if given:
                raise ConfigError(f"{name} cannot change a program that is captured already; capture it anew with it")
        _warn_of_weights({**model.state_dict, **model.constants}, notes)
        return with_specs(capture_program(model, sizes), specs), None
    elsewhere = any(x.device.type != "cpu" for x in model.state_dict().values() if isinstance(x, Tensor))
    if options.dtype is not None or options.tolerance is not None or model.training or elsewhere:
        model = copy.deepcopy(model).eval().cpu()  # the caller's stays as it is
    if options.dtype is not None:
        model = model.to(DTYPES[options.dtype])
    if options.tolerance is not None:
        _set_tolerance(model, options.tolerance, notes)
    _warn_of_weights(model.state_dict(), notes)
    return capture_module(model, specs or default_inputs(model), sizes, examples or None), model


def _lower(captured: Captured, options: Options) -> onnx.Lowered:
    dim_names = {symbol: size.name for symbol, size in captured.dims.items()}
    input_names = [item.name for item in captured.inputs]
    return onnx.lower(
        captured.program, options.chosen_opset(), dim_names, input_names, captured.output_names, options.emit_plan
    )


def _set_tolerance(model: nn.Module, tolerance: float, notes: list[str]) -> None:
    Budget(tolerance)  # refuses what is out of range
    changed = len(integration.configs_of(model))
    if changed:
        integration.set_tolerance(model, tolerance)
    for name, module in model.named_modules():
        if isinstance(module, PlannedAttention):
            try:
                module.set_tolerance(tolerance)
                changed += 1
            except ConfigError as error:
                notes.append(f"{name or type(module).__name__} keeps its plan: {error}")
    if not changed:
        raise ConfigError("--tolerance has nothing to act on: the model has no adaptive attention of this package")


def _warn_of_weights(state: Mapping[str, Any], notes: list[str]) -> None:
    for name, x in state.items():
        if not isinstance(x, Tensor) or x.dtype not in (torch.float64, *DTYPES.values()) or not x.numel():
            continue  # of float8 torch counts nothing
        if not all(end.isfinite() for end in x.aminmax()):  # NaN if x has one; without a tensor of booleans
            count = int((~x.isfinite()).sum())
            notes.append(f"weight {name} has {count} NaN or Inf of {x.numel()} numbers")


def _profile(captured: Captured, narrower: Mapping[str, str]) -> engine.Profile:
    """Shapes of the inputs at the least, usual and largest sizes of the dimensions."""
    dims = dict(captured.dims)
    symbols = {dim.name: symbol for symbol, dim in dims.items()}
    for name, text in narrower.items():
        if name not in symbols:
            known = ", ".join(symbols) or "none"
            raise ConfigError(f"the profile {name}={text} names no dynamic dimension of the model; it has {known}")
        dim, whole = Dimension.parse(name, text), dims[symbols[name]]
        if dim.min < whole.min or dim.max > whole.max:
            raise ConfigError(f"the profile {name}={text} is not within {name}={whole}; widen --dim")
        dims[symbols[name]] = dim
    points = [{symbol: getattr(dim, at) for symbol, dim in dims.items()} for at in ("min", "opt", "max")]
    return {
        item.name: (item.sizes(points[0]), item.sizes(points[1]), item.sizes(points[2])) for item in captured.inputs
    }


def _build(
    target: str, staged: Path, profiles: Sequence[engine.Profile], options: Options, on_progress: engine.Progress
) -> dict[str, Any]:
    model, path, log = staged / "model.onnx", staged / f"{target}.engine", staged / f"{target}.log"
    build = options.build.taken_by(target)
    try:
        about = engine.engine_from_onnx(model, target, path, profiles, build, log, on_progress)
    except TargetError as error:
        path.unlink(missing_ok=True)
        return verify.target(target, staged, [log] if log.exists() else [], "failed", str(error))
    files = [path, engine.sidecar(path), log]
    if target == "tensorrt" and not build.strip_weights:
        files.append(serving.ep_context(model, path))
    return verify.target(target, staged, files) | {"ops": about["ops"]}


def _serve(
    name: str, staged: Path, captured: Captured, options: Options, built: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A model repository of the engine that was built, or of the ONNX file."""
    if built is not None and built["verdict"] == "failed":
        return verify.target("triton", staged, [], "failed", "the engine to serve was not built")
    path = None if built is None else staged / "tensorrt.engine"
    dims = {dim.name: dim for dim in captured.dims.values()}
    files = serving.triton_repository(staged / "triton", name, staged / "model.onnx", dims, path)
    command = serving.triton_command(options.build if built is not None else engine.BuildOptions())
    return verify.target("triton", staged, files, reason=f"written, not run: {command}")
