"""Choose the cheapest types with which a model's output keeps a tolerance, and certify them on samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter

from adaattn.errors import ConfigError
from adaattn.export.allocation import samples as sample_data
from adaattn.export.allocation.allocation import AllocatedSite, Allocation
from adaattn.export.allocation.heads import HeadPlan, PlannedHeads
from adaattn.export.allocation.measure import Measurements
from adaattn.export.allocation.samples import Sample, Samples
from adaattn.export.allocation.sites import Network
from adaattn.export.allocation.solve import Choice, Edge, Problem
from adaattn.export.allocation.state import State
from adaattn.export.allocation.write import Constants, emulated_program
from adaattn.export.capture.captured import Captured
from adaattn.export.formats import FORMATS, PLUGIN, Device, scale_of
from adaattn.export.golden.plan_mode import PlanMode
from adaattn.export.rewrite.prove import Runs

ROUNDS = 5  # of choosing a plan and certifying it
CLOSE = 0.8  # of the tolerance: a plan that comes so near is not improved further
STRIDE = 8.0  # the most that a budget changes from one round to the next
UNKNOWN_METRIC = 1e-2  # budget of the relative error to start with, where a metric of the user's is bounded
WITH_ERRORS = 16  # samples, on which every format is tried at every site; of the others the largest numbers count
WITH_GRADIENTS = 12  # samples, of which there are backward passes

Progress = Callable[[str, float], None]
Metric = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], float]
"""A user's measure: outputs and reference outputs by name → a number, smaller is better."""


@dataclass(frozen=True)
class Request:
    """What types are chosen by.

    Args:
        tolerance: accepted relative error of each output, or of `metric` where that is given.
        samples: batches of inputs, as `samples.read` takes them.
        quantile: the share of samples that must keep the tolerance.
        formats: that sites may have; None for all that the device has.
        plugin: whether attention that is not fp32 becomes `adaptive_attention`, with a constant plan for each head.
        metric: what is bounded instead of the relative error.
        state: a file that keeps what was measured, from which an interrupted allocation goes on.
    """

    tolerance: float
    samples: Iterable[Any]
    quantile: float = 0.95
    formats: Sequence[str] | None = None
    plugin: bool = False
    metric: Metric | None = None
    state: Path | None = None


def allocate_captured(
    captured: Captured,
    network: Network,
    samples: Samples,
    wanted: Request,
    device: Device,
    on_progress: Progress = lambda phase, share: None,
) -> Allocation:
    """Return the cheapest types with which the model's output keeps a tolerance on samples.

    Half of the samples choose: at each site the error of each format is measured against float64, and backward passes
    with random cotangents say what it does to the output. The other half certifies: the whole plan runs with all its
    roundings, and the budget that it was chosen for is corrected, at most ROUNDS times.

    Args:
        captured: the program that the network is of, and its sizes.
        samples: of the program's inputs.
        device: what formats cost.

    Raises:
        ConfigError: outputs without an error, a metric that fails, or a tolerance that no types keep.
    """
    state = State(wanted.state, network, samples.choosing)
    measured = _measured(captured, network, samples.choosing, state, on_progress)
    problem, heads = _problem(network, measured, device)
    settle = partial(_settled, measured, heads)
    certify = _Certifier(captured, network, settle, samples.certifying, wanted.metric)
    plan, errors = _cheapest(problem, certify, wanted, on_progress)
    return _described(problem, network, measured, plan, settle(plan)[1], errors, wanted, device)


def _measured(
    captured: Captured, network: Network, choosing: Sequence[Sample], state: State, on_progress: Progress
) -> Measurements:
    measured = Measurements(network, state.sites)
    graded = sample_data.split_evenly(choosing, WITH_GRADIENTS)
    single, double = Runs(network.program, convert=_same), Runs(network.program)
    largest = single.arguments(max(choosing, key=lambda sample: sum(x.numel() for x in sample.values())))
    _refuse_chance(captured, network, largest)
    measured.count(largest)

    def sensitivity(place: int) -> None:
        measured.measure_sensitivity(single.arguments(graded[place]), seed=place)

    closely = {id(sample) for sample in sample_data.split_evenly(choosing, WITH_ERRORS)}

    def errors(place: int) -> None:
        sample = choosing[place]
        measured.measure_errors(double.arguments(sample), captured.dtype, ranges_only=id(sample) not in closely)

    steps = [partial(sensitivity, place) for place in range(len(graded))]
    steps += [partial(errors, place) for place in range(len(choosing))]
    for place, step in enumerate(steps):
        if place >= state.done:
            on_progress(f"measure {place + 1} of {len(steps)}", place / len(steps))
            step()
            state.save(place + 1, measured)
    if not any(found.gain for found in measured.sites.values()):
        raise ConfigError(
            "no output of floating-point numbers depends on the inputs by an operator that could have another type: "
            f"{', '.join(captured.output_names)}"
        )
    return measured


