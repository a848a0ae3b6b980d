"""Compile plugin kernels for an architecture, `python assemble.py 90`, and have the assembler judge the outcome.

A process of its own: one that interprets kernels compiles none.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from triton.backends.nvidia import compiler

from adaattn.ops.signatures import OPS
from adaattn.plugins import ptx
from adaattn.plugins.op_variants import VARIANTS, Node

HEADS, TOKENS = (2, 6), (2, 6, 40, 16)
ATTENTION = dict.fromkeys(("query", "key", "value"), torch.float16) | {"attn_mask": torch.float32}
MOMENTS = {x.name: (*HEADS, 16) for x in OPS["plan"].inputs}
NODES = {
    "token_moments_masked": ({"x": torch.bfloat16}, {"x": TOKENS, "key_mask": (1, 1, 40)}, {"center": 1}),
    "plan": ({}, MOMENTS | {"ladder": (2, 17)}, {"scale": 0.25, "limit": 8e-3}),
    "adaptive_attention_biased": (ATTENTION, dict.fromkeys(ATTENTION, TOKENS), {"scale": 0.25, "is_causal": 1}),
}

capability = int(sys.argv[1])
newest = max(84, ptx.LEAST_PTX[capability])
found = {}
for name, (dtypes, shapes, attributes) in NODES.items():
    variant = VARIANTS[name]
    launch = variant.launch(Node(dtypes, shapes, attributes, capability, variant.tactics[-1]))
    spec = launch.spec
    if "ROWS" in spec.constants:  # all precisions would take a minute, and have the same parameters
        spec = spec.bound(ROWS=(3,))
    kernel = ptx.entry(spec, capability, newest)
    target = re.search(r"\.target (\w+)", kernel.ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(kernel.ptx)
        command = [compiler.get_ptxas(capability).path, "-v", f"-arch={target[1]}", file, "-o", f"{file}.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    registers = re.search(r"Used (\d+) registers", said.stderr)
    if registers is None:
        sys.exit(said.stderr)
    more = {"integers": len(launch.integers), "registers": int(registers[1]), "newest": newest}
    found[name] = dataclasses.asdict(kernel) | more
print(json.dumps(found))
