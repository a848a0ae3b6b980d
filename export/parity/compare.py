"""Give the verdict on a backend: compare its numbers with eager PyTorch in float64, by the parity rule.

Both the backend and eager PyTorch in the model's own type are measured against float64 at the same plan. The backend
passes where its error is at most FACTOR times eager's own (or the error that a rounding of q and k causes, if that
is more) plus a floor, its plans are eager's, and it has no NaN or Inf that eager has not. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adaattn.export.artifacts.arrays import Array
from adaattn.export.parity.criterion import (
    MAX_LIMIT,
    MIN_SHARE,
    NOTHING_SHOWS,
    RULES,
    WARN_LIMIT,
    PlanPair,
    agree,
    clip_to_dtype,
    separate_fill_values,
)
from adaattn.export.parity.golden_case import ExpectedAttention, ExpectedOutput, GoldenCase, integer_ranges
from adaattn.export.parity.metrics import HISTOGRAM_EDGES, histogram, metrics_of, root_mean_square


@dataclass(frozen=True)
class BackendResult:
    """What a backend made of a case; bfloat16 as float32.

    Args:
        plans: of each planned attention by name; empty where the backend does not show them.
        heads: outputs (B, H, S, D) of each planned attention; empty likewise.
        predicted: the error (B, H) that each plan predicts; empty likewise.
    """

    outputs: Mapping[str, Array]
    plans: Mapping[str, PlanPair]
    heads: Mapping[str, Array]
    predicted: Mapping[str, Array] = field(default_factory=dict)


Backend = Callable[[GoldenCase], BackendResult]
ExactAt = Callable[[GoldenCase, Mapping[str, PlanPair]], Mapping[str, Array]]
"""Return float64 outputs of a case at plans that are not eager's; it takes the model."""


def compare(goldens: Sequence[GoldenCase], backend: Backend, exact_at: ExactAt | None = None) -> dict[str, Any]:
    """Run a backend on all cases.

    Args:
        exact_at: to measure outputs whose plans differ from eager's on the edge of their limits; without it such
            outputs are not compared.

    Returns:
        The verdict as a report holds it: `verdict`, `reason`, `outputs`, `heads`, `histogram`, `plans`.
    """
    rows: list[dict[str, Any]] = []
    heads: dict[tuple[str, int], dict[str, Any]] = {}
    counts = np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64)
    tally = {"heads": 0, "differ": 0, "excused": 0}
    for golden in goldens:
        ran = backend(golden)
        plans = _compare_plans(golden, ran)
        for key in tally:
            tally[key] += plans[key]
        exact: Mapping[str, Array] | None = {name: output.exact for name, output in golden.outputs.items()}
        if plans["differ"] and not plans["lines"]:
            exact = None if exact_at is None else exact_at(golden, ran.plans)
        for name, output in golden.outputs.items():
            if exact is None:
                reason = f"not compared: {plans['excused']} plans differ from eager's on the edge of their limits"
                rows.append(_row(golden, name) | {"verdict": "not run", "reason": reason})
                continue
            row = compare_output(golden, name, output, ran.outputs.get(name), exact[name])
            counts += row.pop("counts")
            if plans["lines"]:
                row.update(verdict="failed", reason=plans["lines"][0])
            rows.append(row)
        if not plans["differ"]:
            _compare_heads(heads, golden, ran.heads)
    failed = [row for row in rows if row["verdict"] == "failed"]
    forced = {golden.name for golden in goldens if golden.forced}
    failed.sort(key=lambda row: row["case"] not in forced)  # where no plan is in play, the numbers tell the cause
    missing = _never_compared(goldens, rows)
    notes = [row for row in rows if row["reason"]]
    reasons = [f"{row['name']} ({row['case']}): {row['reason']}" for row in failed or notes]
    return {
        "verdict": "failed" if failed else "not run" if missing else "passed",
        "reason": missing if missing and not failed else next(iter(reasons), None),
        "outputs": rows,
        "heads": list(heads.values()),
        "histogram": {"log10_edges": HISTOGRAM_EDGES, "counts": counts.tolist()},
        "plans": tally if tally["heads"] else None,
        "compared": _coverage(goldens, rows),
    }