def _refuse_chance(captured: Captured, network: Network, arguments: Sequence[Any]) -> None:
    """Raise ConfigError where two runs on one sample differ, or no output has a relative error."""
    with torch.no_grad():
        runs = [
            outputs_of(captured, Interpreter(network.program.graph_module).run(*arguments, enable_io_processing=False))
            for _ in range(2)
        ]
    for name, x in runs[0].items():
        if not torch.equal(x.nan_to_num(), runs[1][name].nan_to_num()):
            raise ConfigError(
                f"the model is random: two runs on one sample differ in {name}; leave out dropout "
                "(F.dropout(…, training=self.training)) and torch.rand in forward"
            )
    if not any(x.is_floating_point() for x in runs[0].values()):
        kinds = ", ".join(f"{name} ({str(x.dtype).removeprefix('torch.')})" for name, x in runs[0].items())
        raise ConfigError(f"no output is of floating-point numbers, so none has a relative error: {kinds}")


def outputs_of(captured: Captured, values: Sequence[Any]) -> dict[str, Tensor]:
    """Return the tensors of a program's outputs by name."""
    return dict(zip(captured.output_names, (x for x in values if isinstance(x, Tensor)), strict=False))


def _same(x: Tensor) -> Tensor:
    return x


HeadChoices = Mapping[str, Mapping[str, tuple[HeadPlan, ...]]]
"""For each site whose heads may have plans, the plans by what the solver calls them."""


def _problem(network: Network, measured: Measurements, device: Device) -> tuple[Problem, HeadChoices]:
    choices, heads = [], dict[str, dict[str, tuple[HeadPlan, ...]]]()
    for site in network.sites.values():
        found = measured.sites[site.name]
        forms = [form for form in site.candidates if form != PLUGIN]
        seconds = {form: device.seconds(found.flops, found.read, found.written, form) for form in forms}
        errors = {form: _square(found.sensitivity, found.error(form)) for form in forms}
        if site.heads and not found.overflows(PLUGIN):
            made = found.heads.choices(site.heads, found.gains, found.flops, found.read + found.written, device)
            for place, (plans, spent, error) in enumerate(made):
                label = f"{PLUGIN} {place}"
                seconds[label], errors[label] = spent, error
                heads.setdefault(site.name, {})[label] = plans
        choices.append(Choice(site.name, seconds, errors))
    edges = []
    for operand, takers in network.operands().items():
        root = network.root(operand)
        source = root.name if root in network.sites else None
        consumers = tuple(None if each is None else each.name for each in takers)
        if source is not None or any(name is not None for name in consumers):
            edges.append(Edge(source, consumers, measured.sizes.get(operand.name, 0)))
    return Problem(choices, edges, device), heads


def _square(sensitivity: float, error: float) -> float:
    return (sensitivity * error) ** 2 if error < math.inf else math.inf


def _settled(
    measured: Measurements, heads: HeadChoices, plan: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Sequence[float] | PlannedHeads]]:
    """Return the format of each site, and the constants of those that have some."""
    formats, constants = dict[str, str](), dict[str, Sequence[float] | PlannedHeads]()
    for name, label in plan.items():
        formats[name] = form = label.split()[0]
        if form == PLUGIN:
            constants[name] = measured.sites[name].heads.planned(heads[name][label])
        elif FORMATS[form].quantized:
            constants[name] = [scale_of(peak) for peak in measured.sites[name].peaks]
    return formats, constants


