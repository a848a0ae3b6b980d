"""What eager PyTorch says of a case: once in the model's own type and once in float64, at the same plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from adaattn.errors import ConfigError
from adaattn.export.capture import Captured
from adaattn.export.cases import Case
from adaattn.export.golden import Array, Golden, Layer, Output
from adaattn.export.parity import NOISE, NUDGE, SHAKE, PlanPair, farthest, judged, limit_of, relative_error, within
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
        self._nudged: tuple[Case, list[list[tuple[Tensor, Tensor]]]] | None = None

    def expect(self, case: Case) -> Expected:
        """Run a case.

        Raises:
            ConfigError: eager PyTorch itself fails on it.
        """
        mode = PlanMode(measure=True)
        try:
            outputs = self._named(run(self._eager, case.inputs, mode))
        except Exception as error:  # the user's own code
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in case.inputs.items())
            raise ConfigError(
                f"the model fails on the golden inputs {case.name!r} ({shapes}): {type(error).__name__}: {error}; "
                "narrow --dim, give integers their range as in ids=B,S:int64<30522, or pass --no-verify"
            ) from error
        exact, double = self.exact(case, mode.plans)
        return Expected(case, outputs, exact, mode, double)

    def exact(self, case: Case, plans: Sequence[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], PlanMode]:
        """float64 outputs at given plans."""
        return self._in_double(case, PlanMode(double=True, plans=plans))

    def _in_double(self, case: Case, mode: PlanMode) -> tuple[dict[str, Tensor], PlanMode]:
        inputs = {name: to_double(x) for name, x in case.inputs.items()}
        return self._named(run(self._double, inputs, mode)), mode

    def golden(self, expected: Expected, layers: Sequence[str]) -> Golden:
        """What a verdict needs of a case.

        Args:
            layers: names of the planned attentions, in the order of their calls.
        """
        known = [errors.rounding.nan_to_num(posinf=0.0) for errors in expected.mode.errors]  # inf: moments overflowed
        rounding = min(1.0, max((float(x.max()) for x in known), default=0.0))
        shaken, noisy = self._shaken(expected), self._noisy(expected)
        outputs = {}
        for name, x in expected.outputs.items():
            moved = [each[name] for each in (shaken if x.is_floating_point() else noisy)]
            outputs[name] = self._output(x, expected.exact[name], rounding, moved)
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
        modes = [PlanMode(double=True, plans=expected.mode.plans, shake=share) for share in (shake, -shake)]
        return [self._in_double(expected.case, mode)[0] for mode in modes]

    def _noisy(self, expected: Expected) -> list[dict[str, Tensor]]:
        """float64 outputs with every result a rounding off, where an output is of integers."""
        if all(x.is_floating_point() for x in expected.outputs.values()):
            return []
        # By pairs: what one moves off an edge, the other moves over it.
        shares = product(range(5), (NOISE[self.dtype], -NOISE[self.dtype]))
        modes = [PlanMode(double=True, plans=expected.mode.plans, noise=share, seed=seed) for seed, share in shares]
        return [self._in_double(expected.case, mode)[0] for mode in modes]

    def _output(self, eager: Tensor, exact: Tensor, rounding: float, moved: Sequence[Tensor]) -> Output:
        dtype = str(eager.dtype).removeprefix("torch.")
        if not eager.is_floating_point():
            lost = torch.stack([x != eager for x in (exact, *moved)]).any(0)
            return Output(array(eager), dtype, 0.0, 0.0, lost=array(lost) if lost.any() else None)
        got, wanted = array(eager.double()), within(array(exact), dtype)
        lost_to_eager = ~((np.isfinite(got) & np.isfinite(wanted)) | (got == wanted))
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


def array(x: Tensor) -> Array:
    """numpy's form of a tensor; bfloat16, which it has no word for, as float32."""
    return np.asarray((x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy())
