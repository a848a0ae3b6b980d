"""Render the report of an export as one HTML file without scripts or network access, with its figures inside."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from adaattn.command_line import printable
from adaattn.export.parity.compare import coverage_text
from adaattn.export.report.figure import INK, MARKERS, PRECISIONS, STYLE, axes_of, svg_of
from adaattn.export.report.types import about_types

Bars = list[tuple[float, float, int]]  # left edge, right edge, count


def render(report: dict[str, Any]) -> str:
    """Return the report as one self-contained HTML page.

    >>> page = render(json.loads(Path("out/report.json").read_text()))  # doctest: +SKIP

    Args:
        report: what `report.json` holds. Every key must be there; lists and dictionaries may be empty or None, and
            numbers None (for NaN, which JSON lacks), NaN or infinite.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    report = _without_controls(report)
    environment.filters.update(number=_number, decimal=_decimal, mebibytes=_mebibytes, over=_over)
    environment.filters["coverage"] = coverage_text
    targets = report["targets"] or []
    rows = [{**layer, "cells": _cells(layer)} for layer in report["layers"] or []]
    cells = [cell for row in rows for cell in row["cells"]]
    tokens = report["tokens"] or {}
    calibration = report["calibration"] or None
    histograms, scatter, lengths, energy = _figures(targets, rows, tokens, calibration)
    return environment.get_template("report.html.jinja").render(
        {"serving": [], "attentions": []} | {key: [] if value is None else value for key, value in report.items()},
        sentence=_sentence(targets),
        worst=[max(target["outputs"] or [], key=_badness, default=None) for target in targets],
        histograms=histograms,
        scatter=scatter,
        lengths=lengths,
        energy=energy,
        types=about_types(report["allocation"]) if report.get("allocation") else None,
        compared=_side_by_side(targets),
        worst_heads=[sorted(target["heads"] or [], key=_of_head, reverse=True)[:5] for target in targets],
        rows=rows,
        cells=cells,
        heads=max((len(row["cells"]) for row in rows), default=0),
        shares=[cell["share"] for cell in cells if math.isfinite(cell["share"])],
        counts=Counter(cell["precision"] for cell in cells),
        codes=PRECISIONS,
    )


def _without_controls(value: Any) -> Any:
    """Return the value with control characters, which HTML forbids, as escapes; line breaks stay."""
    if isinstance(value, str):
        return "\n".join(map(printable, value.split("\n")))
    if isinstance(value, dict):
        return {_without_controls(key): _without_controls(item) for key, item in value.items()}
    return [_without_controls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _number(value: Any) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}".replace("nan", "NaN")


def _decimal(value: Any, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("nan", "NaN")


def _mebibytes(count: Any) -> str:
    return f"{_decimal(_float(count) / 2**20, 1 if _float(count) >= 2**20 else 3)} MiB"


def _over(error: Any, limit: Any) -> float | None:
    return None if error is None else _ratio(error, limit)


def _ratio(error: Any, limit: Any) -> float:
    error, limit = _float(error), _float(limit)
    return error / limit if limit else math.inf if error > 0 else error


def _badness(output: dict[str, Any]) -> tuple[bool, float]:
    if output["error"] is None:  # integers are right or wrong
        return output["verdict"] == "failed", -1.0
    ratio = _ratio(output["error"], output["limit"])
    return output["verdict"] == "failed", math.inf if math.isnan(ratio) else ratio


def _of_head(head: dict[str, Any]) -> float:
    error = _float(head["error"])
    return math.inf if head["lost"] or math.isnan(error) else error


def _sentence(targets: Sequence[dict[str, Any]]) -> str:
    """Say which targets passed, failed, or were built but not run, and why."""
    passed = [target["name"] for target in targets if target["verdict"] == "passed"]
    parts = [" and ".join(filter(None, (", ".join(passed[:-1]), passed[-1]))) + " passed"] if passed else []
    rest = [target for target in targets if target["verdict"] != "passed"]
    for target in sorted(rest, key=lambda target: target["verdict"] != "failed"):
        built = "built but not run" if target["artifacts"] else "not run"
        fate = "failed" if target["verdict"] == "failed" else f"was {built}"
        # The first line of the reason: the table below has all of it.
        reason = (target["reason"] or "").strip().partition("\n")[0].rstrip(". ")
        reason = reason if len(reason) <= 160 else reason[:159].rstrip() + "…"
        parts.append(f"{target['name']} {fate}" + (f" ({reason})" if reason else ""))
    return ("; ".join(parts) or "No target was exported") + "."


def _cells(layer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of the plan's table for the heads of a layer."""
    cells, bounded = [], layer["tolerance"] is not None and bool(layer["measured"])
    lists = (layer[key] or [] for key in ("precision", "rank", "predicted", "measured"))
    for precision, *numbers in zip_longest(*lists):
        rank, predicted, measured = map(_float, numbers)
        cell = {"precision": precision, "rank": rank, "predicted": predicted, "measured": measured}
        cell["share"] = rank / layer["head_dim"] if layer["head_dim"] else math.nan
        cell["over"] = bounded and not measured <= _float(layer["tolerance"])  # NaN is over
        cell["drawn"] = 0 < predicted < math.inf and 0 < measured < math.inf
        cells.append(cell)
    return cells


def _side_by_side(targets: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any] | None]]:
    """Return for each output of each case the rows of the targets that ran."""
    ran = [{(row["name"], row["case"]): row for row in target["outputs"] or []} for target in targets]
    names = dict.fromkeys(name for rows in ran for name in rows)
    return {f"{name}, {case}": [rows.get((name, case)) for rows in ran if rows] for name, case in names}


