"""Measure how far a result is from float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from adaattn.export.artifacts.arrays import Array
from adaattn.export.parity.criterion import RULES

HISTOGRAM_EDGES = [-12 + 0.5 * i for i in range(29)]
ULP_QUANTILES = (0.5, 0.99, 1.0)


def relative_error(difference: Array, exact: Array) -> float:
    """Return the root mean square of the difference relative to that of the wanted numbers; 0 for two zeros."""
    error, size = root_mean_square(difference), root_mean_square(exact)
    return error / size if size > 0 else error


def root_mean_square(x: Array) -> float:
    """Return the root mean square of an array; 0 of an empty one."""
    peak = float(np.abs(x).max(initial=0.0))  # squares of huge and tiny numbers leave float64's range
    return peak * float(np.sqrt(np.square(x / peak).mean())) if peak > 0 else peak


def metrics_of(got: Array, exact: Array, usable: Array, dtype: str) -> dict[str, Any]:
    """Measure how far a result is from the wanted one in its `usable` elements; `lost` counts its NaN and Inf."""
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
    sizes = root_mean_square(a) * root_mean_square(b)
    return (
        float((a / root_mean_square(a) * (b / root_mean_square(b))).mean())
        if sizes > 0
        else float(root_mean_square(a) == root_mean_square(b))
    )


def _ulps(difference: Array, exact: Array, dtype: str) -> list[float]:
    """Return quantiles of the error in units of the last place of the wanted numbers."""
    if not exact.size:
        return []
    exponent = np.maximum(np.frexp(exact)[1] - 1, RULES[dtype].smallest)
    steps = np.ldexp(1.0, exponent - RULES[dtype].digits)
    return [float(x) for x in np.quantile(difference / steps, ULP_QUANTILES)]


def histogram(difference: Array, size: float) -> Array:
    """Count differences, relative to a size, in the bins of HISTOGRAM_EDGES."""
    logs = np.log10(np.maximum(difference / max(size, 1e-300), 1e-300))
    return np.histogram(np.clip(logs, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]), HISTOGRAM_EDGES)[0]
