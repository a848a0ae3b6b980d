"""What a tolerance does to a real sentence encoder: MiniLM-L6, calibrated on sentences of other topics.

    make demo-minilm

For each tolerance the embeddings of 240 sentences are compared with the original model's in float64: their error, their
cosine, and the rank correlation of the similarities of all pairs, which is what search uses them for; with the plans
that this took, of all precisions and of 16 bits alone, calibrated and not. Then the model is exported at one tolerance
and verified. Prints a table, writes benchmarks/results/minilm.json and docs/minilm.png.
"""

from __future__ import annotations

import json
import logging
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.sentences import calibration_text, judged_text

RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).parent.parent / "docs" / "minilm.png"
TOLERANCES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
EXPORTED = 1e-2
BATCH = 16
KINDS = {"adaattn": ("fp32", "bf16", "fp16", "int8", "int8_fp8"), "adaattn-16-bit": ("fp32", "bf16", "fp16")}


class Encoder:
    """The sentence encoder of a folder, by one implementation of attention."""

    def __init__(self, folder: Path, implementation: str) -> None:
        import transformers

        from adaattn.export.sources.huggingface import HuggingFaceModel
        from adaattn.export.sources.sentence_pooling import pooling_of

        self.folder = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model = transformers.AutoModel.from_pretrained(
            str(folder), local_files_only=True, attn_implementation=implementation
        )
        self.model = HuggingFaceModel(model, pooling_of(folder)).eval()

    def batches(self, sentences: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Tokens of some sentences at a time, padded to the longest."""
        for start in range(0, len(sentences), BATCH):
            yield dict(self.tokenizer(sentences[start : start + BATCH], padding=True, return_tensors="pt"))

    def embed(self, sentences: Sequence[str], double: bool = False) -> tuple[Any, list[Any]]:
        """Embeddings (N, D) of length 1, and the modes that saw each batch."""
        import copy

        import torch

        from adaattn.export.golden.plan_mode import PlanMode, run_eager

        model = copy.deepcopy(self.model).double() if double else self.model
        modes, found = [], []
        for batch in self.batches(sentences):
            mode = PlanMode(double=double, measure=not double)
            found += run_eager(model, batch, mode)
            modes.append(mode)
        return torch.cat(found).double().numpy(), modes


def agreement(got: Any, want: Any) -> dict[str, float]:
    """Relative error of embeddings, their cosines, and Spearman's correlation of the similarities of all pairs."""
    upper = np.triu_indices(len(want), 1)
    ranks = [np.argsort(np.argsort((x @ x.T)[upper])) for x in (got, want)]
    cosines = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    return {
        "error": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
        "cosine": float(cosines.mean()),
        "least_cosine": float(cosines.min()),
        "spearman": float(np.corrcoef(*ranks)[0, 1]),
    }


def plans(modes: Sequence[Any], tolerance: float) -> dict[str, Any]:
    """Return the plans of all heads and sentences, the work they save of fp16 on tensor cores, and their errors."""
    from adaattn.planning.precision import COST, PRECISIONS

    counts: Counter[str] = Counter()
    ranks, costs, errors = [], [], list[float]()
    for mode in modes:
        for (precision, rank), of, output in zip(mode.plans, mode.errors, mode.outputs, strict=True):
            width = output.shape[-1]
            errors += of.measured.flatten().tolist()
            for code, r in zip(precision.flatten().tolist(), rank.flatten().tolist(), strict=True):
                scores, values = COST[PRECISIONS[code]]
                counts[PRECISIONS[code]] += 1
                ranks.append(r / width)
                costs.append((scores * r / width + values) / sum(COST["fp16"]))
    total = sum(counts.values())
    return {
        "precision": {name: counts[name] / total for name in PRECISIONS},
        "mean_rank": float(np.mean(ranks)),
        "saved": 1 - float(np.mean(costs)),
        "worst_head": max(errors),
        "heads_over": sum(error > tolerance for error in errors) / total,
    }


def measure(
    folder: Path, tolerances: Sequence[float], sentences: int, kinds: Sequence[str] = tuple(KINDS)
) -> dict[str, Any]:
    """Compare the original with adaptive models of some KINDS, calibrated and not, at each tolerance."""
    import torch
    import transformers

    import adaattn
    from adaattn.export import Options, export
    from adaattn.export.engines import options as engine_options
    from adaattn.integrations.transformers import register, set_tolerance

    for name, precisions in KINDS.items():
        register(dense_below=0, precisions=precisions, name=name)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    text = judged_text()[:: max(1, len(judged_text()) // sentences)]
    original = Encoder(folder, "sdpa")
    want, _ = original.embed(text, double=True)
    rows = []
    for kind, calibrated in product(kinds, (False, True)):
        encoder = Encoder(folder, kind)
        if calibrated:
            adaattn.calibrate(encoder.model, encoder.batches(calibration_text()))
        if kind == "adaattn" and calibrated:
            shipping = encoder
        for tolerance in tolerances:
            set_tolerance(encoder.model, tolerance)
            got, modes = encoder.embed(text)
            row = {"kind": kind, "calibrated": calibrated, "tolerance": tolerance}
            rows.append({**row, **agreement(got, want), **plans(modes, tolerance)})
    set_tolerance(shipping.model, EXPORTED)
    targets = ("onnx", *(["tensorrt-rtx"] if engine_options.installed("tensorrt-rtx") else []))
    takes = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), "B,S:int64")
    words = shipping.tokenizer.vocab_size
    inputs = {name: f"{x}<{words if name == 'input_ids' else 2}" for name, x in takes.items()}
    with tempfile.TemporaryDirectory() as scratch:
        options = Options(
            targets, build=engine_options.BuildOptions(compute_capabilities=("8.9",) if len(targets) > 1 else None)
        )
        made = export(shipping.model, inputs, Path(scratch) / "out", dims={"S": "1:16:64"}, options=options)
        exported = {
            each["name"]: {
                "verdict": each["verdict"],
                "reason": each["reason"],
                "bytes": sum(x["bytes"] for x in each["artifacts"]),
                "error": max((row["error"] for row in each["outputs"] if row["error"] is not None), default=None),
            }
            for each in made.report["targets"]
        }
    return {
        "sentences": len(text),
        "dense_error": agreement(original.embed(text)[0], want)["error"],
        "rows": rows,
        "exported": exported,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def show(found: dict[str, Any]) -> None:
    """Return the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = "heads, calibrated, tolerance, error, cosine, Spearman, over, mean rank, saved, precisions"
    for column in columns.split(", "):
        table.add_column(column, justify="left" if column == "precisions" else "right")
    for row in found["rows"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["precision"].items() if share >= 5e-3)
        numbers = (f"{row['tolerance']:.0e}", f"{row['error']:.1e}", f"{row['cosine']:.6f}", f"{row['spearman']:.5f}")
        over = f"{row['heads_over']:.1%}, by {row['worst_head'] / row['tolerance']:.1f}"
        plan = (over if row["heads_over"] else "none", f"{row['mean_rank']:.0%}", f"{row['saved']:.0%}", shares)
        table.add_row(row["kind"].removeprefix("adaattn-"), "yes" if row["calibrated"] else "no", *numbers, *plan)
    console = Console(width=140)
    console.print(table)
    console.print(f"{found['sentences']} sentences; error of dense attention in float32: {found['dense_error']:.1e}")
    for name, target in found["exported"].items():
        said = target["reason"] or f"error {target['error']:.1e}"
        console.print(f"{name} at {EXPORTED:.0e}: {target['verdict']} ({said}), {target['bytes'] / 2**20:.0f} MiB")


def plot(found: dict[str, Any], path: Path) -> None:
    """Errors, plans and what they save, over the tolerance, of the model that may use all precisions."""
    from matplotlib.figure import Figure

    rows = [row for row in found["rows"] if row["kind"] == "adaattn"]
    figure = Figure(figsize=(11, 3.4), layout="constrained", dpi=150)
    errors, heads, saved = figure.subplots(1, 3)
    for calibrated, dash in ((False, "-"), (True, "--")):
        own = [row for row in rows if row["calibrated"] == calibrated]
        x, word = [row["tolerance"] for row in own], ", calibrated" if calibrated else ""
        errors.plot(x, [row["error"] for row in own], f"o{dash}", color="#2f6fb0", label=f"error{word}")
        errors.plot(x, [1 - row["spearman"] for row in own], f"s{dash}", color="#a8201a", label=f"1 − Spearman{word}")
        saved.plot(x, [row["mean_rank"] for row in own], f"o{dash}", color="#2f6fb0", label=f"mean rank{word}")
        saved.plot(x, [row["saved"] for row in own], f"s{dash}", color="#14663a", label=f"work saved{word}")
        if not calibrated:
            floor = [0.0] * len(own)
            for name, colour in COLOURS.items():
                shares = [row["precision"][name] for row in own]
                heads.bar([f"{t:.0e}" for t in x], shares, 0.7, floor, color=colour, label=name)
                floor = [a + b for a, b in zip(floor, shares, strict=True)]
    errors.plot(x, x, ":", color="#57606a", label="tolerance")
    errors.set(xscale="log", yscale="log", xlabel="tolerance", title="embeddings of sentences")
    heads.set(xlabel="tolerance", title="heads by precision", ylim=(0, 1.35))
    saved.set(xscale="log", xlabel="tolerance", title="mean rank, tensor-core work saved", ylim=(-0.5, 1.3))
    for axes in (heads, saved):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in (errors, heads, saved):
        axes.legend(
            fontsize=7, frameon=False, handlelength=2.6, ncols=3 if axes is heads else 1 if axes is errors else 2
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


COLOURS = {"fp32": "#d5dae0", "bf16": "#d3e3f6", "fp16": "#a3c5ea", "int8": "#2f6fb0", "int8_fp8": "#0f3a68"}


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--quick", is_flag=True, help="One tolerance and 48 sentences; writes nothing.")
def main(folder: Path, quick: bool) -> None:
    found = measure(folder, (EXPORTED,) if quick else TOLERANCES, 48 if quick else 240)
    show(found)
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "minilm.json").write_text(json.dumps(found, indent=1) + "\n")
        plot(found, PLOT)


if __name__ == "__main__":
    main()
