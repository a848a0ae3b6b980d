"""Export a model to a folder of verified artifacts, which appears complete or not at all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from adaattn.checks import (
    as_path,
    check_function,
    check_instance,
    check_mapping,
)
from adaattn.errors import ConfigError, TargetError
from adaattn.export.allocation.allocate import Request
from adaattn.export.allocation.allocation import Allocation
from adaattn.export.allocation.apply import give_types
from adaattn.export.allocation.goldens import typed_goldens
from adaattn.export.artifacts import folder, manifest
from adaattn.export.artifacts.arrays import Array
from adaattn.export.artifacts.report import FAILED, Package, Report, TargetResult, artifacts
from adaattn.export.capture.arguments import with_arguments
from adaattn.export.capture.captured import Captured
from adaattn.export.capture.module import default_inputs
from adaattn.export.engines import build as engine_build
from adaattn.export.engines import child, description
from adaattn.export.engines import options as engine_options
from adaattn.export.formats import FP8, PLUGIN, Device, device_of
from adaattn.export.golden import attention_statistics, cases, record_nodes
from adaattn.export.golden.eager import EagerReference, Expected, disagreements
from adaattn.export.onnx import lower, save
from adaattn.export.options import Options
from adaattn.export.parity import compare, criterion, golden_case
from adaattn.export.parity.golden_case import GoldenCase
from adaattn.export.prepare import calibrate_copy, capture, check_memory, engine_profile, split_inputs
from adaattn.export.report import summary
from adaattn.export.report.html import render
from adaattn.export.rewrite.program import ADAPTIVE, Rewritten, departures, rewrite
from adaattn.export.serving import ep_context, triton_server
from adaattn.export.sources.source import usable
from adaattn.export.verification import verify
from adaattn.input_spec import Dimension, InputSpec
from adaattn.plugins import onnx_file


@dataclass
class Result:
    """The result of an export: its folder and its report.

    Args:
        report: the content of report.json.
        leftover: what is left of the folder that was replaced, where it could not be deleted.
    """

    directory: Path
    report: dict[str, Any] = field(repr=False)
    leftover: Path | None = None

    @property
    def passed(self) -> bool:
        """Whether at least one target was compared and passed, and none failed."""
        return bool(self.report["verdict"] == "passed")


Stage = Callable[[str], None]
ATTENTION_OP = "scaled_dot_product_attention"  # as an allocation names it


def export(
    model: nn.Module | ExportedProgram,
    inputs: Mapping[str, str | InputSpec | Tensor] | None = None,
    output_dir: str | os.PathLike[str] = "export",
    *,
    dims: Mapping[str, str | Dimension] | None = None,
    constants: Mapping[str, Any] | None = None,
    options: Options | None = None,
    source: str | None = None,
    command: str | None = None,
    reads: Sequence[Path] = (),
    on_written: Callable[[], None] = lambda: None,
    on_stage: Stage = lambda stage: None,
    on_progress: child.Progress = lambda phase, share: None,
) -> Result:
    """Export a model to ONNX and TensorRT, verify each artifact against eager PyTorch, and write a report.

    Args:
        model: a module, or a program captured by torch.export.
        inputs: for each argument of forward a specification such as "B,S,512:float32" (a text or an InputSpec), or an
            example tensor, whose sizes are then fixed. Modules of this package need none. Programs need them only
            where an export asks for the range of integers or the meaning of a mask. "pair.0" is within a tuple that
            forward takes as `pair`, and "batch.ids" within a dictionary.
        output_dir: the folder; it appears, or replaces an earlier one, only when the export is complete.
        dims: for each dynamic dimension its sizes, "min:opt:max" or a Dimension.
        constants: what other arguments of forward get: numbers, texts, booleans or None.
        options: targets, opset, types and engine options; by default `Options()`.
        source, command: the model and the command, as the report names them.
        reads: files and folders that were read for the model; an output folder that holds one is refused.
        on_written: called once the folder is in its place; an error or interrupt after that does not undo it.
        on_stage: called with the name of each stage as it begins.
        on_progress: called during an engine build with the builder's phase and the finished share, 0 to 1.

    Returns:
        The folder and the report. A target that fails is in the report, and the others are still made.

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
    check_instance("options", options, Options, "adaattn.export.options.Options")
    wanted = "a specification such as 'B,S,512:float32' or a tensor"
    check_mapping("inputs", inputs, (str, InputSpec, Tensor), wanted)
    check_mapping("dims", dims, (str, Dimension), "sizes such as '1:128:4096'")
    check_function("on_stage", on_stage)
    check_function("on_progress", on_progress)
    model = usable(model)
    specs, examples = split_inputs(inputs)
    sizes = {name: Dimension.of(name, given) for name, given in dims.items()}
    out = as_path("output_dir", output_dir)
    source = source or type(model).__name__

    if options.verify:
        check_memory(model)
    clock = _Clock(on_stage)
    notes: list[str] = []
    of_options = (options.build.plugin_library, options.build.timing_cache, options.state)
    reads = [*reads, *(path for path in of_options if path is not None)]
    with folder.staging(out, options.force, reads, on_written) as staging:
        staged = staging.folder
        calibrated = None
        if options.balance:
            with clock.stage("balance"):
                model, calibrated = calibrate_copy(model, options, on_progress)
        with clock.stage("capture"):
            if isinstance(model, nn.Module):
                described = specs or ([] if not constants else list(default_inputs(model)))
                model, specs, examples = with_arguments(model, described, examples, constants or {})
            elif constants:
                raise ConfigError("constants cannot change a program that is captured already; capture it with them")
            captured, module = capture(model, specs, examples, sizes, options, notes)
            notes += captured.notes
        with clock.stage("attention"):
            captured = cases.settle(captured, notes) if options.verify else captured
            known = partial(cases.proof, captured)
            captured, attentions = rewrite(captured, options.tolerance, known, replan=module is None)
            notes += _without_effect(attentions, options)
            profiles = [engine_profile(captured, narrower) for narrower in options.chosen_profiles()]
        typed = None
        if options.typed:
            with clock.stage("allocation"):
                typed = give_types(captured, *_types_of(options), options.chosen_targets(), on_progress)
                typed.allocation.save(staged / "allocation.json")
                notes += _without_plugin(typed.allocation, options)
        with clock.stage("onnx"):
            lowered = _lower(captured if typed is None else replace(captured, program=typed.program), options)
            if typed is not None:
                lowered.graph.metadata_props[onnx_file.TYPED] = json.dumps(typed.allocation.work())
            names_out = (*captured.output_names, *lowered.written.values())
            captured = replace(captured, output_names=names_out, written=tuple(lowered.written))
            files = save.save(lowered.graph, staged / "model.onnx", options.external_data_threshold)
        targets = [TargetResult("onnx", artifacts(staged, files))]
        for name in options.chosen_targets()[1:]:
            with clock.stage(name):
                targets.append(_build(name, staged, profiles, options, on_progress))
                notes += [] if typed is None else _fallbacks(targets[-1], typed.allocation, _device(options))
        serving = []
        for server in options.serve:
            with clock.stage(f"serve {server}"):
                serving.append(_serve(server, folder.model_name(source), staged, captured, targets, options))
        layers: list[dict[str, Any]] = []
        expected: list[Expected] = []
        unproven: list[str] = []
        if options.verify:
            with clock.stage("eager"):
                reference = EagerReference(captured)
                if typed is None:
                    expected, goldens, layers = _eager(captured, reference, lowered, module, staged, options, notes)
                else:
                    expected, goldens = typed_goldens(typed, notes)
                    golden_case.save(staged / "golden.npz", goldens)
                unproven = [*cases.unproven(captured), *disagreements(goldens), *departures(captured, reference.double)]
            targets = _verify(targets, goldens, _exact_at(reference, expected, lowered), staged, options, clock)
            targets = verify.withhold(targets, unproven)
        else:
            said = "made, not verified: --no-verify"
            targets = [replace(target, reason=target.reason or said) for target in targets]
        with clock.stage("report"):
            report = Report(
                model=summary.about(captured, source),
                inputs={item.name: captured.shape_text(item) for item in captured.inputs},
                dims={dim.name: str(dim) for dim in captured.dims.values()},
                opset=options.chosen_opset(),
                versions=manifest.versions(),
                command=command or "",
                warnings=notes,
                unproven=unproven,
                targets=[replace(target, seconds=clock.seconds[target.name]) for target in targets],
                serving=serving,
                layers=layers,
                attentions=[asdict(each) for each in attentions],
                allocation=None if typed is None else typed.allocation.as_json(),
                seconds=clock.seconds,
                calibration=None if calibrated is None else summary.calibration(calibrated),
                tokens={want.case.name: cases.length(want.case, captured) for want in expected},
            ).as_json()
            (staged / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
            (staged / "report.html").write_text(render(report), encoding="utf-8")
            manifest.write_manifest(staged, report)
    return Result(out, report, staging.leftover)


def _types_of(options: Options) -> tuple[Allocation | Request, Device]:
    """Return what operators get types by, and the GPU whose times count."""
    device = _device(options)
    if options.output_tolerance is None:
        given = options.allocation
        return given if isinstance(given, Allocation) else Allocation.load(as_path("allocation", given)), device
    assert options.samples is not None
    wanted = Request(
        options.output_tolerance,
        options.samples,
        options.quantile,
        options.formats,
        options.attention == "plugin",
        options.metric,
        options.state,
    )
    return wanted, device


def _device(options: Options) -> Device:
    """Return the slowest of the GPUs that engines are built for."""
    capabilities: Sequence[str] = ()
    if "tensorrt-rtx" in options.chosen_targets():
        capabilities = options.build.compute_capabilities or engine_options.RTX_COMPUTE_CAPABILITIES
    return device_of(capabilities)


def _fallbacks(target: TargetResult, allocation: Allocation, device: Device) -> list[str]:
    """Return a warning where an engine runs attention of fp8 in half precision, with the time that it adds."""
    became = [each for each in (target.ops or {}).values() if each in ("fused", "half precision")]
    fallen = became.count("half precision")
    if not fallen:
        return []
    flops = sum(site.flops for site in allocation.sites if site.format == FP8 and site.op == ATTENTION_OP)
    added = flops * (1 / device.fp16 - 1 / device.fp8) / 1e12 * fallen / len(became)
    return [
        f"{target.name} runs {fallen} of {len(became)} attentions of fp8 in half precision, which adds about "
        f"{added / allocation.cost:.0%} to the estimated time; --formats fp32,bf16,fp16 leaves fp8 out"
    ]


def _without_effect(attentions: Sequence[Rewritten], options: Options) -> list[str]:
    """Return a warning if the tolerance changes nothing."""
    if options.tolerance is None or any(each.became == ADAPTIVE for each in attentions):
        return []
    if not attentions:
        return ["--tolerance changes nothing: the model has no attention"]
    return ["--tolerance changes nothing: no attention of the model can be adaptive"]


def _without_plugin(allocation: Allocation, options: Options) -> list[str]:
    """Return a warning if no attention became the op."""
    if options.attention != "plugin" or any(site.format == PLUGIN for site in allocation.sites):
        return []
    return [
        "--attention plugin changes nothing: no attention that adaptive_attention takes, with fp16 operands of four "
        "dimensions and equal head sizes, has less than fp32"
    ]


class _Clock:
    """Measure the seconds of each stage, and report when it begins."""

    def __init__(self, on_stage: Stage) -> None:
        self.seconds: dict[str, float] = {}
        self._on_stage = on_stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._on_stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _lower(captured: Captured, options: Options) -> lower.Lowered:
    dim_names = {symbol: size.name for symbol, size in captured.dims.items()}
    input_names = [item.name for item in captured.inputs]
    return lower.lower(
        captured.program,
        options.chosen_opset(),
        dim_names,
        input_names,
        captured.output_names,
        options.emit_plan,
        options.chosen_targets(),
    )


def _build(
    target: str, staged: Path, profiles: Sequence[description.Profile], options: Options, on_progress: child.Progress
) -> TargetResult:
    model, path, log = staged / "model.onnx", staged / f"{target}.engine", staged / f"{target}.log"
    build = options.build.taken_by(target)
    try:
        info = engine_build.engine_from_onnx(model, target, path, profiles, build, log, on_progress)
    except TargetError as error:
        path.unlink(missing_ok=True)
        return TargetResult(target, artifacts(staged, [log] if log.exists() else []), FAILED, str(error))
    return TargetResult(target, artifacts(staged, [path, description.sidecar(path), log]), ops=info.ops)


def _serve(
    server: str, name: str, staged: Path, captured: Captured, targets: Sequence[TargetResult], options: Options
) -> Package:
    """Write what a server wants: of the tensorrt engine where that is a target, else of the ONNX file."""
    model, engine = staged / "model.onnx", staged / "tensorrt.engine"
    built = next((target for target in targets if target.name == "tensorrt"), None)
    if built is not None and built.verdict == FAILED:
        return Package(server, [], "")
    if server == "onnxruntime":
        return Package(server, artifacts(staged, [ep_context.ep_context(model, engine)]), ep_context.COMMAND)
    dims = {dim.name: dim for dim in captured.dims.values()}
    path = None if built is None else engine
    files = triton_server.triton_repository(staged / "triton", name, model, dims, path)
    command = triton_server.triton_command(options.build if built is not None else engine_options.BuildOptions())
    return Package(server, artifacts(staged, files), command)


def _eager(
    captured: Captured,
    reference: EagerReference,
    lowered: lower.Lowered,
    module: nn.Module | None,
    staged: Path,
    options: Options,
    notes: list[str],
) -> tuple[list[Expected], list[GoldenCase], list[dict[str, Any]]]:
    """Run eager PyTorch on all cases and write golden.npz and trace.npz; return what a verdict and the report need."""
    names = list(lower.planned_nodes(lowered.graph))
    expected = [reference.expect(case) for case in cases.cases(captured)]
    goldens = reference.goldens(expected, names)
    if any(want.mode.plans for want in expected) and not any(each.forced or each.layers for each in goldens):
        notes.append(
            "calls of adaptive attention are not told apart in the graph (one made twice, or in a branch): "
            "its plans are neither compared nor forced to fp32, and limits are those of plans that round"
        )
    golden_case.save(staged / "golden.npz", goldens)
    trace = record_nodes.record(reference, lowered, cases.small(captured), names)
    golden_case.save(staged / "trace.npz", trace)
    return expected, goldens, attention_statistics.attention_statistics(names, expected, module, options.tolerance)


def _exact_at(reference: EagerReference, expected: Sequence[Expected], lowered: lower.Lowered) -> compare.ExactAt:
    """Return what computes float64 outputs at the plans of a backend."""
    names = list(lower.planned_nodes(lowered.graph))
    given = {want.case.name: want.case for want in expected}

    def exact_at(of: GoldenCase, plans: Mapping[str, criterion.PlanPair]) -> Mapping[str, Array]:
        return reference.exact_at(given[of.name], [plans[name] for name in names])

    return exact_at


def _verify(
    targets: Sequence[TargetResult],
    goldens: Sequence[GoldenCase],
    exact_at: compare.ExactAt,
    staged: Path,
    options: Options,
    clock: _Clock,
) -> list[TargetResult]:
    verified = []
    for target in targets:
        if target.verdict != FAILED:
            with clock.stage(f"verify {target.name}"):
                backend = "ort-cpu" if target.name == "onnx" else target.name
                library = options.build.plugin_library
                target = verify.verify_target(target, backend, staged, goldens, exact_at, library)
        verified.append(target)
    return verified
