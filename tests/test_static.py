"""The compiler's verdict on some of the kernels, for GPUs that need not be here; `benchmarks.static` has it on all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A process of its own: this one may interpret kernels, and what is interpreted does not compile.
COMPILE = """
import ast, json, sys
from benchmarks.static import Case, complaints, measure
case = Case(*ast.literal_eval(sys.argv[1]))
got, metadata = measure(case), case.spec().compile(case.capability).metadata
scratch = metadata.global_scratch_size + metadata.profile_scratch_size
print(json.dumps([complaints(case, got), got.instructions, scratch]))
"""
# What Case takes: name, capability, head_dim, inputs, what must reach the tensor cores, options of the specification.
CASES = [
    ("int8_fp8", 90, 64, "float16", ("int8", "fp8"), (("rows", (4,)),)),
    ("int8", 80, 64, "bfloat16", ("int8", "fp16"), (("rows", (3,)), ("causal", True))),
    ("fp32", 89, 64, "float32", (), (("rows", (0,)),)),
    ("pack", 80, 80, "bfloat16"),
    ("pack", 120, 64, "float32"),
    ("moments", 100, 64, "float16"),
    ("reduce", 80, 64, "bfloat16"),
    ("finish", 86, 96, "float32"),
    ("plan", 90, 80, "float32"),
]


def _run(code: str, case: tuple[object, ...]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, repr(case)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-sm_{case[1]}")
def test_kernels_fit_and_reach_the_tensor_cores(case: tuple[object, ...]) -> None:
    complaints, instructions, scratch = json.loads(_run(COMPILE, case))
    assert complaints == []
    assert bool(instructions) == (case[0] not in ("pack", "moments", "reduce", "finish", "plan"))
    assert scratch == 0  # a kernel that a plugin carries may ask for none


@pytest.mark.parametrize("head_dim", [128, 256])
def test_small_tiles_need_no_more_shared_memory_than_every_launcher_grants(head_dim: int) -> None:
    case = ("fp32", 80, head_dim, "float32", (), (("rows", (0,)), ("small", True), ("packed", False)))
    code = COMPILE.split("got, metadata")[0] + "print(case.spec().compile(80).metadata.shared)"
    assert int(_run(code, case)) <= 48 << 10
