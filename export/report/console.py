"""Print a report on the console."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaattn.command_line import one_line, printable
from adaattn.export.parity.compare import coverage_text


def print_report(report: Mapping[str, Any], where: str) -> None:
    """Print a table of the targets, and the reasons of those that did not pass.

    Names and reasons come from files and from other packages, so they are printed as text, never as markup.

    Args:
        where: path of the whole report.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for column in ("target", "verdict", "error", "eager's", "limit", "size", "time"):
        table.add_column(column, justify="left" if column in ("target", "verdict") else "right")
    colors = {"passed": "green", "failed": "red", "not run": "yellow"}
    for target in report["targets"]:
        measured = [row for row in target["outputs"] if row["error"] is not None]
        worst = max(measured, key=_share, default=None)
        numbers = ["" if worst is None else _number(worst[key]) for key in ("error", "eager_error", "limit")]
        size = sum(artifact["bytes"] for artifact in target["artifacts"]) / 2**20
        color = colors[target["verdict"]]
        table.add_row(
            Text(printable(target["name"])),
            Text(target["verdict"], style=color),
            *numbers,
            f"{size:.1f} MiB",
            f"{target['seconds']:.1f} s",
        )
    console.print(table)
    for target in report["targets"]:
        if target["reason"]:
            console.print(one_line(f"{target['name']}: {target['reason']}"), style="dim", soft_wrap=True)
        if target["compared"]:
            compared = f"{target['name']}: compared {coverage_text(target['compared'])}"
            console.print(one_line(compared), style="dim", soft_wrap=True)
        ops = list((target["ops"] or {}).values())
        if "plugin" in ops or "body" in ops:
            console.print(
                f"{target['name']}: {ops.count('plugin')} ops became plugins, {ops.count('body')} compiled functions"
            )
        plans = target["plans"]
        if plans and plans["differ"]:
            console.print(
                f"{target['name']}: {plans['differ']} of {plans['heads']} plans differ from eager's, "
                f"{plans['excused']} of them within rounding of their limit"
            )
    for line in attentions_text(report.get("attentions", [])):
        console.print(one_line(f"attention: {line}"), style="dim", soft_wrap=True)
    if report.get("allocation"):
        console.print(one_line(types_text(report["allocation"])), style="dim", soft_wrap=True)
    for package in report.get("serving", []):  # reports of 0.1.0 have none
        said = f"written; {package['command']}" if package["artifacts"] else "not written: the engine was not built"
        console.print(one_line(f"serve {package['name']}: {said}"), style="dim", soft_wrap=True)
    for warning in report["warnings"]:
        console.print(one_line(f"warning: {warning}"), style="yellow")
    console.print(Text.assemble((report["verdict"], "bold"), f"  {printable(where)}"), soft_wrap=True)


def types_text(allocation: Mapping[str, Any]) -> str:
    """Return a line on a compile-time plan: what was measured, and what work has which format."""
    total = sum(site["flops"] for site in allocation["sites"]) or 1.0
    work = Counter[str]()
    for site in allocation["sites"]:
        work[site["format"]] += site["flops"] / total
    shares = ", ".join(f"{form} {share:.0%}" for form, share in work.most_common() if share >= 0.005)
    time = allocation["cost"] / (allocation["cost_fp32"] or 1.0)
    count, quantile = len(allocation["certified"]), allocation["quantile"]
    enough = math.ceil((count + 1) * quantile) <= count
    return (
        f"types: {allocation['measured']:.1e} of {allocation['tolerance']:.1e} on {count} certifying samples "
        f"({quantile:.0%} quantile{'' if enough else '; too few to promise it for others'}); work: {shares}; "
        f"estimated for {allocation['device']}: {time:.2f} of the time of fp32, {allocation['casts']} casts"
    )


def _share(row: Mapping[str, Any]) -> float:
    """Return the error as a share of its limit; a limit that is not finite is None in a report."""
    limit = math.inf if row["limit"] is None else row["limit"]
    return float(row["error"] / max(limit, 1e-300))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def attentions_text(attentions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines on the attentions of a model: how many became one op, and which did not and why.

    Example:
        >>> attentions_text([{"path": "encoder.0", "became": "adaptive_attention", "reason": None}])
        ['1 of 1 attentions are adaptive']
    """
    if not attentions:
        return []
    made = Counter(each["became"] for each in attentions)
    adaptive = made["adaptive_attention"]
    if adaptive:
        lines = [f"{adaptive} of {len(attentions)} attentions are adaptive"]
    else:
        lines = [f"{made.total() - made[None]} of {len(attentions)} attentions are scaled_dot_product_attention"]
    left: dict[str, list[str]] = {}
    for each in attentions:
        if each["became"] is None:
            left.setdefault(each["reason"], []).append(each["path"])
    for reason, paths in left.items():
        shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        lines.append(f"{shown} as before: {reason}")
    return lines
