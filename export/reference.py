"""What eager PyTorch says of a case: once in the model's own type and once in float64, at the same plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaattn.errors import ConfigError
from adaattn.export.capture import Captured
from adaattn.export.cases import Case
from adaattn.export.golden import Array, Golden, Layer, Output
from adaattn.export.parity import (
    FLOOR,
    LOOSE,
    NOISE,
    NUDGE,
    SHAKE,
    PlanPair,
    farthest,
    judged,
    limit_of,
    relative_error,
    within,
)
from adaattn.export.yardstick import PlanMode, run, to_double


@dataclass(frozen=True)
class Expected:
    """A case in both types, and what the modes saw of its attention."""

    case: Case
    outputs: dict[str, Tensor]
    exact: dict[str, Tensor]
    mode: PlanMode
    double: PlanMode


class Reference:
    """Eager PyTorch in the model's type and in float64."""

    def __init__(self, captured: Captured) -> None:
        self.dtype = str(captured.dtype).removeprefix("torch.")
        self._eager, self._double, self._names = captured.eager, captured.in_double(), captured.output_names
        self._written = captured.written
        self._double_mode = partial(PlanMode, double=True, dtype=captured.dtype)
        self._nudged: tuple[Case, list[list[tuple[Tensor, Tensor]]]] | None = None

    def expect(self, case: Case) -> Expected:
        """Run a case.

        Raises:
            ConfigError: eager PyTorch itself fails on it, or returns something else when it is called again.
        """
        mode = PlanMode(measure=True)
        try:
            outputs = self._named(run(self._eager, case.inputs, mode, self._written))
            again = run(self._eager, case.inputs, PlanMode(), self._written)
        except Exception as error:  # the user's own code
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in case.inputs.items())
            raise ConfigError(
                f"the model fails on the golden inputs {case.name!r} ({shapes}): {type(error).__name__}: {error}; "
                "narrow --dim, give integers their range as in ids=B,S:int64<30522, or pass --no-verify"
            ) from error
        _refuse_chance(case, outputs, again)
        exact, double = self.exact(case, mode.plans)
        return Expected(case, outputs, exact, mode, double)

    def exact(self, case: Case, plans: Sequence[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], PlanMode]:
        """float64 outputs at given plans."""
        return self._in_double(case, self._double_mode(plans=plans))

    def _in_double(self, case: Case, mode: PlanMode) -> tuple[dict[str, Tensor], PlanMode]:
        inputs = {name: to_double(x) for name, x in case.inputs.items()}
        return self._named(run(self._double, inputs, mode, self._written)), mode

    def golden(self, expected: Expected, layers: Sequence[str]) -> Golden:
        """What a verdict needs of a case.

        Args:
            layers: names of the planned attentions, in the order of their calls.
        """
        known = [errors.rounding.nan_to_num(posinf=0.0) for errors in expected.mode.errors]  # inf: moments overflowed
        rounding = min(1.0, max((float(x.max()) for x in known if x.numel()), default=0.0))
        shaken, noisy = self._shaken(expected), self._noisy(expected)
        if self.dtype == "float64":  # eager is the yardstick itself, and tells nothing of what a rounding does
            shaken = [*shaken, *noisy[:2], self._in_double(expected.case, self._replayed(expected, narrow=True))[0]]
        outputs = {}
        for name, x in expected.outputs.items():
            moved = [each[name] for each in (shaken if x.is_floating_point() else noisy)]
            unsure = _unsure(expected.exact[name], [each[name] for each in noisy])
            outputs[name] = self._output(x, expected.exact[name], rounding, moved, unsure)
        inputs = {name: array(x) for name, x in expected.case.inputs.items()}
        # Fewer layers than calls: calls that were one and the same have become one.
        named = layers if len(layers) == len(expected.mode.plans) else ()
        kept = {name: self._layer(expected, place) for place, name in enumerate(named)}
        return Golden(expected.case.name, inputs, outputs, kept)

    def exact_at(self, case: Case, plans: Sequence[PlanPair]) -> dict[str, Array]:
        """float64 outputs at the plans of a backend."""
        pairs = [(torch.from_numpy(precision), torch.from_numpy(rank)) for precision, rank in plans]
        return {name: array(x) for name, x in self.exact(case, pairs)[0].items()}

    def _shaken(self, expected: Expected) -> list[dict[str, Tensor]]:
        """float64 outputs with q and k a rounding off, each way."""
        if not expected.mode.plans:
            return []
        shake = SHAKE[self.dtype]
        modes = [self._replayed(expected, shake=share) for share in (shake, -shake)]
        return [self._in_double(expected.case, mode)[0] for mode in modes]

    def _noisy(self, expected: Expected) -> list[dict[str, Tensor]]:
        """float64 outputs with every result a rounding off, where such may decide an output."""
        whole = not all(x.is_floating_point() for x in expected.outputs.values())
        if not whole and self.dtype != "float64" and not self._errs(expected):
            return []
        # By pairs: what one moves off an edge, the other moves over it.
        shares = product(range(5 if whole else 2), (NOISE[self.dtype], -NOISE[self.dtype]))
        modes = [self._replayed(expected, noise=share, seed=seed) for seed, share in shares]
        return [self._in_double(expected.case, mode)[0] for mode in modes]

    def _replayed(self, expected: Expected, **options: Any) -> PlanMode:
        """float64 at eager's plans."""
        return self._double_mode(plans=expected.mode.plans, **options)

    def _errs(self, expected: Expected) -> bool:
        """Whether eager PyTorch is farther from float64 in an output than a model of some depth explains."""
        pairs = ((array(to_double(x)), array(expected.exact[name])) for name, x in expected.outputs.items())
        return any(_error(got, exact) > 10 * FLOOR[self.dtype] for got, exact in pairs)

    def _output(self, eager: Tensor, exact: Tensor, rounding: float, moved: Sequence[Tensor], unsure: Array) -> Output:
        dtype = str(eager.dtype).removeprefix("torch.")
        if not eager.is_floating_point():
            lost = torch.stack([x != eager for x in (exact, *moved)]).any(0)
            return Output(array(eager), dtype, 0.0, 0.0, lost=array(lost) if lost.any() else None)
        got, wanted = array(eager.double()), within(array(exact), dtype)
        lost_to_eager = ~((np.isfinite(got) & np.isfinite(wanted)) | (got == wanted)) | unsure
        usable, filled = judged(wanted, lost_to_eager)
        known, runs = np.where(usable, wanted, 0), [got, *(within(array(x), dtype) for x in moved)]
        error, *others = (relative_error(np.abs(np.where(usable, x, 0) - known), known) for x in runs)
        fill_error, *fill_others = (farthest(x[filled], wanted[filled]) for x in runs)
        return Output(
            array(exact),
            dtype,
            error,
            limit_of(error, dtype, rounding, others, self.dtype),
            limit_of(fill_error, dtype, rounding, fill_others, self.dtype),
            lost_to_eager if lost_to_eager.any() else None,
        )

    def _layer(self, expected: Expected, place: int) -> Layer:
        precision, rank = expected.mode.plans[place]
        edge = torch.zeros_like(precision, dtype=torch.bool)
        for plans in self._nudged_plans(expected.case):
            edge |= (plans[place][0] != precision) | (plans[place][1] != rank)
        eager, exact = expected.mode.outputs[place], expected.double.outputs[place]
        if eager is None or exact is None:
            return Layer(array(precision), array(rank), array(edge))
        difference = (eager.double() - exact).square().mean(dim=(0, 2, 3)).sqrt()
        size = exact.square().mean(dim=(0, 2, 3)).sqrt()
        errors = torch.where(size > 0, difference / size, difference)
        dtype = str(eager.dtype).removeprefix("torch.")
        return Layer(array(precision), array(rank), array(edge), array(exact.float()), array(errors), dtype)

    def _nudged_plans(self, case: Case) -> list[list[tuple[Tensor, Tensor]]]:
        """Eager's plans with its moments moved a little, each way."""
        if self._nudged is None or self._nudged[0] is not case:
            found = []
            for nudge in (NUDGE[self.dtype], -NUDGE[self.dtype]):
                for tilt in (False, True):
                    mode = PlanMode(nudge=nudge, tilt=tilt)
                    run(self._eager, case.inputs, mode)
                    found.append(mode.plans)
            self._nudged = (case, found)
        return self._nudged[1]

    def _named(self, outputs: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, outputs, strict=True))


