"""The benchmarks: what of them runs in seconds, without a GPU or others' tools, and what they write from results."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from click import Command
from click.testing import CliRunner

from benchmarks import attention, error_model, export, optimum
from benchmarks.attention import Result
from benchmarks.contenders import CONTENDERS, DENSE, INT8_FP8, STATISTICS, settings
from benchmarks.roofline import GPUS, roofline
from tests.support.paths import ROOT


def test_attention_runs_in_a_tiny_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(attention.main, ["--tiny"], catch_exceptions=False)
    assert done.exit_code == 0
    rows = {}
    for line in done.output.splitlines():
        names = [name for name in CONTENDERS if line.startswith(name)]
        if names:
            rows[max(names, key=len)] = line.split()
    assert rows.keys() == CONTENDERS.keys()
    assert float(rows[DENSE][-2]) < 1e-3  # relative error; fp16 inputs


@pytest.mark.filterwarnings("ignore")  # of torch.onnx itself, which is measured too
@pytest.mark.parametrize(("main", "said"), [(error_model.main, "predicted"), (export.main, "at most")])
def test_quick_runs(main: Command, said: str) -> None:
    done = CliRunner().invoke(main, ["--quick"], catch_exceptions=False)
    assert done.exit_code == 0
    assert said in done.output


def test_settings_begin_with_the_most_telling() -> None:
    every = settings()
    assert str(every[0]) == "bf16, head_dim 128, 16384 tokens"
    assert len(set(every)) == 4 * 3 * 3 * 2


def test_results_become_tables_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "attention.md"
    document.write_text(f"before\n{attention.MARKS[0]}\nold\n{attention.MARKS[1]}\nafter\n")
    monkeypatch.setattr(attention, "DOCUMENT", document)
    monkeypatch.setattr(attention, "PLOT", tmp_path / "attention.png")
    bf16 = settings()[0]
    times = {DENSE: 4.0, INT8_FP8: 2.0, STATISTICS: 0.05, "SDPA, flash": 3.9, "SDPA, cuDNN": 3.6}
    results = [Result(bf16, name, milliseconds=ms, tflops=1 / ms, rmse=5e-3) for name, ms in times.items()]
    results.append(Result(bf16, "flash-attn", note="not installed"))
    attention.render({"gpu": "A GPU", "results": [asdict(result) for result in results]})
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for row in (
        "| SDPA's best backend / dense plan, time | 0.9 | ≥ 0.95 |",
        "| SDPA flash / int8_fp8 plan, time | 1.95 | ≥ 1.5 |",
        "| RMSE of the int8_fp8 plan | 0.005 | ≤ 0.0091 |",
        "| SDPA flash / int8 plan, time | — | ≥ 1.2 |",
        "| statistics and plan / int8_fp8 plan, time | 0.025 | ≤ 0.05 |",
        "| flash-attn | not installed |",
    ):
        assert row in text
    assert (tmp_path / "attention.png").stat().st_size > 1000


def test_roofline_is_the_sum_over_the_plan() -> None:
    shape = (1, 16, 16, 16384, 16384, 128, False, "bf16")
    h100 = GPUS["h100"]
    pairs = 16 * 16384**2
    full = roofline(h100, *shape, {("bf16", 128): 1})
    assert full.tensor == pytest.approx(4 * 128 * pairs / 989e12)
    assert full.exponentials == pytest.approx(pairs / (132 * 16 * 1.83e9))
    assert full.packing == 0
    mixed = roofline(h100, *shape, {("bf16", 128): 0.5, ("int8_fp8", 64): 0.5})
    # Half of the heads multiply q·k and P·v at 989, half q·k at half the width, both at 1979.
    assert mixed.tensor == pytest.approx(full.tensor / 2 + (64 + 128) * pairs / 1979e12)
    assert mixed.packing == pytest.approx(0.5 * 16 * 16384 * 128 * (2 + 1 + 4 / 128 + 2 + 1) / 3.35e12)


def test_rows_are_over_optimums() -> None:
    theirs = dict.fromkeys(optimum.COLUMNS, 8.0)
    ours = {**theirs, "peak memory": 1234.0, "256 tokens": 6.0}
    lines = optimum.table(
        {"optimum": {**theirs, "error": 5e-7}, "dense": {**ours, "error": 6e-7}, "verified": {"export": 20.0}}
    )
    assert lines[2:] == [
        f"| optimum | 1.00 (8.0 s) | 1.00 (8.0 MiB) | 1.00 (8.0 MiB) | {'1.00 (8.0 ms) | ' * 3}5.0e-07 |",
        "| dense | 1.00 (8.0 s) | 154.25 (1234 MiB) | 1.00 (8.0 MiB) "
        "| 1.00 (8.0 ms) | 1.00 (8.0 ms) | 0.75 (6.0 ms) | 6.0e-07 |",
        f"| verified | 2.50 (20.0 s) | {'— | ' * 6}".rstrip(),
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_peak_memory_is_that_of_one_process(tmp_path: Path) -> None:
    """Not of a larger one before it, nor of the benchmark itself: it imports nothing large."""
    code = f"""
import sys
from pathlib import Path
from benchmarks.optimum import measure_export
for size in (300, 1):
    command = [sys.executable, "-c", f"x = b'1' * ({{size}} << 20)"]
    print(measure_export(command, Path({str(tmp_path / "log")!r}))["peak memory"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    large, small = map(float, done.stdout.split())
    assert small < 60
    assert large - small == pytest.approx(299, abs=20)


def test_an_export_that_fails_says_how(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exited with 1:\nno such model"):
        optimum.measure_export([sys.executable, "-c", "import sys; sys.exit('no such model')"], tmp_path / "log")


def test_optimum_stands_on_our_torch() -> None:
    lines = optimum.pins()
    assert lines[0].startswith("torch==")
    assert all("==" in line for line in lines)
