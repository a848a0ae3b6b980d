"""The compiler's verdict on some of the kernels, for GPUs that need not be here; `benchmarks.static` has it on all."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

# A process of its own: this one may interpret kernels, and what is interpreted does not compile.
COMPILE = """
import ast, json, sys
from benchmarks.static import Case, complaints, measure
found = []
for case in (Case(*case) for case in ast.literal_eval(sys.argv[1])):
    got, metadata = measure(case), case.spec().compile(case.capability).metadata
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    found.append([case.name, complaints(case, got), got.instructions, scratch])
print(json.dumps(found))
"""
# What Case takes: name, capability, head_dim, inputs, what must reach the tensor cores, options of the specification.
ATTENTION = [
    ("int8_fp8", 90, 64, "float16", ("int8", "fp8"), (("rows", (4,)),)),
    ("int8", 80, 64, "bfloat16", ("int8", "fp16"), (("rows", (3,)), ("causal", True))),
    ("fp32", 89, 64, "float32", (), (("rows", (0,)),)),
]
OTHERS = [
    ("pack", 80, 80, "bfloat16"),
    ("pack", 120, 64, "float32"),
    ("moments", 100, 64, "float16"),
    ("reduce", 80, 64, "bfloat16"),
    ("finish", 86, 96, "float32"),
    ("plan", 90, 80, "float32"),
]


def _run(code: str, cases: list[tuple[object, ...]]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, repr(cases)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("cases", [ATTENTION, OTHERS], ids=["attention", "others"])
def test_kernels_fit_and_reach_the_tensor_cores(cases: list[tuple[object, ...]]) -> None:
    for name, complaints, instructions, scratch in json.loads(_run(COMPILE, cases)):
        assert complaints == [], name
        assert bool(instructions) == (cases is ATTENTION), name
        assert scratch == 0, name  # a kernel that a plugin carries may ask for none


def test_small_tiles_need_no_more_shared_memory_than_every_launcher_grants() -> None:
    cases: list[tuple[object, ...]] = [
        ("fp32", 80, head_dim, "float32", (), (("rows", (0,)), ("small", True), ("packed", False)))
        for head_dim in (128, 256)
    ]
    code = (
        COMPILE.split("    got, metadata")[0]
        + "    found.append(case.spec().compile(80).metadata.shared)\nprint(found)"
    )
    assert all(shared <= 48 << 10 for shared in json.loads(_run(code, cases)))
