"""Give the operators of a captured program their types, and what proves that the file has them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.export import ExportedProgram

from adaattn.errors import ConfigError
from adaattn.export.allocation import samples
from adaattn.export.allocation.allocate import Progress, Request, allocate_captured
from adaattn.export.allocation.allocation import Allocation
from adaattn.export.allocation.samples import Sample
from adaattn.export.allocation.sites import Network, network
from adaattn.export.allocation.write import emulated_program, typed_program, unrounded_program
from adaattn.export.capture.captured import Captured
from adaattn.export.capture.saved_program import eager_of
from adaattn.export.formats import FORMATS, Device, formats_of
from adaattn.export.rewrite.program import ATTEND


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


def give_types(captured: Captured, wanted: Allocation | Request, device: Device, on_progress: Progress) -> Typed:
    """Choose types for a captured program, or take those of an earlier allocation, and write them.

    Raises:
        ConfigError: samples that the model does not take, an allocation of another model, or a tolerance that no types
            keep.
    """
    certifying: tuple[Sample, ...] = ()
    if isinstance(wanted, Allocation):
        allocation, found = wanted, network(captured.program, tuple(FORMATS))
        _check_same(found, allocation)
    else:
        found = network(captured.program, formats_of(device, wanted.formats))
        given = samples.read(captured, wanted.samples)
        certifying = given.certifying
        allocation = allocate_captured(captured, found, given, wanted, device, on_progress)
    of = found, allocation.plan, allocation.scales
    emulated, unrounded = (_running(captured, make(*of)) for make in (emulated_program, unrounded_program))
    # Attention that plans at run time is dense now, in float64 too.
    planned = any(node.target is ATTEND for node in captured.program.graph.nodes)
    model = _running(captured, found.program) if planned else captured
    return Typed(allocation, typed_program(*of), replace(emulated, in_double=model.in_double), unrounded, certifying)


def _running(captured: Captured, program: ExportedProgram) -> Captured:
    eager, in_double = eager_of(program, program.module(check_guards=False), captured.inputs)
    return replace(captured, eager=eager, in_double=in_double, original=None)


def _check_same(found: Network, allocation: Allocation) -> None:
    known = {site.name: site.op for site in found.sites.values()}
    given = {site.name: site.op for site in allocation.sites}
    if known != given:
        off = next(iter(sorted(set(known.items()) ^ set(given.items()))))[0]
        raise ConfigError(
            f"the allocation is of another model, or of other versions of what captures it: it differs at {off}; make "
            "it again"
        )
    for site in allocation.sites:
        candidates = next(each.candidates for each in found.sites.values() if each.name == site.name)
        if site.format not in candidates:
            raise ConfigError(
                f"the allocation gives {site.name} the format {site.format}, which {site.op} does not take"
            )
