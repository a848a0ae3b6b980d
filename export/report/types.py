"""Describe a compile-time plan for the report: its error budget, its certificate and its formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from adaattn.export.report.figure import INK, STYLE, axes_of, svg_of

# With the names of their colours.
FORMATS = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "fp8": "int8_fp8", "plugin": "int8"}
TOP = 12  # sites that a table lists


def about_types(allocation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures and numbers of a plan, as `report.json` has it."""
    import matplotlib  # slow to import, and only a report needs it

    sites = allocation["sites"]
    total = sum(site["flops"] for site in sites) or 1.0
    kinds = [form for form in FORMATS if any(site["format"] == form for site in sites)]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's matplotlibrc
        matplotlib.rcParams.update(STYLE)
        return {
            "budget": _budget(sites, kinds),
            "certificate": _certificate(allocation),
            "colors": FORMATS,
            "formats": [
                {
                    "name": form,
                    "sites": sum(site["format"] == form for site in sites),
                    "work": sum(site["flops"] for site in sites if site["format"] == form) / total,
                    "share": sum(site["share"] for site in sites if site["format"] == form),
                }
                for form in kinds
            ],
            "top": [{**site, "plans": _plans(site)} for site in sorted(sites, key=lambda site: -site["share"])[:TOP]],
            "saved": 1 - allocation["cost"] / allocation["cost_fp32"] if allocation["cost_fp32"] else 0.0,
        }


def _plans(site: Mapping[str, Any]) -> str:
    """Say how many heads of an attention have each precision and rank; nothing where they have no plans."""
    counts = Counter(tuple(plan) for plan in (site["heads"] or {}).get("plans", ()))
    return ", ".join(f"{count} × {name} at rank {rank}" for (name, rank), count in counts.most_common())


def _budget(sites: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Markup:
    """Draw the share of the error that each site has, along the model, in the colour of its format."""
    figure, axes = axes_of(4.6, 2.6)
    for form in kinds:
        own = [(place, 100 * site["share"]) for place, site in enumerate(sites) if site["format"] == form]
        x, y = zip(*own, strict=True)
        axes.bar(x, y, 0.9, color=INK[FORMATS[form]], edgecolor=INK["ink"], linewidth=0.4, label=form)
    axes.set(xlabel="operators, in the order of the model", ylabel="% of the squared error", xlim=(-1, len(sites)))
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside lower center", ncols=len(kinds))
    return svg_of(figure, "budget")


def _certificate(allocation: Mapping[str, Any]) -> Markup:
    """Draw the errors of the certifying samples in order, the tolerance, and what was predicted."""
    errors = sorted(x for x in allocation["certified"] if x is not None)
    figure, axes = axes_of(4.6, 2.6)
    share = [100 * (place + 1) / len(errors) for place in range(len(errors))]
    axes.step(errors, share, where="post", color=INK["accent"], linewidth=1.5, label="samples")
    axes.axvline(allocation["tolerance"], color=INK["bad"], linewidth=1.2, label="tolerance")
    if allocation["metric"] is None:
        axes.axvline(allocation["predicted"], color=INK["muted"], linewidth=1, linestyle="--", label="predicted")
    axes.axhline(100 * allocation["quantile"], color=INK["rule"], linewidth=1)
    positive = [x for x in (*errors, allocation["tolerance"], allocation["predicted"]) if x > 0]
    ends = min(positive) / 2, max(2 * max(positive), 20 * min(positive))  # at least a decade, so that a tick shows
    axes.set(xscale="log", xlim=ends, ylim=(0, 104))
    axes.set(xlabel=allocation["metric"] or "relative error of the output", ylabel="% of samples under it")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    figure.legend(loc="outside lower center", ncols=3)
    return svg_of(figure, "certificate")
