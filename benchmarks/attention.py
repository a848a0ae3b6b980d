"""Time attention by AdaAttn's plans and by everything else that is installed, in one run on one GPU.

    python -m benchmarks.attention [--minutes 5] [--render FILE] [--tiny]

Times are medians over calls that take turns on several sets of inputs; AdaAttn's include moments, plan,
packing and attention. Inputs are N(0,1) + N(0,100)·Bernoulli(0.001), on which FlashAttention-3
reports its fp8 error. Errors are against float64, over 128 queries of each head. TFLOP/s count what dense attention
would do. Settings are measured in the order of their importance until the minutes are over, and kept one by one in
benchmarks/results/attention-GPU.json; from it come docs/attention.md and its plot (`--render`, on any machine).
`--tiny` shows that the script runs, without a GPU in Triton's interpreter (whose bf16 and e4m3 are rough), and writes
nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.contenders import (
    CONTENDERS,
    DENSE,
    DTYPES,
    HALF_RANK,
    INT8,
    INT8_FP8,
    PEERS,
    STATISTICS,
    TOKENS,
    WITHIN,
    Run,
    Setting,
    Unavailable,
    inputs,
    settings,
)
from benchmarks.roofline import Gpu, attended_pairs, gpu_named, roofline

ROOT = Path(__file__).parent.parent
RESULTS, DOCUMENT, PLOT = ROOT / "benchmarks/results", ROOT / "docs/attention.md", ROOT / "docs/attention.png"
MARKS = ("<!-- what benchmarks.attention wrote -->", "<!-- its end -->")
CHECKED = 128  # queries of a head whose error is measured
ROUNDS = 3


@dataclass
class Result:
    """One contender in one setting; None for what was not measured, with the reason in `note`."""

    setting: Setting
    contender: str
    milliseconds: float | None = None
    tflops: float | None = None
    of_roofline: float | None = None
    error: float | None = None  # relative, root mean square
    worst_head: float | None = None
    rmse: float | None = None
    mebibytes: float | None = None  # allocated by the call, the output included
    plan: dict[str, float] = field(default_factory=dict)
    note: str = ""


def exact(setting: Setting, qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return some queries, and softmax(q kᵀ/√D) v of them in float64: (B, H, CHECKED, D)."""
    q, k, v = qkv
    rows = torch.linspace(0, setting.tokens - 1, min(CHECKED, setting.tokens), device=q.device).long()
    want = torch.empty(*q.shape[:2], len(rows), setting.head_dim, dtype=torch.float64, device=q.device)
    shut = torch.arange(setting.tokens, device=q.device) > rows.unsqueeze(1)
    for b in range(setting.batch):  # a head at a time: scores in float64 are large
        for h in range(setting.heads):
            scores = q[b, h, rows].double() @ k[b, h].double().T * setting.scale
            if setting.causal:
                scores = scores.masked_fill(shut, -torch.inf)
            want[b, h] = scores.softmax(-1) @ v[b, h].double()
    return rows, want


def check(result: Result, output: Tensor, rows: Tensor, want: Tensor) -> None:
    difference = (output[:, :, rows].double() - want).square().mean((2, 3))
    size = want.square().mean((2, 3))
    result.error = float((difference.mean() / size.mean()).sqrt())
    result.worst_head = float((difference / size).sqrt().max())
    result.rmse = float(difference.mean().sqrt())


