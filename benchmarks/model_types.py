"""Give the models of `benchmarks.models` types by an error of their output, and build engines of what comes out.

    python -m benchmarks.model_types [NAME ...]

Each small random model gets types at an output tolerance of 1e-2, chosen on random inputs, for compute capabilities 8.9
and 12.0. The file is verified in ONNX Runtime and built with TensorRT-RTX, neither of which needs a GPU. Prints a line
a model, writes benchmarks/results/model_types.json and, where all were run, the table of docs/allocation.md.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.models import DIMS, MODELS, RESULTS, build, random_samples

PAGE = Path(__file__).parent.parent / "docs" / "allocation.md"
TITLE = "benchmarks.model_types"
TOLERANCE, CAPABILITIES, SAMPLES = 1e-2, ("8.9", "12.0"), 48  # of which half choose and half certify


def measure(name: str) -> dict[str, Any]:
    """Export a model and return its row of the table."""
    import onnx

    from adaattn.errors import AdaAttnError
    from adaattn.export import Allocation, Options, export
    from adaattn.export.engines.options import BuildOptions
    from adaattn.input_spec import Dimension, InputSpec

    entry = MODELS[name]
    specs = [InputSpec.parse(*given.split("=", 1)) for given in entry.inputs]
    sizes = {key: Dimension.of(key, x) for key, x in DIMS.items() if any(key in spec.shape for spec in specs)}
    options = Options(
        ("tensorrt-rtx",),
        output_tolerance=TOLERANCE,
        samples=random_samples(specs, sizes, SAMPLES),
        build=BuildOptions(compute_capabilities=CAPABILITIES),
    )
    start, row = time.perf_counter(), {"name": name}
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = export(build(entry), {x.name: x for x in specs}, f"{folder}/out", dims=sizes, options=options)
            nodes = onnx.load(made.directory / "model.onnx").graph.node
            types = Allocation.load(made.directory / "allocation.json")
    except AdaAttnError as error:
        return row | {"verdict": "failed", "reason": str(error), "seconds": time.perf_counter() - start}
    in_onnxruntime, engine = made.report["targets"]
    attention = Counter(site.format for site in types.sites if site.op == "scaled_dot_product_attention")
    return row | {
        "verdict": in_onnxruntime["verdict"],
        "built": engine["verdict"] != "failed",
        "reason": in_onnxruntime["reason"] or (engine["reason"] if engine["verdict"] == "failed" else None),
        "error": types.measured,
        "work": types.work(),
        "cost": types.cost / types.cost_fp32,
        "attention": dict(attention),
        "one_node": sum(node.op_type == "Attention" for node in nodes),
        "seconds": time.perf_counter() - start,
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    names = ("model", "error, 95 %", "work", "attention", "one node", "ONNX Runtime", "engine", "seconds")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        if "error" not in row:
            lines.append(f"| {row['name']} | {row['reason']} | | | | {row['verdict']} | – | {row['seconds']:.0f} |")
            continue
        work = ", ".join(f"{form} {100 * share:.0f} %" for form, share in row["work"].items() if share >= 0.005)
        attention = ", ".join(f"{count} {form}" for form, count in row["attention"].items()) or "–"
        cells = (row["name"], f"{row['error']:.1e}", work, attention, str(row["one_node"]), row["verdict"])
        lines.append(f"| {' | '.join(cells)} | {'built' if row['built'] else 'failed'} | {row['seconds']:.0f} |")
    return lines


def write_table(title: str, lines: Sequence[str]) -> None:
    """Write the table of a benchmark into docs/allocation.md, between the marks that bear its name."""
    start, end = f"<!-- table of {title} -->", f"<!-- end of {title} -->"
    before, _, rest = PAGE.read_text().partition(start)
    _, _, after = rest.partition(end)
    PAGE.write_text("\n".join([before + start, "", *lines, "", end + after]))


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    unknown = set(names) - set(MODELS)
    if unknown:
        raise click.UsageError(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(MODELS)}")
    wanted, rows = names or tuple(MODELS), []
    for place, name in enumerate(wanted, 1):
        row = measure(name)
        rows.append(row)
        built, seconds = "built" if row.get("built") else "not built", f"{row['seconds']:5.1f} s"
        said = f"{place:2}/{len(wanted)} {name:20} {row['verdict']:8} {built:10} {seconds}"
        click.echo(f"{said}  {row['reason'] or ''}")
    good = sum(row["verdict"] == "passed" and row["built"] for row in rows)
    click.echo(f"{good} of {len(rows)} passed and were built")
    if not names:
        content = {"tolerance": TOLERANCE, "capabilities": CAPABILITIES, "samples": SAMPLES, "models": rows}
        (RESULTS / "model_types.json").write_text(json.dumps(content, indent=1) + "\n")
        write_table(TITLE, table(rows))


if __name__ == "__main__":
    main()