def disagreements(goldens: Sequence[Golden]) -> list[str]:
    """Return a line for each output for which eager PyTorch and float64 are too far apart to prove anything."""
    return [
        f"{name} ({golden.name}): eager PyTorch differs from float64 by {output.eager_error:.0%} in the model's own "
        "type; one of them is wrong, or the output hangs on roundings"
        for golden in goldens
        for name, output in golden.outputs.items()
        if output.eager_error > LOOSE
    ]


def _unsure(exact: Tensor, noisy: Sequence[Tensor]) -> Array:
    """Which numbers of an output hang on a rounding: those of a query whose scores are all under -1e9, for one.

    They are those of a token that a rounding of every result moves by a tenth of the output's size and by ten times as
    much as a quarter of all numbers; and such as are moved by half of the size.
    """
    known = array(to_double(exact))
    usable = judged(known, ~np.isfinite(known))[0] if exact.is_floating_point() else np.zeros(known.shape, bool)
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
        floor = FLOOR.get(str(one.dtype).removeprefix("torch."))
        if differ.any() and (floor is None or not np.isfinite([a[differ], b[differ]]).all() or _error(a, b) > floor):
            raise ConfigError(
                f"the model is random: two runs on the golden inputs {case.name!r} differ in {name}, in "
                f"{differ.sum()} of {differ.size} elements; {_CHANCE}"
            )


def _error(got: Array, exact: Array) -> float:
    """Relative error where both are finite."""
    known = np.isfinite(got) & np.isfinite(exact)
    got, exact = np.where(known, got, 0), np.where(known, exact, 0)
    return relative_error(np.abs(got - exact), exact)


_CHANCE = (
    "an export computes the same from the same inputs: leave out dropout (F.dropout(…, training=self.training)) and "
    "torch.rand in forward, and state that stays from one call to the next"
)


def array(x: Tensor) -> Array:
    """numpy's form of a tensor; bfloat16, which it has no word for, as float32."""
    return np.asarray((x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy())
