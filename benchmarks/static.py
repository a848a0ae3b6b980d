"""What the compiler makes of every kernel, for architectures that need not be here.

    python -m benchmarks.static [--arch 90] [--head-dim 128] [--write]

Cross-compiles every launch of eager mode: of `attend`, with the precisions that share a kernel, and of the kernels
around it. Reads registers, spills, shared memory and tensor-core instructions from the machine code, and how many
programs fit on a multiprocessor. Exits with 1 where a kernel spills, does not fit or misses its tensor cores. `--write`
keeps a line for each kernel in benchmarks/results/static.jsonl, and a summary in docs/kernels.md.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import Progress

from adaattn.ops.adaptive_attention.impl.triton import attend_spec, launches, pack_spec
from adaattn.ops.kernel_spec import KernelSpec
from adaattn.ops.plan.impl.triton import plan_spec
from adaattn.ops.token_moments.impl.triton import finish_spec, moments_spec, reduce_spec
from adaattn.planning.precision import PRECISIONS

RESULTS = Path(__file__).parent / "results" / "static.jsonl"
MARKS = ("<!-- what benchmarks.static wrote -->", "<!-- its end -->")
DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels.md"
TENSOR_CORES = re.compile(r"\b(HGMMA|IGMMA|QGMMA|HMMA|IMMA|QMMA|UTC\w*MMA)\b")
LABEL, JUMP = re.compile(r"^\s*(\.L_x_\d+):"), re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
LOCAL = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class Architecture:
    """Limits of a multiprocessor, from the CUDA C++ programming guide, and the instructions of its tensor cores."""

    shared_of_program: int
    shared: int
    warps: int
    wanted: dict[str, tuple[str, ...]]  # by the type multiplied: fp16, int8, fp8; any of them


_MMA = {"fp16": ("HMMA",), "int8": ("IMMA",), "fp8": ("QMMA",)}
_TCGEN = {"fp16": ("UTCHMMA", "HMMA"), "int8": ("UTCIMMA", "IMMA"), "fp8": ("UTCQMMA", "QMMA")}
ARCHITECTURES = {
    80: Architecture(163 << 10, 164 << 10, 64, _MMA),
    86: Architecture(99 << 10, 100 << 10, 48, _MMA),
    89: Architecture(99 << 10, 100 << 10, 48, _MMA),
    90: Architecture(227 << 10, 228 << 10, 64, {"fp16": ("HGMMA",), "int8": ("IGMMA",), "fp8": ("QGMMA",)}),
    100: Architecture(227 << 10, 228 << 10, 64, _TCGEN),
    120: Architecture(99 << 10, 100 << 10, 48, _MMA),
}
MULTIPLIED = {"fp32": (), "bf16": ("fp16",), "fp16": ("fp16",), "int8": ("int8", "fp16"), "int8_fp8": ("int8", "fp8")}


@dataclass(frozen=True)
class Case:
    """A specification and how the table calls it."""

    name: str
    capability: int
    head_dim: int
    inputs: str
    wants: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def spec(self) -> KernelSpec:
        dtype = getattr(torch, self.inputs)
        if self.name == "pack":
            return pack_spec(dtype, self.head_dim, self.capability)
        if self.name == "moments":
            return moments_spec(dtype, self.head_dim, True, True)
        if self.name == "reduce":
            return reduce_spec(dtype, self.head_dim, True, True)
        if self.name == "finish":
            return finish_spec(self.head_dim)
        if self.name == "plan":
            return plan_spec(self.head_dim)
        return attend_spec(dtype, self.head_dim, self.capability, **dict(self.options))


@dataclass(frozen=True)
class Measured:
    """What the machine code says."""

    registers: int
    spilled: int  # bytes of a thread
    spills_in_loops: int  # instructions
    shared: int
    programs: int
    warps: int
    instructions: dict[str, int]
    waits: bool  # Hopper's compiler, out of registers, makes each product wait for the one before


def cases(capability: int, head_dims: tuple[int, ...]) -> Iterator[Case]:
    """All specifications for an architecture."""
    variants: dict[str, dict[str, Any]] = {
        "": {},
        ", causal": {"causal": True},
        ", boolean mask": {"mask": torch.uint8},
        ", causal, additive mask of queries": {"causal": True, "mask": torch.float32, "mask_of_queries": True},
        ", not packed": {"packed": False},
    }
    for head_dim in head_dims:
        for inputs in ("float16", "bfloat16", "float32"):
            for variant, options in variants.items():
                if variant and (head_dim != 128 or (inputs != "float16" and variant != ", causal")):
                    continue
                of_queries = "mask_of_queries" in options
                for rows in launches(getattr(torch, inputs), head_dim, capability, of_queries):
                    name = "all precisions" if len(rows) > 1 else PRECISIONS[rows[0]]
                    wants = tuple(sorted({kind for row in rows for kind in MULTIPLIED[PRECISIONS[row]]}))
                    options = {**options, "rows": rows}
                    yield Case(f"{name}{variant}", capability, head_dim, inputs, wants, tuple(options.items()))
            yield Case("pack", capability, head_dim, inputs)
            yield Case("moments", capability, head_dim, inputs)
            yield Case("reduce", capability, head_dim, inputs)
        yield Case("finish", capability, head_dim, "float32")
        yield Case("plan", capability, head_dim, "float32")


def measure(case: Case) -> Measured:
    """Compiles a case and reads its machine code."""
    import triton

    spec = case.spec()
    compiled = spec.compile(case.capability)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise click.ClickException(f"cuobjdump says nothing of registers: {usage}")
    registers, spilled = (int(x) for x in found.groups())
    shared = int(compiled.metadata.shared)
    limits = ARCHITECTURES[case.capability]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * spec.warps)  # given out to warps in units of 256
    by_shared = limits.shared // (shared + 1024)  # the driver takes 1 KiB of each
    programs = min(by_registers, by_shared, limits.warps // spec.warps)
    instructions = dict(Counter(TENSOR_CORES.findall(code)))
    starts = code.count("WARPGROUP.ARRIVE")
    waits = "HGMMA" in instructions and starts > 0.9 * sum(instructions.values())
    in_loops = _local_accesses_in_loops(code.splitlines())
    return Measured(registers, spilled, in_loops, shared, programs, spec.warps, instructions, waits)


def _local_accesses_in_loops(code: list[str]) -> int:
    """How often loops that multiply read or write what was spilled; a loop is all that a backward jump encloses."""
    labels = {found[1]: i for i, line in enumerate(code) if (found := LABEL.match(line))}
    jumps = ((labels.get(found[1], i), i) for i, line in enumerate(code) if (found := JUMP.search(line)))
    within: set[int] = set()
    for first, last in jumps:
        if first < last and any(TENSOR_CORES.search(line) for line in code[first:last]):
            within.update(i for i in range(first, last) if LOCAL.search(code[i]))
    return len(within)


def complaints(case: Case, got: Measured) -> list[str]:
    """Return a line for each target that is missed."""
    limits = ARCHITECTURES[case.capability]
    said = []
    if got.spilled:
        said.append(f"spills {got.spilled} bytes")
    if got.spills_in_loops:
        said.append(f"goes for what it spilled {got.spills_in_loops} times within loops")
    if got.shared > limits.shared_of_program:
        said.append(f"takes {got.shared} bytes of shared memory of {limits.shared_of_program}")
    if got.waits and "not packed" not in case.name:  # what is rounded on the way comes from registers
        said.append("runs its products one after the other")
    for kind in case.wants:
        if not any(name in got.instructions for name in limits.wanted[kind]):
            said.append(f"multiplies {kind} without {' or '.join(limits.wanted[kind])}")
    return said


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def _tables(rows: dict[Case, Measured]) -> str:
    """Return a table for each head_dim: kernels down, architectures across."""
    arches = sorted({case.capability for case in rows})
    lines: list[str] = []
    for head_dim in sorted({case.head_dim for case in rows}):
        lines += ["", f"head_dim {head_dim}:", ""]
        lines.append("| inputs | kernel | " + " | ".join(f"sm_{arch}" for arch in arches) + " |")
        lines.append("|" + "---|" * (len(arches) + 2))
        named = {(case.inputs, case.name): case for case in rows if case.head_dim == head_dim}
        by_place = {
            (case.inputs, case.name, case.capability): got for case, got in rows.items() if case.head_dim == head_dim
        }
        for inputs, name in named:
            cells = [_cell(by_place.get((inputs, name, arch))) for arch in arches]
            lines.append(f"| {inputs} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(got: Measured | None) -> str:
    if got is None:
        return "—"
    instructions = " ".join(sorted(got.instructions))
    spilled = f", **{got.spilled} B spilled**" if got.spilled else ""
    return f"{got.registers}{spilled}, {got.shared / 1024:.0f} KiB, {got.programs}× {instructions}".strip()


def _summary(rows: Mapping[Case, Measured]) -> str:
    """Return a table with a line for each architecture and head_dim."""
    lines = ["", "| architecture | head_dim | kernels | most registers | spilled | most shared memory | instructions |"]
    lines.append("|" + "---|" * 7)
    places = sorted({(case.capability, case.head_dim) for case in rows})
    for place in places:
        found = [got for case, got in rows.items() if (case.capability, case.head_dim) == place]
        registers, spilled, shared = (
            max(getattr(x, name) for x in found) for name in ("registers", "spilled", "shared")
        )
        names = " ".join(sorted({name for got in found for name in got.instructions}))
        cells = (f"sm_{place[0]}", place[1], len(found), registers, f"{spilled} B", f"{shared / 1024:.0f} KiB", names)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _write(rows: Mapping[Case, Measured]) -> None:
    about = {"triton": importlib.metadata.version("triton")}
    kept = [
        {**asdict(case), "options": {name: str(value) for name, value in case.options}, **asdict(got)}
        for case, got in rows.items()
    ]
    RESULTS.write_text("".join(f"{json.dumps(line)}\n" for line in (about, *kept)))
    text = DOCUMENT.read_text()
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    DOCUMENT.write_text(before + MARKS[0] + "\n" + _summary(rows) + "\n" + MARKS[1] + after)


@click.command(help=__doc__)
@click.option(
    "--arch",
    "arches",
    type=click.Choice([str(x) for x in ARCHITECTURES]),
    multiple=True,
    help="Repeatable; default all.",
)
@click.option("--head-dim", "head_dims", type=int, multiple=True, default=(64, 128, 256), help="Repeatable.")
@click.option("--only", default="", help="Kernels whose name holds this.")
@click.option("--write", is_flag=True, help="Keep what a run over everything found.")
def main(arches: tuple[str, ...], head_dims: tuple[int, ...], only: str, write: bool) -> None:
    every = [case for arch in (arches or ARCHITECTURES) for case in cases(int(arch), head_dims) if only in case.name]
    found: dict[Case, Measured] = {}
    with Progress() as progress, ProcessPoolExecutor() as pool:
        task = progress.add_task("compiling", total=len(every))
        futures = {pool.submit(measure, case): case for case in every}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            progress.advance(task)
    found = {case: found[case] for case in every}
    click.echo(_tables(found))
    if write:
        _write(found)
    missed = [
        f"sm_{case.capability}, head_dim {case.head_dim}, {case.inputs}, {case.name}: {said}"
        for case, got in found.items()
        for said in complaints(case, got)
    ]
    click.echo("\n".join(missed) or "no spills, all fit, all on tensor cores")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