def _figures(
    targets: Sequence[Any], rows: Sequence[Any], tokens: dict[str, int], calibration: dict[str, Any] | None
) -> tuple[list[Markup | None], Markup | None, Markup | None, Markup | None]:
    """Draw a histogram for each target, the scatter of heads, errors over lengths, and energies of a calibration."""
    import matplotlib  # slow to import, and only a report needs it

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's matplotlibrc
        matplotlib.rcParams.update(STYLE)
        bars = [_bars(target["histogram"] or {"log10_edges": [], "counts": []}) for target in targets]
        edges = [edge for target in bars for bar in target for edge in bar[:2]]
        histograms = [_histogram(own, edges, f"histogram{n}") for n, own in enumerate(bars, 1)]
        energy = None if calibration is None else _energy(calibration["layers"])
        return histograms, _scatter(rows), _lengths(targets, tokens), energy


def _bars(histogram: dict[str, Any]) -> Bars:
    edges = [_float(edge) for edge in histogram["log10_edges"]]
    bars = zip(edges, edges[1:], histogram["counts"], strict=False)
    return [bar for bar in bars if bar[2] and math.isfinite(bar[0]) and math.isfinite(bar[1])]


def _histogram(bars: Bars, edges: list[float], name: str) -> Markup | None:
    if not bars:
        return None
    figure, axes = axes_of(4.4, 2.3)
    left, right, counts = zip(*bars, strict=True)
    widths = [b - a for a, b in zip(left, right, strict=True)]
    axes.bar(left, counts, widths, align="edge", color=INK["accent"], log=True)
    axes.set(xlim=(min(edges), max(edges)), ylim=(0.5, 2 * max(counts)))  # one x axis for all: they compare
    axes.set(xlabel="log10 of |error| / RMS of the output", ylabel="elements")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}" if value < 1e4 else f"{value:.0e}")
    return svg_of(figure, name)


def _scatter(rows: Sequence[Any]) -> Markup | None:
    points = [cell for row in rows for cell in row["cells"] if cell["drawn"]]
    if not points:
        return None
    tolerances = sorted({row["tolerance"] for row in rows if 0 < _float(row["tolerance"]) < math.inf})
    values = [cell[key] for cell in points for key in ("predicted", "measured")] + tolerances
    ends = (min(values) / 2, max(2 * max(values), 20 * min(values)))  # at least a decade, so that a tick shows
    figure, axes = axes_of(4.6, 4.4)
    axes.plot(ends, ends, color=INK["muted"], linewidth=1, linestyle="--", label="measured = predicted")
    for tolerance in tolerances if len(tolerances) <= 3 else (tolerances[0], tolerances[-1]):
        axes.axhline(tolerance, color=INK["bad"], linewidth=1.2)
        axes.annotate(f"tolerance {tolerance:.1e}", (ends[0], tolerance), (4, 3), textcoords="offset points")
    for name, marker in MARKERS.items():
        own = [cell for cell in points if name == (cell["precision"] if cell["precision"] in PRECISIONS else "other")]
        if own:
            x, y = ([cell[key] for cell in own] for key in ("predicted", "measured"))
            axes.plot(x, y, marker, markersize=5, color=INK[name], mec=INK["ink"], mew=0.5, label=name)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="predicted error", ylabel="measured error")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.0e}")
    figure.legend(loc="outside lower center", ncols=3)
    return svg_of(figure, "scatter")


def _lengths(targets: Sequence[Any], tokens: dict[str, int]) -> Markup | None:
    """Draw the worst error of an output at each length, of each target and of eager PyTorch, and the limit."""
    lines: dict[str, dict[int, float]] = {}
    for target in targets:
        for row in target["outputs"] or []:
            length = tokens.get(row["case"])
            for name, key in ((target["name"], "error"), ("eager PyTorch", "eager_error"), ("limit", "limit")):
                value = _float(row[key])
                if length and 0 < value < math.inf:
                    line = lines.setdefault(name, {})
                    line[length] = max(value, line.get(length, 0.0))
    if max((len(line) for line in lines.values()), default=0) < 2:
        return None
    figure, axes = axes_of(4.6, 3.2)
    plain = {"eager PyTorch": ("muted", "--", ""), "limit": ("bad", ":", "")}
    styles = zip(["-"] * len(lines), "osD^vX", strict=False)
    for name, line in lines.items():
        ink, dash, marker = plain[name] if name in plain else ("accent", *next(styles, ("-", "")))
        axes.plot(*zip(*sorted(line.items()), strict=True), dash, marker=marker, ms=5, color=INK[ink], label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="worst error of an output")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    figure.legend(loc="outside lower center", ncols=3)
    return svg_of(figure, "lengths")


def _energy(layers: Sequence[dict[str, Any]]) -> Markup | None:
    """Draw the share of energy beyond each rank, one line a layer, before and after a calibration."""
    if not any(0 < _float(share) < math.inf for layer in layers for each in layer["beyond"] for share in each):
        return None
    figure, axes = axes_of(4.6, 3.2)
    for layer in layers:
        for place, (dash, ink) in enumerate((("--", "muted"), ("-", "accent"))):
            shares = [_float(share) for share in layer["beyond"][place]]
            first = layer is layers[0]
            label = ("before", "after")[place] if first else None
            axes.plot(range(len(shares)), shares, dash, color=INK[ink], linewidth=1, label=label)
    axes.set(yscale="log", ylim=(1e-6, 1.5), xlabel="rank", ylabel="share of the energy beyond it")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    figure.legend(loc="outside lower center", ncols=2)
    return svg_of(figure, "energy")
