"""The verdict on a backend: its numbers against eager PyTorch in float64, with the rule and its constants.

Both the backend and eager PyTorch in the model's own type are measured against float64 at the same plan. The backend
passes where its error is at most TWICE eager's own plus a floor, its plans are eager's, and it has no NaN or Inf that
eager has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaattn.errors import ConfigError
from adaattn.export.capture import Captured
from adaattn.export.golden import Case
from adaattn.export.yardstick import PlanMode, PlanPair, relative_error, run, to_double

FACTOR = 2.0  # two summation orders of equal merit differ by about this
# Relative errors that no backend must answer for: a few ulps of the type after a handful of layers.
FLOOR = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# Where an operand lies between two integers of int8, the last bit of a sum decides: some 1e-4 of the operands may
# round the other way, and noise of √1e-4 steps is this share of the rounding error that the plan has anyway.
FLIPS = 0.05
# A head may choose another plan where its moments, moved by so much, make eager do so: sums of thousands of terms.
NUDGE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
HISTOGRAM_EDGES = [-12 + 0.5 * i for i in range(29)]

Backend = Callable[[Case], tuple[Mapping[str, Tensor], Sequence[PlanPair] | None]]


@dataclass
class Expected:
    """What eager PyTorch says of one case."""

    case: Case
    outputs: dict[str, Tensor]  # of eager, in the model's type
    exact: dict[str, Tensor]  # float64, at eager's plans
    plans: list[PlanPair]
    rounding: float  # largest predicted rounding error of any head
    mode: PlanMode
    nudged: list[list[PlanPair]] = field(default_factory=list)


class Reference:
    """Eager PyTorch in the model's type and in float64, run once a case."""

    def __init__(self, captured: Captured) -> None:
        self.dtype = captured.dtype
        self._eager, self._double, self._names = captured.eager, captured.in_double(), captured.output_names

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
        known = [error.rounding.nan_to_num(posinf=0.0) for error in mode.errors]  # inf: moments that overflowed
        rounding = max((float(x.max()) for x in known), default=0.0)
        return Expected(case, outputs, self.exact(case, mode.plans), mode.plans, rounding, mode)

    def exact(self, case: Case, plans: Sequence[PlanPair]) -> dict[str, Tensor]:
        """float64 outputs at given plans."""
        inputs = {name: to_double(x) for name, x in case.inputs.items()}
        return self._named(run(self._double, inputs, PlanMode(double=True, plans=plans)))

    def nudged_plans(self, expected: Expected) -> list[list[PlanPair]]:
        """Eager's plans with its moments moved a little, each way."""
        if not expected.nudged:
            for nudge in (NUDGE[self.dtype], -NUDGE[self.dtype]):
                for tilt in (False, True):
                    mode = PlanMode(nudge=nudge, tilt=tilt)
                    run(self._eager, expected.case.inputs, mode)
                    expected.nudged.append(mode.plans)
        return expected.nudged

    def _named(self, outputs: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, outputs, strict=True))


def compare(reference: Reference, expected: Sequence[Expected], backend: Backend) -> dict[str, Any]:
    """Run a backend on all cases; the verdict as the report holds it: `verdict`, `outputs`, `histogram`, `plans`."""
    rows: list[dict[str, Any]] = []
    counts = torch.zeros(len(HISTOGRAM_EDGES) - 1)
    heads = differ = excused = 0
    planned = False
    for want in expected:
        outputs, plans = backend(want.case)
        exact = want.exact
        unexcused: list[str] = []
        # Fewer plans than eager's: calls that were one and the same have become one.
        if plans is not None and want.plans and len(plans) == len(want.plans):
            planned = True
            verdict = _compare_plans(reference, want, plans)
            heads, differ, excused = heads + verdict[0], differ + verdict[1], excused + verdict[2]
            unexcused = verdict[3]
            if verdict[1]:
                exact = reference.exact(want.case, plans)
        for name, eager in want.outputs.items():
            row = _compare_output(reference.dtype, want, name, outputs.get(name), eager, exact[name])
            counts += row.pop("counts")
            if unexcused:
                row.update(verdict="failed", reason=row["reason"] or unexcused[0])
            rows.append(row)
    return {
        "verdict": "passed" if all(row["verdict"] == "passed" for row in rows) else "failed",
        "reason": next((f"{row['name']} ({row['case']}): {row['reason']}" for row in rows if row["reason"]), None),
        "outputs": rows,
        "histogram": {"log10_edges": HISTOGRAM_EDGES, "counts": [int(n) for n in counts]},
        "plans": {"heads": heads, "differ": differ, "excused": excused} if planned else None,
    }


