"""The verdict on a backend: its numbers against eager PyTorch in float64, with the rule and its constants.

Both the backend and eager PyTorch in the model's own type are measured against float64 at the same plan. The backend
passes where its error is at most FACTOR times eager's own (or what a rounding of q and k makes of the output, if that
is more) plus a floor, its plans are eager's, and it has no NaN or Inf that eager has not. Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adaattn.errors import ConfigError
from adaattn.export.golden import Array, Golden, Layer, Output, integer_ranges

FACTOR = 2.0  # two summation orders of equal merit differ by about this
# The most that a limit may have beside eager's error: a few ulps of the type after a handful of layers.
FLOOR = {"float64": 1e-14, "float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}
# Where an operand is between two integers of int8, or numbers of bf16, the last bit of a sum decides: some 1e-4 of them
# may round the other way, and noise of √1e-4 steps is this share of the rounding error that the plan has anyway.
FLIPS = 0.05
# A head may choose another plan where its moments, moved by so much, make eager do so: sums of thousands of terms.
NUDGE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
# Twice by how much q and k differ (rms, relative) where a projection sums in another order: 1e-7 was measured for a
# width of 32 in float32; the others round such a sum, which is a quarter of their last place.
SHAKE = {"float64": 4e-16, "float32": 2e-7, "float16": 5e-4, "bfloat16": 4e-3}
# What every result of an operator may be off by, to see which integers that come of it hang on a rounding.
NOISE = {dtype: 2 * share for dtype, share in SHAKE.items()}
# Half a unit in the last place: an output that eager has exactly right may be rounded once more.
HALF_ULP = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# One number's error in one run may be this much smaller than in another; that of n numbers a √n-th of it.
LUCK = 8.0
# The mean share of an output's elements, over all cases but the trivial one, that a verdict "passed" needs.
MIN_SHARE = 0.25
# Moments of a probe are those of a case, times these: the query's alone, then the query's and the value's.
PROBE_SCALES = np.geomspace(1e-3, 1e3, 121)
PROBE_POWERS = {"mean": 1, "second_moment": 2, "channel_peak": 1, "token_peak": 2}
# Plans of a probe may differ where they do so within limits that differ by this share: sums in float32.
PROBE_EDGE = 1e-4
# A larger limit would pass zeros, or nearly: eager PyTorch does not know the answer itself.
USELESS = 0.5
LOOSE = 0.1  # and one above this is worth a word
OPERAND = "operand."  # begins the name of an input of a probe that is an operand of the attention, not of the model
NOTHING_SHOWS = "nothing of the graph shows in them"
EXACT = "fp32"  # the name of plans that are forced to fp32 at full rank
HISTOGRAM_EDGES = [-12 + 0.5 * i for i in range(29)]
DIGITS = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}  # of the mantissa
LARGEST = {"float64": math.inf, "float32": 3.4028235e38, "float16": 65504.0, "bfloat16": 3.3895314e38}
SMALLEST = {"float64": -1022, "float32": -126, "float16": -14, "bfloat16": -126}  # exponent of a normal number
ULP_QUANTILES = (0.5, 0.99, 1.0)

PlanPair = tuple[Array, Array]  # precision and rank, (B, H) each


@dataclass(frozen=True)
class Ran:
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


Backend = Callable[[Golden], Ran]
ExactAt = Callable[[Golden, Mapping[str, PlanPair]], Mapping[str, Array]]
"""float64 outputs of a case at plans that are not eager's; it takes the model."""


def limit_of(
    eager_error: float,
    dtype: str,
    rounding: float = 0.0,
    shaken: Sequence[float] = (),
    inner: str | None = None,
    count: int = 1 << 30,
) -> float:
    """The error that a backend may have.

    Args:
        eager_error: of eager PyTorch in the model's type.
        dtype: of the output.
        rounding: largest predicted rounding error of a head.
        shaken: errors of float64 with q and k off by SHAKE, each way. What lies on an edge (two keys that nearly tie
            for a row, a number between two integers of int8) falls to the other side in one of them.
        inner: the type of the weights, whose floor counts as far as eager's error shows that it matters.

        count: how many numbers the error is of.

    Where nothing is rounded the limit of an output of many numbers is three times eager's error: a change by four times
    that fails. The fewer numbers there are, the less their error in one run says of that in another.
    """
    luck = 1 + LUCK / math.sqrt(max(1, count))
    floor = min(max(FLOOR[dtype], FLOOR[inner or dtype]), luck * max(eager_error, HALF_ULP[dtype]))
    return max(FACTOR * eager_error, math.hypot(*shaken)) + floor + FLIPS * rounding


def within(exact: Array, dtype: str) -> Array:
    """Finite numbers of float64 as far as the type goes: the least number of a type is often written for -inf."""
    if dtype not in LARGEST:
        return exact
    return np.where(np.isinf(exact), exact, np.clip(exact, -LARGEST[dtype], LARGEST[dtype]))


