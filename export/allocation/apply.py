"""Give the operators of a captured program their types, and what proves that the file has them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.export import ExportedProgram

from adaattn.checks import as_choice, as_path, check_instance
from adaattn.errors import ConfigError
from adaattn.export.allocation.allocate import Metric, Progress, Request, allocate_captured
from adaattn.export.allocation.allocation import Allocation
from adaattn.export.allocation.samples import Sample, read
from adaattn.export.allocation.sites import Network, network
from adaattn.export.allocation.write import emulated_program, typed_program, unrounded_program
from adaattn.export.capture.captured import Captured
from adaattn.export.capture.saved_program import capture_program, eager_of
from adaattn.export.formats import TYPES, Device, device_of, formats_of
from adaattn.export.golden import cases
from adaattn.export.rewrite.program import ATTEND, rewrite
from adaattn.input_spec import Dimension
from adaattn.planning.budget import as_tolerance

ATTENTION = ("operators", "plugin")
"""What attention may become where it is not fp32."""


@dataclass(frozen=True)
class Typed:
    """A program with types, and the programs that say what its file must compute.

    Args:
        program: for torch.onnx.
        emulated: rounds as the types say; its float64 copy is that of the model, which rounds nothing.
        unrounded: has the weights that the file stores, and rounds nothing else, in float64 neither.
        samples: that certified the allocation; none where it was made before.
    """

    allocation: Allocation
    program: ExportedProgram
    emulated: Captured
    unrounded: Captured
    samples: tuple[Sample, ...]


def allocate(
    program: ExportedProgram,
    samples: Iterable[Any],
    tolerance: float,
    *,
    dims: Mapping[str, str | Dimension] | None = None,
    compute_capabilities: Sequence[str] = (),
    quantile: float = 0.95,
    formats: Sequence[str] | None = None,
    attention: str = ATTENTION[0],
    metric: Metric | None = None,
    state: str | os.PathLike[str] | None = None,
    on_progress: Progress = lambda phase, share: None,
) -> Allocation:
    """Choose the cheapest types with which what a program returns keeps a tolerance, as an export of it does.

    `Options(allocation=...)` gives the program these types.

    Args:
        program: captured by torch.export, in float32.
        samples: batches of inputs like what the model will meet: each a tensor, a tuple or list, or a mapping by name.
            Every second sample chooses, the others certify.
        tolerance: accepted relative error of each output, or of `metric` where that is given.
        dims: sizes of the dynamic dimensions by name, as of `export`.
        compute_capabilities: of the GPUs whose times are weighed, such as "8.9"; those of an A100 by default.
        quantile: the share of samples that must keep the tolerance.
        formats: that operators may have, of "fp32", "bf16", "fp16", "fp8"; None for all that the GPUs have.
        attention: what attention becomes where it is not fp32: "operators" of ONNX, or "plugin", the op
            `adaptive_attention` with a constant plan for each head.
        metric: what is bounded instead of the relative error: a function of outputs and reference outputs by name.
        state: a file that keeps what was measured, from which an interrupted call goes on.
        on_progress: called with what is done and its share, 0 to 1.

    Example:
        >>> program = torch.export.export(model, (x,))  # doctest: +SKIP
        >>> allocation = allocate(program, data, 1e-2)  # doctest: +SKIP
        >>> allocation.measured <= 1e-2  # doctest: +SKIP
        True

    Raises:
        ConfigError: arguments that are out of range, samples that the program does not take, outputs that have no
            relative error, or a tolerance that no types keep.
    """
    check_instance("program", program, ExportedProgram, "a program of torch.export")
    sizes = {name: Dimension.of(name, given) for name, given in (dims or {}).items()}
    captured = capture_program(program, sizes)
    captured, _ = rewrite(captured, None, partial(cases.proof, captured))
    device = device_of(compute_capabilities)
    plugin = as_choice("attention", attention, ATTENTION) == "plugin"
    found = network(captured.program, formats_of(device, formats), plugin=plugin)
    path = None if state is None else as_path("state", state)
    wanted = Request(as_tolerance(tolerance), samples, quantile, formats, plugin, metric, path)
    return allocate_captured(captured, found, read(captured, samples), wanted, device, on_progress)


def give_types(
    captured: Captured,
    wanted: Allocation | Request,
    device: Device,
    targets: Collection[str],
    on_progress: Progress,
) -> Typed:
    """Choose types for a captured program, or take those of an earlier allocation, and write them.

    Raises:
        ConfigError: samples that the model does not take, an allocation of another model, or a tolerance that no types
            keep.
    """
    certifying: tuple[Sample, ...] = ()
    if isinstance(wanted, Allocation):
        plugin = any(site.heads for site in wanted.sites)
        allocation, found = wanted, network(captured.program, TYPES, targets, plugin)
        _check_same(found, allocation)
    else:
        found = network(captured.program, formats_of(device, wanted.formats), targets, wanted.plugin)
        given = read(captured, wanted.samples)
        certifying = given.certifying
        allocation = allocate_captured(captured, found, given, wanted, device, on_progress)
    of = found, allocation.plan, allocation.constants
    emulated, unrounded = (_running(captured, make(*of)) for make in (emulated_program, unrounded_program))
    # Attention that plans at run time is dense now, in float64 too.
    planned = any(node.target is ATTEND for node in captured.program.graph.nodes)
    model = _running(captured, found.program) if planned else captured
    return Typed(allocation, typed_program(*of), replace(emulated, in_double=model.in_double), unrounded, certifying)


def _running(captured: Captured, program: ExportedProgram) -> Captured:
    eager, in_double = eager_of(program, program.module(check_guards=False), captured.inputs)
    return replace(captured, eager=eager, in_double=in_double, original=None)


def _check_same(found: Network, allocation: Allocation) -> None:
    here = {site.name: site.op for site in found.sites.values()}
    given = {site.name: site.op for site in allocation.sites}
    if here != given:
        off = next(iter(sorted(set(here.items()) ^ set(given.items()))))[0]
        raise ConfigError(
            f"the allocation is of another model, or of other versions of what captures it: it differs at {off}; make "
            "it again"
        )
    for site in allocation.sites:
        known = next(each for each in found.sites.values() if each.name == site.name)
        if site.heads is not None and site.heads.sizes() != known.head_sizes():
            raise ConfigError(
                f"the allocation plans heads of {site.name} of other sizes than the model's; make it again"
            )
        if site.format not in known.candidates:
            raise ConfigError(
                f"the allocation gives {site.name} the format {site.format}, which {site.op} does not take"
            )