def _never_compared(goldens: Sequence[GoldenCase], rows: Sequence[dict[str, Any]]) -> str | None:
    """Return why the rows prove nothing, or None.

    Each output needs elements that were compared in every case, and MIN_SHARE of them on average. The trivial case, of
    the least sizes, is not needed where there are others. A case whose plans lie on an edge may be compared with its
    plans forced instead.
    """
    cases = {golden.name: golden for golden in goldens}
    needed = {golden.case for golden in goldens if not golden.trivial} or {golden.case for golden in goldens}
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        case = cases[row["case"]].case
        of_output = best.setdefault(row["name"], {})
        if case in needed and row["elements"] and row["compared"] >= of_output.get(case, row)["compared"]:
            of_output[case] = row
    for name, of_output in best.items():
        for case, row in of_output.items():
            if not row["compared"]:
                return f"{name} ({case}): {row['reason']}"
        shares = [row["compared"] / row["elements"] for row in of_output.values()]
        if shares and sum(shares) < MIN_SHARE * len(shares):
            mean = sum(shares) / len(shares)
            return f"{name}: {mean:.0%} of its elements were compared; a verdict needs {MIN_SHARE:.0%}"
    if not any(row["compared"] for row in rows):
        return "nothing was compared: every output is empty"
    values = [x.exact.ravel() for golden in goldens if golden.whole for x in golden.outputs.values()]
    known = np.concatenate([x.astype(np.float64) for x in values]) if values else np.zeros(0)
    if len(needed) > 1 and known.size > 1 and (known == known[0]).all():
        return f"every number of every output is {known[0]:g}: {NOTHING_SHOWS}"
    return None


def _coverage(goldens: Sequence[GoldenCase], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what a verdict rests on: cases, elements, and the plans that were forced or came of a probe."""
    steps = [
        np.stack([golden.outputs[f"{golden.probes}.{name}"].exact for name in ("precision", "rank")], -1).reshape(-1, 2)
        for golden in goldens
        if golden.probes and not golden.forced
    ]
    whole = [golden for golden in goldens if golden.whole]
    return {
        "cases": len({golden.case for golden in goldens if not golden.probes}),
        "runs": len(goldens),
        "elements": sum(row["compared"] for row in rows),
        "of_elements": sum(row["elements"] for row in rows),
        "forced": list(dict.fromkeys(golden.forced for golden in goldens if golden.forced)),
        "integers": {name: list(ends) for name, ends in integer_ranges(whole).items()},
        "plan_steps": len(np.unique(np.concatenate(steps), axis=0)) if steps else 0,
    }


def coverage_text(compared: Mapping[str, Any]) -> str:
    """Return a line about what a verdict rests on.

    Example:
        >>> counts = {"cases": 5, "elements": 90, "of_elements": 100}
        >>> coverage_text({**counts, "forced": ["fp32"], "integers": {"ids": [0, 99]}, "plan_steps": 6})
        '5 cases, 90 elements (90 %); plans forced to fp32; ids from 0 to 99; 6 steps of the plans reached'
    """
    share = 100 * compared["elements"] / max(1, compared["of_elements"])
    parts = [f"{compared['cases']} cases, {compared['elements']:,} elements ({share:.3g} %)"]
    if compared["forced"]:
        parts.append(f"plans forced to {', '.join(compared['forced'])}")
    parts += [f"{name} from {low} to {high}" for name, (low, high) in compared["integers"].items()]
    if compared["plan_steps"]:
        parts.append(f"{compared['plan_steps']} steps of the plans reached")
    return "; ".join(parts)


def _compare_plans(golden: GoldenCase, ran: BackendResult) -> dict[str, Any]:
    """Count heads, those whose plan differs, and those of them near their limit; return a line for each other."""
    heads = differ = excused = 0
    for name, layer in golden.layers.items():
        if name in ran.plans:
            off = _other_plans(layer, ran.plans[name])
            heads += off.size
            differ += int(off.sum())
            excused += int((off & layer.edge).sum())
    lines = [line for _, line in plan_differences(golden, ran)]
    return {"heads": heads, "differ": differ, "excused": excused, "lines": lines}


def plan_differences(golden: GoldenCase, ran: BackendResult) -> list[tuple[str, str]]:
    """Return a layer and a line for each head whose plan, or the error that it predicts, is not eager's."""
    found = []
    for name, layer in golden.layers.items():
        if name not in ran.plans:
            continue
        precision, rank = ran.plans[name]
        off = _other_plans(layer, ran.plans[name])
        for batch, head in np.argwhere(off & ~layer.edge):
            line = (
                f"{name}, batch {batch}, head {head}: plan (precision {precision[batch, head]}, rank "
                f"{rank[batch, head]}), eager has ({layer.precision[batch, head]}, {layer.rank[batch, head]})"
            )
            found.append((name, line))
        if name in ran.predicted and layer.predicted is not None and layer.predicted_limit is not None:
            got, want = ran.predicted[name], layer.predicted
            for batch, head in np.argwhere(~off & ~agree(got, want, layer.predicted_limit)):
                line = (
                    f"{name}, batch {batch}, head {head}: the plan predicts an error of {got[batch, head]:.3e}, that "
                    f"of eager {want[batch, head]:.3e}"
                )
                found.append((name, line))
    return found


def _other_plans(layer: ExpectedAttention, plan: PlanPair) -> Array:
    return np.asarray((layer.precision != plan[0]) | (layer.rank != plan[1]))


def _row(golden: GoldenCase, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "case": golden.name, "verdict": "failed", "reason": None}
    row |= {"compared": 0, "elements": int(golden.outputs[name].exact.size)}
    metrics = dict.fromkeys(("error", "eager_error", "limit", "max_abs", "cosine", "lost"))
    return row | metrics | {"ulp": [], "worst": []}


def compare_output(
    golden: GoldenCase, name: str, output: ExpectedOutput, got: Array | None, exact: Array | None = None
) -> dict[str, Any]:
    """Return the verdict on one value with its metrics.

    Args:
        exact: float64 numbers at the backend's own plan, where that is not eager's.
    """
    exact = output.exact if exact is None else exact
    row = _row(golden, name) | {"counts": np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64)}
    lost = np.zeros(exact.shape, bool) if output.excluded is None else output.excluded
    if got is None or got.shape != exact.shape:
        shape = "nothing" if got is None else f"shape {got.shape}"
        return row | {"reason": f"the backend returns {shape}; eager returns shape {exact.shape}"}
    named = "float32" if output.dtype == "bfloat16" else output.dtype
    if str(got.dtype) != named:
        return row | {"reason": f"the backend returns {got.dtype}; eager returns {output.dtype}"}
    if output.broken:
        where = f"{output.broken} of {exact.size} elements"
        return row | {
            "reason": f"eager PyTorch itself has NaN or Inf in {where}, where float64 has numbers that "
            f"{output.dtype} holds: the model fails in its type"
        }
    if exact.size and lost.all():
        return row | {"verdict": "not run", "reason": f"nothing to compare: {_why_lost(output.dtype, 'all of it')}"}
    row["compared"] = int(exact.size - lost.sum())
    left = f"{lost.sum()} of {lost.size} elements are not compared: {_why_lost(output.dtype, 'them')}"
    passed = {"verdict": "passed", "reason": left if lost.any() else None}
    if output.dtype not in RULES:
        off = (got != exact) & ~lost
        return row | (_reason(off, "differ from eager's") if off.any() else passed)
    found = _compare_numbers(output, got, clip_to_dtype(exact, output.dtype), lost)
    return row | found | (passed if found["verdict"] == "passed" and lost.any() else {})