class _Certifier:
    """Runs plans on samples, each with all its roundings in float32, beside the program in float64."""

    def __init__(
        self,
        captured: Captured,
        network: Network,
        settle: Callable[[Mapping[str, str]], tuple[Mapping[str, str], Constants]],
        samples: Sequence[Sample],
        metric: Metric | None,
    ) -> None:
        self._captured, self._network, self._settle, self._metric = captured, network, settle, metric
        self._samples = samples
        self._exact: list[dict[str, Tensor]] = []

    def errors(self, plan: Mapping[str, str], on_progress: Progress) -> list[float]:
        """Return the error of a plan on each sample: that of the worst output, or the user's metric."""
        program = emulated_program(self._network, *self._settle(plan))
        run = Runs(program, convert=_same)
        found = []
        for place, sample in enumerate(self._samples):
            on_progress(f"certify {place + 1} of {len(self._samples)}", place / len(self._samples))
            if place == len(self._exact):
                self._exact.append(self._reference(sample))
            with torch.no_grad():
                outputs = Interpreter(program.graph_module).run(*run.arguments(sample), enable_io_processing=False)
            found.append(self._error(outputs_of(self._captured, outputs), self._exact[place]))
        return found

    def _reference(self, sample: Sample) -> dict[str, Tensor]:
        runs = Runs(self._network.program)
        with torch.no_grad(), PlanMode(double=True, dtype=self._captured.dtype):
            outputs = Interpreter(self._network.program.graph_module).run(
                *runs.arguments(sample), enable_io_processing=False
            )
        return outputs_of(self._captured, outputs)

    def _error(self, outputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
        if self._metric is not None:
            try:
                found = float(self._metric(outputs, exact))
            except Exception as error:  # the user's own code
                raise ConfigError(f"the metric fails: {type(error).__name__}: {error}") from error
            return math.inf if math.isnan(found) else found
        return max(_relative(outputs[name], x) for name, x in exact.items() if x.is_floating_point())


def _relative(got: Tensor, exact: Tensor) -> float:
    """Return the relative error of an output where float64 has numbers; infinite where it is NaN."""
    known = exact.isfinite()
    size, difference = float(exact[known].norm()), float((got.double() - exact)[known].norm())
    found = difference / size if size else difference
    return math.inf if math.isnan(found) else found


def _cheapest(
    problem: Problem, certify: _Certifier, wanted: Request, on_progress: Progress
) -> tuple[dict[str, str], list[float]]:
    """Return the cheapest plan that keeps the tolerance on the certifying samples, and its errors on them."""
    tolerance, quantile = wanted.tolerance, wanted.quantile
    budget = tolerance if wanted.metric is None else UNKNOWN_METRIC
    kept, failures = 0.0, 0  # the largest budget whose plan kept the tolerance, and how many did not
    best: tuple[dict[str, str], list[float]] | None = None
    tried: list[dict[str, str]] = []
    for _ in range(ROUNDS):
        plan = problem.solve(budget)
        if plan in tried:
            break
        tried.append(plan)
        errors = certify.errors(plan, on_progress)
        found = quantile_of(errors, quantile)
        if found > tolerance:
            # Errors that jump, as where a router takes another expert, do not fall with the budget: harder each time.
            failures += 1
            less = min(budget, problem.error(plan)) * max(tolerance / found, 1 / STRIDE) / 2 ** (failures - 1)
            budget = max(min(less, 0.99 * problem.error(plan)), math.sqrt(kept * budget))
            continue
        kept = max(kept, budget)
        if best is None or problem.cost(plan) < problem.cost(best[0]):
            best = plan, errors
        # After a failure none is tried that is nearer to it: the best of several that hardly keep it, on these samples,
        # would not on others.
        if found >= CLOSE * tolerance or failures:
            break
        budget *= min(tolerance / found, STRIDE) if found else STRIDE
    if best is None:
        plan = problem.least()
        errors = certify.errors(plan, on_progress)
        if quantile_of(errors, quantile) > tolerance:
            raise ConfigError(
                f"no types keep {tolerance:g}: float32 everywhere has {quantile_of(errors, quantile):.1e} on the "
                "certifying samples, which is the least that can be asked for"
            )
        best = plan, errors
    return best


def quantile_of(errors: Sequence[float], quantile: float) -> float:
    """Return what a new sample's error stays under with a probability of `quantile`: a conformal quantile.

    That is the k-th smallest of n errors with k = ceil((n + 1) · quantile); where k exceeds n, the largest.

    Example:
        >>> quantile_of([1.0, 2.0, 3.0], 0.5)
        2.0
    """
    place = math.ceil((len(errors) + 1) * quantile)
    return sorted(errors)[min(place, len(errors)) - 1]


def _described(
    problem: Problem,
    network: Network,
    measured: Measurements,
    plan: Mapping[str, str],
    constants: Constants,
    errors: Sequence[float],
    wanted: Request,
    device: Device,
) -> Allocation:
    total = problem.error(plan) ** 2
    sites = []
    for site in network.sites.values():
        found, square, known = (
            measured.sites[site.name],
            problem.square(site.name, plan[site.name]),
            constants.get(site.name),
        )
        heads = known if isinstance(known, PlannedHeads) else None
        sites.append(
            AllocatedSite(
                name=site.name,
                path=site.path,
                op=site.op,
                format=plan[site.name].split()[0],
                product=site.product,
                errors={each: found.error(each) for each in site.candidates if each != PLUGIN},
                sensitivity=found.sensitivity,
                share=square / total if total else 0.0,
                flops=found.flops,
                scales=() if known is None or isinstance(known, PlannedHeads) else tuple(known),
                heads=heads,
            )
        )
    return Allocation(
        tolerance=wanted.tolerance,
        quantile=wanted.quantile,
        metric=None if wanted.metric is None else getattr(wanted.metric, "__name__", "metric"),
        device=device.name,
        sites=tuple(sites),
        predicted=math.sqrt(total),
        certified=tuple(errors),
        measured=quantile_of(errors, wanted.quantile),
        cost=problem.cost(plan),
        cost_fp32=problem.cost(problem.least()),
        casts=problem.casts(plan),
    )
