"""Run a case in eager PyTorch, in the model's own type and in float64 at the same plans, and set its limits.

One file, though long: case, limits, probes and plans of one class, each of which reads the others' runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaattn.errors import ConfigError
from adaattn.export.artifacts.arrays import Array
from adaattn.export.artifacts.dtypes import dtype_name
from adaattn.export.capture.captured import Captured
from adaattn.export.golden.cases import Case
from adaattn.export.golden.plan_mode import PlanCall, PlanMode, reference, run_eager, to_double
from adaattn.export.parity.criterion import (
    EXACT,
    OPERAND,
    PROBE_EDGE,
    ROUNDING_SHARE,
    RULES,
    WARN_LIMIT,
    PlanPair,
    clip_to_dtype,
    largest_relative_error,
    limit_of,
    probe_inputs,
    separate_fill_values,
)
from adaattn.export.parity.golden_case import ExpectedAttention, ExpectedOutput, GoldenCase
from adaattn.export.parity.metrics import relative_error
from adaattn.heads import per_query_head
from adaattn.planning.precision import FP32, PRECISIONS

TRIVIAL = "shortest"


@dataclass(frozen=True)
class ForcedPlan:
    """A plan that every attention of a model is forced to.

    Args:
        precision: a code.
        quarters: of head_dim, rounded up, that the rank keeps.
    """

    precision: int = FP32
    quarters: int = 4

    def __str__(self) -> str:
        if self.quarters < 4:
            return f"rank {self.quarters} of 4"
        return PRECISIONS[self.precision]

    def of_heads(self, like: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """Return precision and rank for each head of a plan."""
        return torch.full_like(like, self.precision), torch.full_like(like, -(-head_dim * self.quarters // 4))

    def plans(self, mode: PlanMode) -> list[tuple[Tensor, Tensor]]:
        """Return the forced plan of each call that a mode saw."""
        calls = zip(mode.plans, mode.errors, strict=True)
        return [self.of_heads(precision, errors.head_dim) for (precision, _), errors in calls]


@dataclass(frozen=True)
class Expected:
    """A case in both types, and what the modes saw of its attention; `forced` says to what plan, if to one."""

    case: Case
    outputs: dict[str, Tensor]
    exact: dict[str, Tensor]
    mode: PlanMode
    double: PlanMode
    forced: ForcedPlan | None = None


class EagerReference:
    """Eager PyTorch in the model's type and in float64."""

    def __init__(self, captured: Captured) -> None:
        self.dtype = dtype_name(captured.dtype)
        self._eager, self.double, self._names = captured.eager, captured.in_double(), captured.output_names
        self.written = captured.written
        self.double_mode = partial(PlanMode, double=True, dtype=captured.dtype)
        self._nudged: tuple[Case, list[PlanMode]] | None = None
        self._inputs: dict[str, tuple[Case, dict[str, Array]]] = {}

    def goldens(self, expected: Sequence[Expected], layers: Sequence[str]) -> list[GoldenCase]:
        """Return all that a verdict needs: the cases, the same with forced plans, and probes of the plans.

        Every case runs once more with all plans forced to fp32 at full rank, where nothing is rounded and the rule is
        sharp. Each attention runs by itself at each other precision and rank that the plans may take, on its operands
        in one of the smaller cases. Each plan runs by itself on moments over six decades, for all steps of its ladder.

        Args:
            expected: the cases, run with the plans that the model makes.
            layers: names of the planned attentions, in the order of their calls.
        """
        found = [self.golden(want, layers) for want in expected]
        planned = [want for want in expected if want.mode.plans and len(want.mode.plans) == len(layers)]
        exact = [self.expect(want.case, ForcedPlan(), want.mode) for want in planned if not _is_exact(want.mode)]
        found += [self.golden(want, layers) for want in exact]
        if planned:
            usual, small = PlanMode(keep=True), min(planned, key=_size).case
            run_eager(self._eager, small.inputs, usual)
            steps = forced_plans(want.mode for want in planned)
            for layer, call, operands in zip(layers, usual.planned, usual.calls, strict=True):
                if call is not None:
                    found.append(plan_probe(layer, call))
                found += self._attention_probes(layer, operands, steps, self._arrays(small))
        return found

    def _attention_probes(
        self, layer: str, given: Mapping[str, Any], steps: Sequence[ForcedPlan], inputs: Mapping[str, Array]
    ) -> list[GoldenCase]:
        """Return golden cases of one attention on its operands at each of some plans.

        Args:
            given: the arguments of the attention.
            inputs: of the model, in which a mask is that the operands are not computed from.
        """
        tokens = ("query", "key", "value")
        kept = {f"{OPERAND}{name}": array(given[name]) for name in (*tokens, "attn_mask") if given[name] is not None}
        inputs = {**inputs, **kept}
        wide = {name: x.double() if name in tokens else x for name, x in given.items()}

        def at(operands: Mapping[str, Any], rung: ForcedPlan) -> Tensor:
            precision, rank = rung.of_heads(given["precision"], given["query"].shape[3])
            output: Tensor = reference("adaptive_attention", **{**operands, "precision": precision, "rank": rank})
            return output

        found, whole = [], at(wide, ForcedPlan())
        for rung in steps:
            exact = at(wide, rung)
            # Of a rank that is cut nothing is rounded.
            rounding = 0.0 if rung.precision == FP32 else min(1.0, _error(array(exact), array(whole)))
            outputs = {f"{layer}.output": self.output(at(given, rung), exact, rounding)}
            precision, rank = (array(x) for x in rung.of_heads(given["precision"], given["query"].shape[3]))
            forced = {layer: ExpectedAttention(precision, rank, np.zeros(precision.shape, bool))}
            found.append(GoldenCase(f"{layer} at {rung}", inputs, outputs, forced, str(rung), layer))
        return found

    def expect(self, case: Case, forced: ForcedPlan | None = None, like: PlanMode | None = None) -> Expected:
        """Run a case.

        Args:
            forced: the plan of every attention; None to let the model plan.
            like: the mode that saw the same case with the model's plans, where plans are forced.

        Raises:
            ConfigError: eager PyTorch itself fails on it, or returns something else when it is called again.
        """
        mode = PlanMode(measure=True, plans=None if forced is None or like is None else forced.plans(like))
        try:
            outputs = self._named(run_eager(self._eager, case.inputs, mode, self.written))
            # Of the longest case a second run would cost most and show nothing new.
            once = forced is not None or case.name == "longest"
            again = None if once else run_eager(self._eager, case.inputs, PlanMode(), self.written)
        except Exception as error:  # the user's own code
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in case.inputs.items())
            raise ConfigError(
                f"the model fails on the golden inputs {case.name!r} ({shapes}): {type(error).__name__}: {error}; "
                "narrow --dim, give integers their range as in ids=B,S:int64<30522, or pass --no-verify"
            ) from error
        if again is not None:
            _refuse_chance(case, outputs, again)
        exact, double = self.exact(case, mode.plans)
        return Expected(case, outputs, exact, mode, double, forced)

    def exact(self, case: Case, plans: Sequence[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], PlanMode]:
        """Return float64 outputs at given plans."""
        return self._in_double(case, self.double_mode(plans=plans))

    def _in_double(self, case: Case, mode: PlanMode) -> tuple[dict[str, Tensor], PlanMode]:
        inputs = {name: to_double(x) for name, x in case.inputs.items()}
        return self._named(run_eager(self.double, inputs, mode, self.written)), mode

    def golden(self, expected: Expected, layers: Sequence[str]) -> GoldenCase:
        """Return the golden case that a verdict needs.

        Args:
            layers: names of the planned attentions, in the order of their calls.
        """
        rounding = rounding_of(expected.mode)
        shaken, noisy = self._shaken(expected), self._noisy(expected)
        off_edges = [*shaken]
        if self.dtype == "float64":  # eager is the yardstick itself, and tells nothing of what a rounding does
            off_edges += [*noisy[:2], self._in_double(expected.case, self._replayed(expected, narrow=True))[0]]
        outputs = {}
        for name, x in expected.outputs.items():
            moved = [each[name] for each in (off_edges if x.is_floating_point() else noisy)]
            unsure = _unsure(expected.exact[name], [each[name] for each in noisy])
            outputs[name] = self.output(x, expected.exact[name], rounding, moved, unsure)
        # Fewer layers than calls: calls that were one and the same have become one.
        named = layers if len(layers) == len(expected.mode.plans) else ()
        kept = {name: self._layer(expected, place, rounding) for place, name in enumerate(named)}
        return self.assembled(expected.case, expected.forced, outputs, kept)

    def assembled(
        self,
        case: Case,
        forced: ForcedPlan | None,
        outputs: Mapping[str, ExpectedOutput],
        layers: Mapping[str, ExpectedAttention],
    ) -> GoldenCase:
        """Return the golden of a case, whose name says what its plans are forced to."""
        name = case.name if forced is None else f"{case.name} at {forced}"
        trivial = case.name == TRIVIAL
        return GoldenCase(
            name, self._arrays(case), outputs, layers, "" if forced is None else str(forced), trivial=trivial
        )

    def _arrays(self, case: Case) -> dict[str, Array]:
        """Return the inputs for numpy, one dictionary for all goldens of a case: their file holds it once."""
        if case.name not in self._inputs or self._inputs[case.name][0] is not case:
            self._inputs[case.name] = (case, {name: array(x) for name, x in case.inputs.items()})
        return self._inputs[case.name][1]

    def exact_at(self, case: Case, plans: Sequence[PlanPair]) -> dict[str, Array]:
        """Return float64 outputs at the plans of a backend."""
        pairs = [(torch.from_numpy(precision), torch.from_numpy(rank)) for precision, rank in plans]
        return {name: array(x) for name, x in self.exact(case, pairs)[0].items()}

    def _shaken(self, expected: Expected) -> list[dict[str, Tensor]]:
        """Return float64 outputs with q and k a rounding off, each way."""
        if not expected.mode.plans:
            return []
        shake = RULES[self.dtype].shake
        modes = [self._replayed(expected, perturb_qk=share) for share in (shake, -shake)]
        return [self._in_double(expected.case, mode)[0] for mode in modes]

    def _noisy(self, expected: Expected) -> list[dict[str, Tensor]]:
        """Return float64 outputs with every result a rounding off, where such may decide an output."""
        whole = not all(x.is_floating_point() for x in expected.outputs.values())
        if not whole and self.dtype != "float64" and not self._errs(expected):
            return []
        # By pairs: what one moves off an edge, the other moves over it.
        shares = product(range(5 if whole else 2), (RULES[self.dtype].noise, -RULES[self.dtype].noise))
        modes = [self._replayed(expected, perturb_results=share, seed=seed) for seed, share in shares]
        return [self._in_double(expected.case, mode)[0] for mode in modes]

    def _replayed(self, expected: Expected, **options: Any) -> PlanMode:
        """Return a float64 mode at eager's plans."""
        return self.double_mode(plans=expected.mode.plans, **options)

    def _errs(self, expected: Expected) -> bool:
        """Return whether eager PyTorch is farther from float64 in an output than depth, or the plans, explain."""
        pairs = ((array(to_double(x)), array(expected.exact[name])) for name, x in expected.outputs.items())
        most = 10 * RULES[self.dtype].floor + rounding_of(expected.mode)
        return any(_error(got, exact) > most for got, exact in pairs)

    def output(
        self,
        eager: Tensor,
        exact: Tensor,
        rounding: float = 0.0,
        moved: Sequence[Tensor] = (),
        unsure: Array | None = None,
    ) -> ExpectedOutput:
        """Return what a value should be and how far it may be off.

        Args:
            eager: the value in the model's type.
            exact: the same in float64.
            rounding: largest predicted rounding error of a head.
            moved: the same in float64 with what lies on an edge moved to either side of it.
            unsure: numbers that a rounding decides, which are not compared.
        """
        dtype = dtype_name(eager.dtype)
        if not eager.is_floating_point():
            lost = torch.stack([x != eager for x in (exact, *moved)]).any(0)
            return ExpectedOutput(array(eager), dtype, 0.0, 0.0, excluded=array(lost) if lost.any() else None)
        got, wanted = array(eager.double()), clip_to_dtype(array(exact), dtype)
        held = np.isfinite(array(exact)) & (np.isnan(got) | (np.abs(array(exact)) <= RULES[dtype].largest))
        lost_to_eager = ~((np.isfinite(got) & np.isfinite(wanted)) | (got == wanted))
        broken = int((lost_to_eager & held).sum())
        if unsure is not None:
            lost_to_eager |= unsure
        usable, filled = separate_fill_values(wanted, lost_to_eager)
        known, runs = np.where(usable, wanted, 0), [got, *(clip_to_dtype(array(x), dtype) for x in moved)]
        counts = (_distinct(wanted[usable]), _distinct(wanted[filled]))
        error, *others = (relative_error(np.abs(np.where(usable, x, 0) - known), known) for x in runs)
        fill_error, *fill_others = (largest_relative_error(x[filled], wanted[filled]) for x in runs)
        return ExpectedOutput(
            array(exact),
            dtype,
            error,
            limit_of(error, dtype, rounding, others, self.dtype, counts[0]),
            limit_of(fill_error, dtype, rounding, fill_others, self.dtype, counts[1]),
            lost_to_eager if lost_to_eager.any() else None,
            broken,
        )

    def _layer(self, expected: Expected, place: int, rounding: float) -> ExpectedAttention:
        precision, rank = expected.mode.plans[place]
        edge, predicted, predicted_limit = torch.zeros_like(precision, dtype=torch.bool), None, None
        if expected.forced is None:
            nudged, call = self._nudged_modes(expected.case), expected.mode.planned[place]
            for mode in nudged:
                edge |= (mode.plans[place][0] != precision) | (mode.plans[place][1] != rank)
            if call is not None:
                moved = [array(other.predicted) for mode in nudged if (other := mode.planned[place]) is not None]
                predicted = array(call.predicted)
                predicted_limit = _spread(predicted, moved) + 2 * ROUNDING_SHARE * rounding
                predicted_limit = predicted_limit + _centring(call, expected.mode.key_means[place])
        layer = ExpectedAttention(
            array(precision), array(rank), array(edge), predicted=predicted, predicted_limit=predicted_limit
        )
        eager, exact = expected.mode.outputs[place], expected.double.outputs[place]
        # With all plans at fp32 the trace says where a fault is: outputs of heads would only fill the file.
        if eager is None or exact is None or expected.forced == ForcedPlan():
            return layer
        difference = (eager.double() - exact).square().mean(dim=(0, 2, 3)).sqrt()
        size = exact.square().mean(dim=(0, 2, 3)).sqrt()
        errors = torch.where(size > 0, difference / size, difference)
        dtype = dtype_name(eager.dtype)
        return replace(layer, exact=array(exact.float()), eager_error=array(errors), dtype=dtype)

    def _nudged_modes(self, case: Case) -> list[PlanMode]:
        """Run eager with its moments moved a little, each way, and return the modes that saw it."""
        if self._nudged is None or self._nudged[0] is not case:
            found = []
            for nudge in (RULES[self.dtype].nudge, -RULES[self.dtype].nudge):
                for tilt in (False, True):
                    mode = PlanMode(perturb_moments=nudge, tilt=tilt)
                    run_eager(self._eager, case.inputs, mode)
                    found.append(mode)
            self._nudged = (case, found)
        return self._nudged[1]

    def _named(self, outputs: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, outputs, strict=True))