def measure(setting: Setting, gpu: Gpu | None) -> list[Result]:
    """All contenders in one setting, taking turns."""
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    first = inputs(setting)
    size = 3 * first[0].nbytes
    sets = [first] + [inputs(setting) for _ in range(max(1, min(7, (256 << 20) // size)))]
    rows, want = exact(setting, first)
    flop = 4 * setting.batch * setting.heads * setting.head_dim
    flop *= attended_pairs(setting.tokens, setting.tokens, setting.causal)

    results, running = [], []
    for name, make in CONTENDERS.items():
        result = Result(setting, name)
        results.append(result)
        try:
            run, plan = make(setting)
            before = _allocated()
            output = run(*first)
            result.mebibytes = (_peak() - before) / 2**20 if on_gpu else None
        except Unavailable as error:
            result.note = str(error)
            continue
        except torch.OutOfMemoryError:
            result.note = "out of memory"
            continue
        except RuntimeError:
            if not name.startswith("SDPA"):
                raise
            result.note = "does not take this"  # SDPA's own message names every reason but the one
            continue
        if name != STATISTICS:
            check(result, output, rows, want)
        result.plan = {f"{precision} at rank {rank}": share for (precision, rank), share in plan.items()}
        running.append((result, run, plan, _repetitions(run, sets)))
        del output
    times: dict[str, list[float]] = {result.contender: [] for result, *_ in running}
    for _ in range(ROUNDS):
        for result, run, _, repetitions in running:
            times[result.contender] += _times(run, sets, repetitions)
    for result, _, plan, _ in running:
        seconds = statistics.median(times[result.contender])
        result.milliseconds = 1e3 * seconds
        if not plan:
            continue
        result.tflops = flop / seconds / 1e12
        if gpu is not None:
            shape = (setting.batch, setting.heads, setting.heads, setting.tokens, setting.tokens, setting.head_dim)
            least = roofline(gpu, *shape, setting.causal, setting.dtype, plan)
            result.of_roofline = (least.seconds if result.contender.startswith("ours") else least.attend) / seconds
    return results


def _allocated() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _repetitions(run: Run, sets: list[tuple[Tensor, Tensor, Tensor]]) -> int:
    """Return the calls of a round, which take a twentieth of a second."""
    if not torch.cuda.is_available():
        return 1
    return max(3, min(100, int(0.05 / statistics.median(_times(run, sets, 3)))))


def _times(run: Run, sets: list[tuple[Tensor, Tensor, Tensor]], repetitions: int) -> list[float]:
    """Seconds of each call, after one that does not count."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run(*sets[0])
        return [time.perf_counter() - start]
    run(*sets[-1])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    events[0].record()
    for i in range(repetitions):
        run(*sets[i % len(sets)])
        events[i + 1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def compile_ahead(setting: Setting) -> None:
    """In a process of its own: everything once, so that the compilers' caches have it."""
    torch.manual_seed(0)
    qkv = inputs(setting)
    for make in CONTENDERS.values():
        try:
            make(setting)[0](*qkv)
        except (Unavailable, RuntimeError):  # said where it is measured
            continue


def aims(results: list[Result]) -> list[tuple[str, float | None, str]]:
    """Return the aims on an H100, head_dim 128, 16k tokens, not causal: ratio, measured value, limit."""

    def of(contender: str, dtype: str, what: str = "milliseconds") -> float | None:
        found = [r for r in results if r.contender == contender and r.setting == _headline(dtype)]
        return getattr(found[0], what) if found else None

    def best_sdpa(dtype: str) -> float | None:
        return min((t for peer in PEERS if (t := of(f"SDPA, {peer}", dtype))), default=None)

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    flash, dense, int8_fp8 = of("SDPA, flash", "bf16"), of(DENSE, "bf16"), of(INT8_FP8, "bf16")
    adaptive = of(WITHIN.format(5e-3), "fp32")
    return [
        ("SDPA's best backend / dense plan, time", ratio(best_sdpa("bf16"), dense), "≥ 0.95"),
        ("SDPA flash / int8_fp8 plan, time", ratio(flash, int8_fp8), "≥ 1.5"),
        ("RMSE of the int8_fp8 plan", of(INT8_FP8, "bf16", "rmse"), "≤ 0.0091"),
        ("SDPA flash / int8 plan, time", ratio(flash, of(INT8, "bf16")), "≥ 1.2"),
        ("dense plan / the same at rank D/2, time", ratio(dense, of(HALF_RANK, "bf16")), "≥ 1.3"),
        ("fp32: SDPA's best backend / plan for 5e-3, time", ratio(best_sdpa("fp32"), adaptive), "≥ 4"),
        ("statistics and plan / int8_fp8 plan, time", ratio(of(STATISTICS, "bf16"), int8_fp8), "≤ 0.05"),
    ]


def _headline(dtype: str) -> Setting:
    return next(s for s in settings() if s.dtype == dtype)


def document(gpu_name: str, results: list[Result]) -> str:
    """Return the tables of docs/attention.md."""
    lines = [f"On one {gpu_name}. What was aimed at:", "", "| | measured | aim |", "|---|---|---|"]
    for name, measured, limit in aims(results):
        lines.append(f"| {name} | {'—' if measured is None else f'{measured:.3g}'} | {limit} |")
    for dtype in DTYPES:
        lines += ["", f"{_headline(dtype)}:", ""]
        lines += ["| | ms | TFLOP/s | of the roofline | error | worst head | MiB |", "|---|---|---|---|---|---|---|"]
        for r in results:
            if r.setting == _headline(dtype):
                lines.append(f"| {r.contender} | {_cells(r)} |")
    return "\n".join(lines) + "\n"


def _cells(r: Result) -> str:
    if r.milliseconds is None:
        return " | ".join([r.note, *[""] * 5])
    cells = [f"{r.milliseconds:.3f}"]
    for value, form in ((r.tflops, ".0f"), (r.of_roofline, ".0%"), (r.error, ".1e"), (r.worst_head, ".1e")):
        cells.append("" if value is None else format(value, form))
    return " | ".join([*cells, "" if r.mebibytes is None else f"{r.mebibytes:.0f}"])


def plot(results: list[Result]) -> None:
    """Speed over length for each head_dim, bf16 inputs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 7), sharex=True, layout="constrained")
    colors, lines = pyplot.get_cmap("tab20").colors, {}
    for row, causal in zip(axes, (False, True), strict=True):
        for axis, head_dim in zip(row, (64, 128, 256), strict=True):
            for color, name in zip(colors, CONTENDERS, strict=False):
                points = sorted(
                    (r.setting.tokens, r.tflops)
                    for r in results
                    if r.contender == name
                    and (r.setting.dtype, r.setting.head_dim, r.setting.causal) == ("bf16", head_dim, causal)
                    and r.tflops is not None
                )
                if points:
                    style = "o-" if name.startswith("ours") else "o--"
                    (lines[name],) = axis.plot(*zip(*points, strict=True), style, markersize=3, color=color)
            axis.set(xscale="log", title=f"head_dim {head_dim}{', causal' if causal else ''}", ylim=(0, None))
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("tokens")
    axes[0, 0].set_ylabel("TFLOP/s, as of dense attention")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(PLOT, dpi=90, metadata={"Software": None})


def render(kept: dict[str, Any]) -> None:
    """docs/attention.md and its plot, from what a run wrote."""
    results = [Result(**{**result, "setting": Setting(**result["setting"])}) for result in kept["results"]]
    text = DOCUMENT.read_text()
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n{document(kept['gpu'], results)}\n{MARKS[1]}{after}")
    plot(results)


def _keep(path: Path, results: list[Result], reached: int) -> dict[str, Any]:
    packages = ("torch", "triton", "flash-attn", "sageattention")
    installed = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions() if dist.name}
    kept = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"cuda": torch.version.cuda, **{name: installed[name] for name in packages if name in installed}},
        "results": [asdict(result) for result in results],
        "not reached": [str(setting) for setting in settings()[reached:]],
    }
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(kept, indent=1) + "\n")
    part.replace(path)
    return kept


def _show(results: list[Result]) -> None:
    table = Table(title=str(results[0].setting), title_justify="left", box=None, pad_edge=False)
    for column in ("", "ms", "TFLOP/s", "of roofline", "error", "worst head", "MiB"):
        table.add_column(column, justify="right" if column else "left")
    for result in results:
        table.add_row(result.contender, *_cells(result).split(" | "))
    Console().print(table)


@click.command(help=__doc__)
@click.option("--minutes", default=5.0, show_default=True, help="No setting is begun after this.")
@click.option("--render", "file", type=click.Path(exists=True, dir_okay=False), help="Only write docs from results.")
@click.option("--tiny", is_flag=True, help="One small setting: shows that the script runs. Writes nothing.")
def main(minutes: float, file: str | None, tiny: bool) -> None:
    if file is not None:
        render(json.loads(Path(file).read_text()))
        return
    if tiny:
        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined
        _show(measure(Setting(head_dim=16, tokens=20, causal=True, dtype="fp16", heads=2, batch=1), None))
        return
    if not torch.cuda.is_available():
        raise click.ClickException("torch sees no GPU on this machine; --tiny shows that the script runs")
    name = torch.cuda.get_device_name()
    path = RESULTS / f"attention-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
    end = time.monotonic() + 60 * minutes
    console = Console(stderr=True)
    compiled = [setting for setting in settings() if setting.tokens == TOKENS]
    workers = max(1, min(len(compiled), (os.cpu_count() or 1) - 1, torch.cuda.mem_get_info()[0] >> 33))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(track(pool.map(compile_ahead, compiled), "compiling", total=len(compiled), console=console))
    results: list[Result] = []
    kept: dict[str, Any] = {}
    for reached, setting in enumerate(track(settings(), "measuring", console=console), start=1):
        if time.monotonic() > end:
            console.print(f"{minutes:g} minutes are over: {len(settings()) - reached + 1} settings are left out")
            break
        results += measure(setting, gpu_named(name))
        kept = _keep(path, results, reached)
        _show(results[-len(CONTENDERS) :])
    if kept:
        render(kept)
        click.echo(f"{path}, {DOCUMENT}")


if __name__ == "__main__":
    main()