def judged(exact: Array, lost: Array | None) -> tuple[Array, Array]:
    """Which elements of an output the error is of, and which must be there one by one: infinities and fill values.

    An error over the output would be that of its fill values, such as -1e9 behind a mask, and of nothing else. They are
    the largest numbers, where these are at least 1000 and 100 times all that are less than half of them; and so on with
    the others, for there may be several.

    Args:
        lost: elements that are not compared.
    """
    there = np.ones(exact.shape, bool) if lost is None else ~lost
    finite = there & np.isfinite(exact)
    size = np.abs(np.where(finite, exact, 0.0))
    rest = finite
    while True:
        peak = float(size[rest].max(initial=0.0))
        below = rest & (size < peak / 2)
        if peak < 1000 or not below.any() or float(size[below].max()) > peak / 100:
            return rest, there & ~rest & ~np.isnan(exact)
        rest = below


def farthest(got: Array, exact: Array) -> float:
    """The largest relative error of finite fill values."""
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(got.astype(np.float64) - exact) / np.abs(exact)
    return float(errors[np.isfinite(exact)].max(initial=0.0))


def compare(goldens: Sequence[Golden], backend: Backend, exact_at: ExactAt | None = None) -> dict[str, Any]:
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


def _never_compared(goldens: Sequence[Golden], rows: Sequence[dict[str, Any]]) -> str | None:
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


