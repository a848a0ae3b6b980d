"""Prepare a model for its export: calibrate it, capture it, set its tolerance."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from adaattn.attention.base import PlannedAttention
from adaattn.calibration import Calibration, calibrate
from adaattn.errors import AdaAttnError, ConfigError
from adaattn.export.artifacts.dtypes import dtype_name
from adaattn.export.capture.captured import Captured
from adaattn.export.capture.module import capture_module, default_inputs, with_specs
from adaattn.export.capture.saved_program import capture_program
from adaattn.export.engines import child, description
from adaattn.export.options import DTYPES, Options
from adaattn.input_spec import Dimension, InputSpec
from adaattn.integrations.transformers import registration as integration
from adaattn.integrations.transformers import registry
from adaattn.system.memory import free_memory


def calibrate_copy(
    model: nn.Module | ExportedProgram, options: Options, on_progress: child.Progress
) -> tuple[nn.Module, Calibration]:
    """Return a calibrated copy of the model, and what the calibration found."""
    if isinstance(model, ExportedProgram):
        raise ConfigError("--balance cannot change a program that is captured already; balance its model")
    assert options.samples is not None
    model = copy.deepcopy(model).eval().cpu()

    def on_batch(done: int) -> None:
        on_progress(f"{done} batches", 0.0)  # of how many only the data knows

    try:
        found = calibrate(model, options.samples, resume=options.state, on_batch=on_batch)
    except AdaAttnError:
        raise
    except Exception as error:  # the user's own code
        raise ConfigError(f"the model fails on the sample data: {type(error).__name__}: {error}") from error
    if not found.layers:
        reasons = (
            "; ".join(dict.fromkeys(found.refused.values())) or "the model has no attention that calibration knows"
        )
        raise ConfigError(f"--balance found no attention to calibrate: {reasons}")
    return model, found


def check_memory(model: nn.Module | ExportedProgram) -> None:
    """Refuse a verification for which this machine has too little memory, before anything is made.

    Beside the model there are float64 copies of it and of the program that is compared with it, and the ONNX file in
    two runtimes' hands: the writer's and ONNX Runtime's.

    Raises:
        ConfigError: less is free.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model.state_dict
    weights = [x for x in state.values() if isinstance(x, Tensor)]
    doubles = sum(8 * x.numel() for x in weights if x.is_floating_point())
    needed, free = 2 * doubles + 2 * sum(x.nbytes for x in weights), free_memory()
    if free is not None and needed > free:
        raise ConfigError(
            f"verifying this model takes about {needed / 2**30:.0f} GiB beside it, for its float64 copies, and "
            f"{free / 2**30:.0f} GiB are free; pass --no-verify, or export where there is more memory"
        )


def split_inputs(inputs: Mapping[str, str | InputSpec | Tensor]) -> tuple[list[InputSpec], dict[str, Tensor]]:
    """Return the specifications of inputs, and copies of those that are example tensors.

    Raises:
        ConfigError: a text that is not a specification, or tensors beside specifications.
    """
    specs, examples = [], {}
    for name, given in inputs.items():
        if isinstance(given, InputSpec):
            specs.append(given)
        elif isinstance(given, str):
            specs.append(InputSpec.parse(name, given))
        else:
            specs.append(InputSpec(name, tuple(given.shape), dtype_name(given.dtype)))
            examples[name] = given.detach().cpu().clone()
    if examples and len(examples) < len(specs):
        raise ConfigError("some inputs are tensors and some specifications; give all of one kind")
    return specs, examples


def capture(
    model: nn.Module | ExportedProgram,
    specs: list[InputSpec],
    examples: dict[str, Tensor],
    sizes: dict[str, Dimension],
    options: Options,
    notes: list[str],
) -> tuple[Captured, nn.Module | None]:
    """Return the captured program, and the module that it was captured from, if any."""
    if isinstance(model, ExportedProgram):
        if examples:
            raise ConfigError("a program has its own example inputs; give specifications, such as ids=B,S:int64<30522")
        if options.dtype:
            raise ConfigError("--dtype cannot change a program that is captured already; capture it anew with it")
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


def _set_tolerance(model: nn.Module, tolerance: float, notes: list[str]) -> None:
    """Set the tolerance of all adaptive attention in a model."""
    if registry.configs_of(model):
        integration.set_tolerance(model, tolerance)
    for name, module in model.named_modules():
        if isinstance(module, PlannedAttention):
            try:
                module.set_tolerance(tolerance)
            except ConfigError as error:
                notes.append(f"{name or type(module).__name__} keeps its plan: {error}")


def _warn_of_weights(state: Mapping[str, Any], notes: list[str]) -> None:
    for name, x in state.items():
        if not isinstance(x, Tensor) or x.dtype not in (torch.float64, *DTYPES.values()) or not x.numel():
            continue  # of float8 torch counts nothing
        if not all(end.isfinite() for end in x.aminmax()):  # NaN if x has one; without a tensor of booleans
            count = int((~x.isfinite()).sum())
            notes.append(f"weight {name} has {count} NaN or Inf of {x.numel()} numbers")


def engine_profile(captured: Captured, narrower: Mapping[str, Dimension]) -> description.Profile:
    """Return the shapes of the inputs at the least, usual and largest sizes of the dimensions."""
    dims = dict(captured.dims)
    symbols = {dim.name: symbol for symbol, dim in dims.items()}
    for name, dim in narrower.items():
        if name not in symbols:
            known = ", ".join(symbols) or "none"
            raise ConfigError(f"the profile {name}={dim} names no dynamic dimension of the model; it has {known}")
        whole = dims[symbols[name]]
        if dim.min < whole.min or dim.max > whole.max:
            raise ConfigError(f"the profile {name}={dim} is not within {name}={whole}; widen --dim")
        dims[symbols[name]] = dim
    points = [{symbol: getattr(dim, at) for symbol, dim in dims.items()} for at in ("min", "opt", "max")]
    return {
        item.name: (item.sizes(points[0]), item.sizes(points[1]), item.sizes(points[2])) for item in captured.inputs
    }