def rounding_of(mode: PlanMode) -> float:
    """Return the largest rounding error that is predicted of a head, at most 1."""
    known = [errors.rounding.nan_to_num(posinf=0.0) for errors in mode.errors]  # inf: moments overflowed
    return min(1.0, max((float(x.max()) for x in known if x.numel()), default=0.0))


def _is_exact(mode: PlanMode) -> bool:
    """Return whether every plan is fp32 at full rank."""
    pairs = zip(mode.plans, ForcedPlan().plans(mode), strict=True)
    return all(torch.equal(plan[0], exact[0]) and torch.equal(plan[1], exact[1]) for plan, exact in pairs)


def _size(expected: Expected) -> tuple[bool, int]:
    """Return a sort key that prefers small cases other than the trivial one."""
    return expected.case.name == TRIVIAL, sum(x.numel() for x in expected.case.inputs.values())


def forced_plans(modes: Iterable[PlanMode]) -> list[ForcedPlan]:
    """Return the plans, other than fp32 at full rank, that models may choose: each precision, and each rank at fp32."""
    precisions, quarters = set[int](), set[int]()
    for mode in modes:
        for (precision, rank), call, errors in zip(mode.plans, mode.planned, mode.errors, strict=True):
            codes, ranks = (precision, rank) if call is None else call.ladder.unbind(0)
            precisions |= set(codes.flatten().tolist())
            quarters |= {max(1, 4 * n // errors.head_dim) for n in ranks.flatten().tolist()}
    return [ForcedPlan(code) for code in sorted(precisions - {FP32})] + [
        ForcedPlan(FP32, n) for n in sorted(quarters - {4})
    ]


def plan_probe(layer: str, call: PlanCall) -> GoldenCase:
    """Return a golden case of the op `plan` on the moments of one sequence, scaled over decades."""
    moments = {name: array(x[-1:]) for name, x in call.moments.items()}
    golden = GoldenCase(f"plan of {layer}", moments, {}, probes=layer)
    scaled = {name: torch.from_numpy(x) for name, x in probe_inputs(golden).items()}
    whole = replace(call, moments=scaled)
    wanted, near = whole.within(0), [whole.within(share) for share in (PROBE_EDGE, -PROBE_EDGE)]
    edge = array(torch.stack([(a != b) for plan in near for a, b in zip(plan, wanted, strict=True)]).any(0))
    outputs = {
        f"{layer}.{name}": ExpectedOutput(array(x), "int32", 0.0, 0.0, excluded=edge if edge.any() else None)
        for name, x in zip(("precision", "rank"), wanted, strict=True)
    }
    return replace(golden, outputs=outputs)


def _centring(call: PlanCall, key_mean: Tensor) -> Array:
    """Return by what share a predicted error may differ where keys are alike and centring leaves only rounding."""
    left = (2 * RULES["float32"].half_ulp * key_mean.double()).square()
    of_query = call.moments["query_second_moment"].double()
    energy = (of_query * per_query_head(left, of_query.shape[1])).sum(-1) * call.scale**2
    share = energy / (2 * call.predicted.double().square())
    return array(share.nan_to_num(posinf=0.0))


def _spread(value: Array, others: Sequence[Array]) -> Array:
    """Return twice the largest relative distance of others from a value, and a rounding; 0 where it is infinite."""
    with np.errstate(invalid="ignore", divide="ignore"):
        moves = [np.abs(other - value) / value for other in others]
    return np.asarray(2 * np.nan_to_num(np.stack(moves), posinf=1.0).max(0) + 1e-5)


def _distinct(x: Array) -> int:
    """Count the different numbers, as far as a limit needs it: equal ones share one rounding."""
    return len(np.unique(x.ravel()[: 1 << 14].astype(np.float32)))


def disagreements(goldens: Sequence[GoldenCase]) -> list[str]:
    """Return a line for each output for which eager PyTorch and float64 are too far apart to prove anything."""
    return [
        f"{name} ({golden.name}): eager PyTorch differs from float64 by {output.eager_error:.0%} in the model's own "
        "type; one of them is wrong, or the output hangs on roundings"
        for golden in goldens
        for name, output in golden.outputs.items()
        if output.eager_error > WARN_LIMIT and golden.forced in ("", EXACT)
    ]


def _unsure(exact: Tensor, noisy: Sequence[Tensor]) -> Array:
    """Return which numbers of an output a rounding decides, such as those of a query with all scores below -1e9.

    They are those of a token that a rounding of every result moves by a tenth of the output's size and by ten times as
    much as a quarter of all numbers; and such as are moved by half of the size.
    """
    known = array(to_double(exact))
    usable = (
        separate_fill_values(known, ~np.isfinite(known))[0]
        if exact.is_floating_point()
        else np.zeros(known.shape, bool)
    )
    if not noisy or not usable.any():
        return np.zeros(known.shape, bool)
    moves = np.stack([np.abs(np.where(usable & np.isfinite(x), x - known, 0)) for x in map(array, noisy)]).max(0)
    size, least = float(np.sqrt(np.square(known[usable]).mean())), 10 * float(np.quantile(moves[usable], 0.25))
    tokens = np.sqrt(np.square(moves).mean(-1, keepdims=True)) if known.ndim else moves
    return np.asarray(usable & ((tokens > max(0.1 * size, least)) | (moves > max(0.5 * size, least))))


def _refuse_chance(case: Case, outputs: Mapping[str, Tensor], again: Sequence[Tensor]) -> None:
    """Raise ConfigError where two runs of a model on the same inputs differ by more than a rounding."""
    if len(outputs) != len(again):
        raise ConfigError(f"the model returns {len(outputs)} tensors and, called again, {len(again)}; {_CHANCE}")
    for (name, one), other in zip(outputs.items(), again, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            shapes = f"{tuple(one.shape)} and then {tuple(other.shape)}"
            raise ConfigError(f"two runs of the model on {case.name!r} return {name} of shape {shapes}; {_CHANCE}")
        a, b = (array(to_double(x)) for x in (one, other))
        differ = ~((a == b) | ((a != a) & (b != b)))
        rule = RULES.get(dtype_name(one.dtype))
        finite = np.isfinite([a[differ], b[differ]]).all()
        if differ.any() and (rule is None or not finite or _error(a, b) > rule.floor):
            raise ConfigError(
                f"the model is random: two runs on the golden inputs {case.name!r} differ in {name}, in "
                f"{differ.sum()} of {differ.size} elements; {_CHANCE}"
            )


def _error(got: Array, exact: Array) -> float:
    """Return the relative error where both are finite."""
    known = np.isfinite(got) & np.isfinite(exact)
    got, exact = np.where(known, got, 0), np.where(known, exact, 0)
    return relative_error(np.abs(got - exact), exact)


_CHANCE = (
    "an export computes the same from the same inputs: leave out dropout (F.dropout(…, training=self.training)) and "
    "torch.rand in forward, and state that stays from one call to the next"
)


def array(x: Tensor) -> Array:
    """Return a tensor as a numpy array; bfloat16, which numpy lacks, as float32."""
    return np.asarray((x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy())