def _coverage(goldens: Sequence[Golden], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
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


def probe_inputs(golden: Golden) -> dict[str, Array]:
    """Return the moments that a probe gives to the op `plan`, by the names of its arguments.

    Args:
        golden: a probe; its inputs are the moments of one sequence, (1, H, ...) each.

    Returns:
        Twice PROBE_SCALES as many sequences: the moments with the query's scaled, and with the query's and the value's.

    Raises:
        ConfigError: the golden has an input that is not a moment.
    """
    once = np.ones_like(PROBE_SCALES)
    scales = {"query": np.tile(PROBE_SCALES, 2), "key": np.tile(once, 2), "value": np.append(once, PROBE_SCALES)}
    found = {}
    for name, x in golden.inputs.items():
        of, _, kind = name.partition("_")
        if of not in scales or kind not in PROBE_POWERS:
            raise ConfigError(f"{golden.name} has an input {name!r}, which is not a moment")
        factors = (scales[of] ** PROBE_POWERS[kind]).astype(np.float32)
        found[name] = factors.reshape(-1, *(1,) * (x.ndim - 1)) * x
    return found


def relative_error(difference: Array, exact: Array) -> float:
    """Root mean square of the difference, relative to that of what was wanted; 0 for two zeros."""
    error, size = _rms(difference), _rms(exact)
    return error / size if size > 0 else error


def _rms(x: Array) -> float:
    peak = float(np.abs(x).max(initial=0.0))  # squares of huge and tiny numbers leave float64's range
    return peak * float(np.sqrt(np.square(x / peak).mean())) if peak > 0 else peak


def _compare_plans(golden: Golden, ran: Ran) -> dict[str, Any]:
    """How many heads, how many whose plan differs, how many of them on the edge, and a line for each other."""
    heads = differ = excused = 0
    for name, layer in golden.layers.items():
        if name in ran.plans:
            off = _other_plans(layer, ran.plans[name])
            heads += off.size
            differ += int(off.sum())
            excused += int((off & layer.edge).sum())
    lines = [line for _, line in plan_differences(golden, ran)]
    return {"heads": heads, "differ": differ, "excused": excused, "lines": lines}


def plan_differences(golden: Golden, ran: Ran) -> list[tuple[str, str]]:
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
            for batch, head in np.argwhere(~off & ~stands(got, want, layer.predicted_limit)):
                line = (
                    f"{name}, batch {batch}, head {head}: the plan predicts an error of {got[batch, head]:.3e}, that "
                    f"of eager {want[batch, head]:.3e}"
                )
                found.append((name, line))
    return found


def _other_plans(layer: Layer, plan: PlanPair) -> Array:
    return np.asarray((layer.precision != plan[0]) | (layer.rank != plan[1]))


def _row(golden: Golden, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "case": golden.name, "verdict": "failed", "reason": None}
    row |= {"compared": 0, "elements": int(golden.outputs[name].exact.size)}
    metrics = dict.fromkeys(("error", "eager_error", "limit", "max_abs", "cosine", "lost"))
    return row | metrics | {"ulp": [], "worst": []}


def compare_output(
    golden: Golden, name: str, output: Output, got: Array | None, exact: Array | None = None
) -> dict[str, Any]:
    """Return the verdict on one value with its metrics.

    Args:
        exact: float64 numbers at the backend's own plan, where that is not eager's.
    """
    exact = output.exact if exact is None else exact
    row = _row(golden, name) | {"counts": np.zeros(len(HISTOGRAM_EDGES) - 1, np.int64)}
    lost = np.zeros(exact.shape, bool) if output.lost is None else output.lost
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
    if output.dtype not in DIGITS:
        off = (got != exact) & ~lost
        return row | (_reason(off, "differ from eager's") if off.any() else passed)
    found = _compare_numbers(output, got, within(exact, output.dtype), lost)
    return row | found | (passed if found["verdict"] == "passed" and lost.any() else {})


def _compare_numbers(output: Output, got: Array, exact: Array, lost: Array) -> dict[str, Any]:
    """Metrics, histogram and verdict of an output of floating-point numbers."""
    usable, standing = judged(exact, lost)
    metrics = _metrics(got, exact, usable, output.dtype)
    row = metrics | {"verdict": "failed", "eager_error": output.eager_error, "limit": output.limit}
    gone = usable & ~np.isfinite(got)
    if gone.any():
        return row | _reason(gone, "are NaN or Inf where eager has numbers")
    off = standing & ~stands(got, exact, output.fill_limit)
    if off.any():
        return row | _reason(off, "are not the infinities or fill values that eager has")
    if not output.limit <= USELESS:  # NaN is no limit either
        row["compared"] = 0
        reason = f"eager PyTorch errs too much itself: the limit would be {output.limit:.1e}"
        return row | {"verdict": "not run", "reason": reason}
    difference = np.abs(got[usable] - exact[usable])
    row["counts"] = _histogram(difference, _rms(exact[usable]))
    if not metrics["error"] <= output.limit:
        error, at = metrics["error"], metrics["worst"]
        return row | {"reason": f"error {error:.1e} is over the limit {output.limit:.1e}, worst at {at}"}
    loose = f"the limit is {output.limit:.1e}: so uncertain is eager PyTorch itself"
    return row | {"verdict": "passed", "reason": loose if output.limit > LOOSE else None}


def _why_lost(dtype: str, what: str) -> str:
    rounded = f"a rounding decides {what}"
    return f"eager PyTorch has NaN or Inf for {what}, or {rounded}" if dtype in DIGITS else rounded


def _reason(off: Array, what: str) -> dict[str, Any]:
    first = [int(index) for index in np.unravel_index(int(off.argmax()), off.shape)]
    return {"reason": f"{off.sum()} of {off.size} elements {what}, first at {first}", "worst": first}


def stands(got: Array, exact: Array, limit: float | Array) -> Array:
    """Where infinities are the same, and other numbers within a relative limit."""
    with np.errstate(invalid="ignore", over="ignore"):
        near = np.abs(got.astype(np.float64) - exact) <= limit * np.abs(exact)
    return np.where(np.isinf(exact), got == exact, near)


def _metrics(got: Array, exact: Array, usable: Array, dtype: str) -> dict[str, Any]:
    """How far a result is from what was wanted, in its `usable` elements; those `lost` to NaN and Inf count apart."""
    lost = usable & ~np.isfinite(got)
    usable = usable & ~lost
    got, exact = np.where(usable, got, 0).astype(np.float64), np.where(usable, exact, 0).astype(np.float64)
    difference = np.abs(got - exact)
    worst = np.unravel_index(int((lost if lost.any() else difference).argmax()), exact.shape) if exact.size else ()
    return {
        "error": relative_error(difference, exact),
        "max_abs": float(difference.max(initial=0.0)),
        "cosine": _cosine(got, exact),
        "ulp": _ulps(difference[usable], exact[usable], dtype),
        "worst": [int(index) for index in worst],
        "lost": int(lost.sum()),
    }


def _cosine(a: Array, b: Array) -> float:
    sizes = _rms(a) * _rms(b)
    return float((a / _rms(a) * (b / _rms(b))).mean()) if sizes > 0 else float(_rms(a) == _rms(b))


def _ulps(difference: Array, exact: Array, dtype: str) -> list[float]:
    """Quantiles of the error in units of the last place that the type has at what was wanted."""
    if not exact.size:
        return []
    exponent = np.maximum(np.frexp(exact)[1] - 1, SMALLEST[dtype])
    steps = np.ldexp(1.0, exponent - DIGITS[dtype])
    return [float(x) for x in np.quantile(difference / steps, ULP_QUANTILES)]


def _histogram(difference: Array, size: float) -> Array:
    logs = np.log10(np.maximum(difference / max(size, 1e-300), 1e-300))
    return np.histogram(np.clip(logs, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]), HISTOGRAM_EDGES)[0]


def _compare_heads(found: dict[tuple[str, int], dict[str, Any]], golden: Golden, heads: Mapping[str, Array]) -> None:
    """Keep for each head the case in which it is worst."""
    for name, layer in golden.layers.items():
        if layer.exact is None or layer.eager_error is None or name not in heads:
            continue
        for head in range(layer.exact.shape[1]):
            got, exact = heads[name][:, head], layer.exact[:, head]
            row = _metrics(got, exact, np.isfinite(exact), layer.dtype)
            known = found.get((name, head))
            if known is None or (row["lost"], row["error"]) > (known["lost"], known["error"]):
                about = {"layer": name, "head": head, "case": golden.name}
                found[name, head] = about | row | {"eager_error": float(layer.eager_error[head])}