def _compare_plans(reference: Reference, want: Expected, plans: Sequence[PlanPair]) -> tuple[int, int, int, list[str]]:
    """Heads in all, those whose plan differs, those of them that are on the edge, and a line for each other."""
    heads = differ = excused = 0
    lines = []
    for layer, (ours, theirs) in enumerate(zip(want.plans, plans, strict=True)):
        off = (ours[0] != theirs[0]) | (ours[1] != theirs[1])
        heads += off.numel()
        if not off.any():
            continue
        edge = torch.zeros_like(off)
        for nudged in reference.nudged_plans(want):
            edge |= (nudged[layer][0] != ours[0]) | (nudged[layer][1] != ours[1])
        differ += int(off.sum())
        excused += int((off & edge).sum())
        for batch, head in (off & ~edge).nonzero().tolist():
            lines.append(
                f"attention {layer}, batch {batch}, head {head}: plan (precision {int(theirs[0][batch, head])}, rank "
                f"{int(theirs[1][batch, head])}), eager has ({int(ours[0][batch, head])}, {int(ours[1][batch, head])})"
            )
    return heads, differ, excused, lines


def _compare_output(
    dtype: torch.dtype, want: Expected, name: str, got: Tensor | None, eager: Tensor, exact: Tensor
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "case": want.case.name, "verdict": "failed", "reason": None}
    row |= {"error": None, "eager_error": None, "limit": None, "max_abs": None, "worst": []}
    row["counts"] = torch.zeros(len(HISTOGRAM_EDGES) - 1)
    if got is None or got.shape != eager.shape:
        shape = "nothing" if got is None else f"shape {tuple(got.shape)}"
        return row | {"reason": f"the backend returns {shape}; eager returns shape {tuple(eager.shape)}"}
    if not eager.is_floating_point():
        same = bool((got == eager).all())
        return row | {"verdict": "passed" if same else "failed", "reason": None if same else "integers differ"}
    finite = eager.isfinite()
    bad = finite & ~got.isfinite()
    usable = finite & exact.isfinite() & ~bad
    difference = torch.where(usable, (got.double() - exact).abs(), 0)
    size = torch.where(usable, exact, 0).square().mean().sqrt().clamp_min(1e-300)
    eager_error = relative_error(torch.where(usable, eager.double(), 0), torch.where(usable, exact, 0))
    error = relative_error(torch.where(usable, got.double(), 0), torch.where(usable, exact, 0))
    worst = int((bad if bad.any() else difference).flatten().double().argmax())
    row |= {
        "error": error,
        "eager_error": eager_error,
        "limit": FACTOR * eager_error + FLOOR[dtype] + FLIPS * want.rounding,
        "max_abs": float(difference.max()),
        "worst": [int(i) for i in torch.unravel_index(torch.tensor(worst), eager.shape)],
    }
    logs = (difference / size)[usable].clamp_min(1e-300).log10().clamp(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    row["counts"] = torch.histogram(logs.float(), torch.tensor(HISTOGRAM_EDGES)).hist
    if bad.any():
        return row | {
            "reason": f"{int(bad.sum())} elements are NaN or Inf where eager has numbers, first at {row['worst']}"
        }
    if error > row["limit"]:
        return row | {"reason": f"error {error:.1e} is over the limit {row['limit']:.1e}, worst at {row['worst']}"}
    return row | {"verdict": "passed"}