def _compare_numbers(output: ExpectedOutput, got: Array, exact: Array, lost: Array) -> dict[str, Any]:
    """Return metrics, histogram and verdict of an output of floating-point numbers."""
    usable, standing = separate_fill_values(exact, lost)
    metrics = metrics_of(got, exact, usable, output.dtype)
    row = metrics | {"verdict": "failed", "eager_error": output.eager_error, "limit": output.limit}
    gone = usable & ~np.isfinite(got)
    if gone.any():
        return row | _reason(gone, "are NaN or Inf where eager has numbers")
    off = standing & ~agree(got, exact, output.fill_limit)
    if off.any():
        return row | _reason(off, "are not the infinities or fill values that eager has")
    if not output.limit <= MAX_LIMIT:  # NaN is no limit either
        row["compared"] = 0
        reason = f"eager PyTorch is too inaccurate itself: the limit would be {output.limit:.1e}"
        return row | {"verdict": "not run", "reason": reason}
    difference = np.abs(got[usable] - exact[usable])
    row["counts"] = histogram(difference, root_mean_square(exact[usable]))
    if not metrics["error"] <= output.limit:
        error, at = metrics["error"], metrics["worst"]
        return row | {"reason": f"error {error:.1e} is over the limit {output.limit:.1e}, worst at {at}"}
    loose = f"loose limit {output.limit:.1e}: eager PyTorch in this dtype is that inaccurate"
    return row | {"verdict": "passed", "reason": loose if output.limit > WARN_LIMIT else None}


def _why_lost(dtype: str, what: str) -> str:
    rounded = f"a rounding decides {what}"
    return f"eager PyTorch has NaN or Inf for {what}, or {rounded}" if dtype in RULES else rounded


def _reason(off: Array, what: str) -> dict[str, Any]:
    first = [int(index) for index in np.unravel_index(int(off.argmax()), off.shape)]
    return {"reason": f"{off.sum()} of {off.size} elements {what}, first at {first}", "worst": first}


def _compare_heads(
    found: dict[tuple[str, int], dict[str, Any]], golden: GoldenCase, heads: Mapping[str, Array]
) -> None:
    """Keep for each head the case in which it is worst."""
    for name, layer in golden.layers.items():
        if layer.exact is None or layer.eager_error is None or name not in heads:
            continue
        for head in range(layer.exact.shape[1]):
            got, exact = heads[name][:, head], layer.exact[:, head]
            row = metrics_of(got, exact, np.isfinite(exact), layer.dtype)
            known = found.get((name, head))
            if known is None or (row["lost"], row["error"]) > (known["lost"], known["error"]):
                about = {"layer": name, "head": head, "case": golden.name}
                found[name, head] = about | row | {"eager_error": float(layer.eager_error[head])}
