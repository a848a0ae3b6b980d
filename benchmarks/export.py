"""What an export costs, against torch.onnx.export of the same model with plain attention, in one run.

    python -m benchmarks.export [--quick]

Prints a table and writes benchmarks/results/export.json. Each measurement is a fresh process, and each ratio is of
medians of alternating runs: these machines are noisy.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

RESULTS = Path(__file__).parent / "results"


def _encoder(layers: int, width: int, heads: int, attention: str) -> Any:
    import torch

    import adaattn

    torch.manual_seed(0)
    return adaattn.Encoder(width, heads, layers=(attention,) * layers).eval()


def measure_import() -> dict[str, float]:
    """Peak memory of `import torch` alone."""
    import torch  # noqa: F401

    return {"peak": _peak()}


def measure_torch(layers: int, width: int, heads: int) -> dict[str, float]:
    """torch.onnx.export of the encoder with plain attention, to a file."""
    import torch

    model = _encoder(layers, width, heads, "dense")
    x = torch.randn(2, 16, width)
    batch, tokens = torch.export.Dim("B", min=1, max=8), torch.export.Dim("S", min=1, max=512)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        torch.onnx.export(
            model,
            (x,),
            f"{folder}/model.onnx",
            dynamo=True,
            external_data=False,
            dynamic_shapes=({0: batch, 1: tokens},),
            verbose=False,
        )
        return {"seconds": time.perf_counter() - start, "peak": _peak()}


def measure_ours(layers: int, width: int, heads: int, attention: str) -> dict[str, float]:
    """Our export to the same one target, without verification."""
    from adaattn.export import Options, export

    model = _encoder(layers, width, heads, attention)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        export(model, output_dir=f"{folder}/out", options=Options(targets=("onnx",), verify=False))
        return {"seconds": time.perf_counter() - start, "peak": _peak()}


def measure_runtime(tokens: int, width: int, heads: int, runs: int) -> dict[str, float]:
    """Return a dense module's ONNX file in ONNX Runtime, against torch's own export of scaled_dot_product_attention."""
    import onnxruntime
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    import adaattn
    from adaattn.export import Options, export

    ours = adaattn.DenseAttention(width, heads).eval()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projections = nn.ModuleList([ours.q_proj, ours.k_proj, ours.v_proj])
            self.out = ours.out_proj

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (
                p(x).unflatten(-1, (heads, -1)).transpose(1, 2)
                for p, x in zip(self.projections, (query, key, value), strict=True)
            )
            attended: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return attended

    x = torch.randn(1, tokens, width)
    batch, queries, keys = (torch.export.Dim(n, min=1, max=4096) for n in "BSK")
    shapes = ({0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch, 1: keys})
    example = (torch.randn(2, 5, width), torch.randn(2, 7, width), torch.randn(2, 7, width))
    with tempfile.TemporaryDirectory() as folder:
        export(ours, output_dir=f"{folder}/ours", options=Options(targets=("onnx",), verify=False))
        torch.onnx.export(
            Plain(),
            example,
            f"{folder}/plain.onnx",
            dynamo=True,
            opset_version=24,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        sessions = [
            onnxruntime.InferenceSession(f"{folder}/{name}", options, providers=["CPUExecutionProvider"])
            for name in ("ours/model.onnx", "plain.onnx")
        ]
        feed = {name: x.numpy() for name in ("query", "key", "value")}
        times: list[list[float]] = [[], []]
        for _ in range(runs):
            for session, spent in zip(sessions, times, strict=True):
                start = time.perf_counter()
                session.run(None, feed)
                spent.append(time.perf_counter() - start)
    return {"ours": statistics.median(times[0][3:]), "plain": statistics.median(times[1][3:])}


def help_over_import(rounds: int) -> float:
    """Time of `adaattn-export --help` over that of `import torch`, whole processes."""
    commands = [[sys.executable, "-m", "adaattn.export.cli.export", "--help"], [sys.executable, "-c", "import torch"]]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for command, spent in zip(commands, times, strict=True):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            spent.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def _peak() -> float:
    """Return the largest resident size so far, in bytes; getrusage would also count the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024.0


def _fresh(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Run a measurement in a process of its own."""
    code = f"import json\nfrom benchmarks.export import {function.__name__} as f\nprint(json.dumps(f(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Tiny sizes, in one process: shows that the script runs. Writes nothing.")
def main(quick: bool) -> None:
    measured = (lambda function, *arguments: function(*arguments)) if quick else _fresh
    rounds = 1 if quick else 5
    size = (1, 64, 4) if quick else (6, 384, 12)
    rows: list[tuple[str, float, float]] = []

    kinds = ("adaptive",) if quick else ("dense", "adaptive")
    samples: dict[str, list[float]] = {name: [] for name in ("torch", *kinds)}
    for _ in range(rounds):
        samples["torch"].append(measured(measure_torch, *size)["seconds"])
        for attention in kinds:
            samples[attention].append(measured(measure_ours, *size, attention)["seconds"])
    median = {name: statistics.median(values) for name, values in samples.items()}
    for attention in kinds:
        rows.append((f"export time, {attention} encoder / torch.onnx.export", median[attention] / median["torch"], 1.3))

    if not quick:
        large = (8, 1536, 16)
        weights = sum(x.numel() * 4 for x in _encoder(*large, "adaptive").parameters())
        base = measured(measure_import)["peak"]
        peak = measured(measure_ours, *large, "adaptive")["peak"]
        rows.append((f"peak memory over import torch / weights of {weights >> 20} MiB", (peak - base) / weights, 2.5))

    run = measured(measure_runtime, 16 if quick else 512, 64 if quick else 384, 4 if quick else 12, 5 if quick else 200)
    rows.append(("ONNX Runtime time, dense module / torch's own export", run["ours"] / run["plain"], 1.05))

    rows.append(("time of adaattn-export --help / import torch", help_over_import(rounds), 0.16 / 2.2))

    for name, ratio, limit in rows:
        click.echo(f"{ratio:6.2f}   at most {limit:4.2f}   {name}")
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        content = {
            "machine": f"{platform.machine()}, no GPU",
            "seconds": median,
            "ratios": [{"name": name, "ratio": ratio, "at_most": limit} for name, ratio, limit in rows],
        }
        (RESULTS / "export.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
