"""Define the parity rule: its constants, the limit of an output, and which elements its error includes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaattn.errors import ConfigError
from adaattn.export.artifacts.arrays import Array
from adaattn.export.parity.golden_case import GoldenCase

FACTOR = 2.0  # two summation orders of equal merit differ by about this
# Where an operand is between two integers of int8, or numbers of bf16, the last bit of a sum decides: some 1e-4 of them
# may round the other way, and noise of √1e-4 steps is this share of the rounding error that the plan has anyway.
ROUNDING_SHARE = 0.05
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
MAX_LIMIT = 0.5
WARN_LIMIT = 0.1  # and one above this is worth a word
OPERAND = "operand."  # begins the name of an input of a probe that is an operand of the attention, not of the model
NOTHING_SHOWS = "nothing of the graph shows in them"
EXACT = "fp32"  # the name of plans that are forced to fp32 at full rank


@dataclass(frozen=True)
class DtypeRule:
    """The parity rule's constants for a type.

    Args:
        floor: the most that a limit may have beside eager's error: a few ulps of the type after a handful of layers.
        nudge: share by which moments are moved to see which heads then choose another plan: sums of thousands of terms.
        shake: twice the relative difference (rms) of q and k where a projection sums in another order. 1e-7 was
            measured for a width of 32 in float32; the others round such a sum, a quarter of their last place.
        half_ulp: half a unit in the last place: an output that eager has exactly right may be rounded once more.
        digits: of the mantissa.
        largest: the largest finite number.
        smallest: the exponent of the smallest normal number.
    """

    floor: float
    nudge: float
    shake: float
    half_ulp: float
    digits: int
    largest: float
    smallest: int

    @property
    def noise(self) -> float:
        """The most that a result of an operator may be off, to see which integers made from it hang on a rounding."""
        return 2 * self.shake


RULES = {
    "float64": DtypeRule(1e-14, 1e-12, 4e-16, 2.0**-53, 52, math.inf, -1022),
    "float32": DtypeRule(2e-6, 1e-5, 2e-7, 2.0**-24, 23, 3.4028235e38, -126),
    "float16": DtypeRule(5e-4, 1e-3, 5e-4, 2.0**-11, 10, 65504.0, -14),
    "bfloat16": DtypeRule(4e-3, 1e-2, 4e-3, 2.0**-8, 7, 3.3895314e38, -126),
}
"""By the type of an output; other types are compared exactly."""

PlanPair = tuple[Array, Array]  # precision and rank, (B, H) each


def limit_of(
    eager_error: float,
    dtype: str,
    rounding: float = 0.0,
    shaken: Sequence[float] = (),
    inner: str | None = None,
    count: int = 1 << 30,
) -> float:
    """Return the error that a backend may have.

    Args:
        eager_error: of eager PyTorch in the model's type.
        dtype: of the output.
        rounding: largest predicted rounding error of a head.
        shaken: errors of float64 with q and k off by `shake`, each way. What lies on an edge (two keys that nearly tie
            for a row, a number between two integers of int8) falls to the other side in one of them.
        inner: the type of the weights, whose floor counts as far as eager's error shows that it matters.
        count: how many numbers the error is of.

    Where nothing is rounded the limit of an output of many numbers is three times eager's error: a change by four times
    that fails. The fewer numbers there are, the less their error in one run says of that in another.
    """
    luck = 1 + LUCK / math.sqrt(max(1, count))
    floor = min(max(RULES[dtype].floor, RULES[inner or dtype].floor), luck * max(eager_error, RULES[dtype].half_ulp))
    return max(FACTOR * eager_error, math.hypot(*shaken)) + floor + ROUNDING_SHARE * rounding


def clip_to_dtype(exact: Array, dtype: str) -> Array:
    """Clip finite float64 numbers to the range of a type, whose least number often means -inf."""
    if dtype not in RULES:
        return exact
    return np.where(np.isinf(exact), exact, np.clip(exact, -RULES[dtype].largest, RULES[dtype].largest))


def separate_fill_values(exact: Array, lost: Array | None) -> tuple[Array, Array]:
    """Return which elements enter the error, and which are compared one by one: infinities and fill values.

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


def largest_relative_error(got: Array, exact: Array) -> float:
    """Return the largest relative error of finite fill values."""
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(got.astype(np.float64) - exact) / np.abs(exact)
    return float(errors[np.isfinite(exact)].max(initial=0.0))


def probe_inputs(golden: GoldenCase) -> dict[str, Array]:
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


def agree(got: Array, exact: Array, limit: float | Array) -> Array:
    """Return where infinities are the same and other numbers are within a relative limit."""
    with np.errstate(invalid="ignore", over="ignore"):
        near = np.abs(got.astype(np.float64) - exact) <= limit * np.abs(exact)
    return np.where(np.isinf(exact), got == exact, near)
