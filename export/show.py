"""The report on the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from adaattn.export.parity import coverage_text


def show(report: Mapping[str, Any], where: str) -> None:
    """Print a table of the targets, and why they are not all passed.

    Args:
        where: the rest of the report can be read.
    """
    console = Console()
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    for column in ("target", "verdict", "error", "eager's", "limit", "size", "time"):
        table.add_column(column, justify="left" if column in ("target", "verdict") else "right")
    colors = {"passed": "green", "failed": "red", "not run": "yellow"}
    for target in report["targets"]:
        measured = [row for row in target["outputs"] if row["error"] is not None]
        worst = max(measured, key=lambda row: row["error"] / max(row["limit"], 1e-300), default=None)
        numbers = [f"{worst[key]:.1e}" if worst else "" for key in ("error", "eager_error", "limit")]
        size = sum(artifact["bytes"] for artifact in target["artifacts"]) / 2**20
        color = colors[target["verdict"]]
        table.add_row(
            target["name"],
            f"[{color}]{target['verdict']}[/]",
            *numbers,
            f"{size:.1f} MiB",
            f"{target['seconds']:.1f} s",
        )
    console.print(table)
    for target in report["targets"]:
        if target["reason"]:
            said = f"{target['name']}: {target['reason']}"
            console.print(said, style="dim", highlight=False, markup=False, soft_wrap=True)
        if target["compared"]:
            compared = f"{target['name']}: compared {coverage_text(target['compared'])}"
            console.print(compared, style="dim", highlight=False, markup=False, soft_wrap=True)
        ops = list((target["ops"] or {}).values())
        if "plugin" in ops or "body" in ops:
            console.print(
                f"{target['name']}: {ops.count('plugin')} ops became plugins, {ops.count('body')} compiled bodies",
                highlight=False,
            )
        plans = target["plans"]
        if plans and plans["differ"]:
            console.print(
                f"{target['name']}: {plans['differ']} of {plans['heads']} plans differ from eager's, "
                f"{plans['excused']} of them on the edge of their limit",
                highlight=False,
            )
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
    console.print(f"[bold]{report['verdict']}[/bold]  {where}", highlight=False, soft_wrap=True)
