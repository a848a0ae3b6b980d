"""The benchmarks that want a GPU: they run without one in a small setting, and write what they should from results."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import attention
from benchmarks.attention import Result
from benchmarks.contenders import CONTENDERS, DENSE, INT8_FP8, STATISTICS, settings
from benchmarks.roofline import GPUS, roofline

ROOT = Path(__file__).parent.parent


def test_attention_runs_in_a_tiny_setting() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.attention", "--tiny"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {}
    for line in done.stdout.splitlines():
        names = [name for name in CONTENDERS if line.startswith(name)]
        if names:
            rows[max(names, key=len)] = line.split()
    assert rows.keys() == CONTENDERS.keys()
    assert float(rows[DENSE][-2]) < 1e-3  # relative error; fp16 inputs


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
