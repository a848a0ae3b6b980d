"""Build the library: compile the kernels, write down what the C++ needs of them, compile that."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import adaattn
from adaattn.errors import TargetError
from adaattn.ops.dispatch import OLDEST_ARCHITECTURE
from adaattn.ops.kernel_spec import KernelSpec
from adaattn.plugins import driver
from adaattn.plugins.native.program import Kind, Program, Symbol, axes, program, text_of
from adaattn.plugins.ptx import LEAST_PTX, Entry, entry
from adaattn.plugins.variants import VARIANTS, Variant

SOURCES = Path(__file__).parent
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# nvinfer1::DataType
TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.int8: 2,
    torch.int32: 3,
    torch.bool: 4,
    torch.bfloat16: 7,
    torch.int64: 8,
}


OLDEST_PTX = 84  # of CUDA 12.4: drivers since 550 take it
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Compiled:
    """A kernel as the library carries it."""

    entry: Entry
    cubin: bytes


def library(
    kinds: Sequence[Kind],
    architectures: Sequence[int],
    output: Path,
    tensorrt_include: Path,
    cuda_include: Path | None = None,
    on_kernel: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Build the plugins for some kinds of nodes and architectures.

    Args:
        kinds: of nodes, of a model or `common_kinds()`.
        architectures: 90 for sm_90.
        output: the library; it appears, or replaces an earlier one, when all is done.
        tensorrt_include: where NvInfer.h is, of TensorRT 10 or 11.
        cuda_include: where cuda_runtime_api.h is; by default what triton brings.
        on_kernel: called with the number of kernels compiled and of all.

    Raises:
        TargetError: headers or a compiler are missing, or the compiler complains.
    """
    headers = {"NvInfer.h": tensorrt_include, "cuda_runtime_api.h": cuda_include or cuda_headers()}
    for header, place in headers.items():
        if not (place / header).is_file():
            raise TargetError(f"{place} holds no {header}: {_MISSING[header]}")
    if shutil.which("g++") is None and shutil.which("c++") is None:
        raise TargetError("no C++ compiler: apt install g++ (and cmake, or do without)")
    if output.exists() and not output.is_file():
        raise TargetError(f"{output} cannot be written: it is a folder or a device; give a file")
    programs = [program(kind, arch) for arch in sorted(architectures) for kind in kinds]
    places = {
        _key(step.spec, each.capability): (each.kind, each.capability, number)
        for each in programs
        for number, step in enumerate(each.steps)
    }
    kernels = dict(zip(places, _compile(list(places.values()), on_kernel), strict=True))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adaattn-", dir=output.parent) as folder:
        made = _make(Path(folder), programs, kernels, headers["NvInfer.h"], headers["cuda_runtime_api.h"])
        os.replace(made, output)
    return output


_MISSING = {
    "NvInfer.h": "give --tensorrt-include the include folder of a TensorRT 10 or 11 (its tar file or the package "
    "libnvinfer-headers-dev has it; pip's wheels do not)",
    "cuda_runtime_api.h": "install triton, which brings it, or a CUDA toolkit, and give --cuda-include",
}


def cuda_headers() -> Path:
    """Those that triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def architectures(text: str) -> list[int]:
    """The architectures that a user names, "80,90"; for an empty text that of this machine's GPU.

    Raises:
        TargetError: there is no GPU to ask, or an architecture that the kernels are not written for.
    """
    if not text:
        found = driver.capability()
        if found is None:
            raise TargetError(f"no GPU to build for: give --arch, such as {','.join(map(str, ARCHITECTURES))}")
        return [found]
    try:
        named = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise TargetError(f"--arch is {text!r}; give numbers such as 80,90") from error
    if min(named) < OLDEST_ARCHITECTURE:
        raise TargetError(f"sm_{min(named)} is too old: the kernels need sm_{OLDEST_ARCHITECTURE} or newer")
    return named


def tensorrt_headers(given: Path | None) -> Path:
    """Where NvInfer.h is: as given, or where packages put it."""
    usual = (Path("/usr/include/x86_64-linux-gnu"), Path("/usr/include/aarch64-linux-gnu"), Path("/usr/include"))
    return given or next((folder for folder in usual if (folder / "NvInfer.h").is_file()), usual[0])


def cache(kinds: Sequence[Kind], architectures: Sequence[int]) -> Path:
    """Where a library is kept that was asked for without a place: one for each version and content."""
    content = repr((adaattn.__version__, sorted(map(repr, kinds)), sorted(architectures)))
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "adaattn" / f"libadaattn_plugins-{name}.so"


def _compile(wanted: Sequence[tuple[Kind, int, int]], on_kernel: Callable[[int, int], None]) -> list[Compiled]:
    """All of them, in order, on all processors."""
    on_kernel(0, len(wanted))
    with ProcessPoolExecutor() as pool:
        futures = [pool.submit(_compiled, *place) for place in wanted]
        try:
            for done, future in enumerate(as_completed(futures)):
                future.result()
                on_kernel(done + 1, len(wanted))
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compiled(kind: Kind, arch: int, step: int) -> Compiled:
    from triton.backends.nvidia import compiler

    spec = program(kind, arch).steps[step].spec
    kernel = entry(spec, arch, max(OLDEST_PTX, LEAST_PTX.get(arch, OLDEST_PTX)))
    target = next(line.split()[1] for line in kernel.ptx.splitlines() if line.startswith(".target"))
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(kernel.ptx)
        _run(compiler.get_ptxas(arch).path, f"-arch={target}", source, "-o", binary)
        return Compiled(kernel, binary.read_bytes())


def _make(folder: Path, programs: Sequence[Program], kernels: Mapping[Key, Compiled], trt: Path, cuda: Path) -> Path:
    (folder / "plugins.inc").write_text(_generated(programs, kernels))
    (folder / "images.inc").write_text(_declared(kernels))
    (folder / "kernels.S").write_text(_embedded(folder, kernels))
    made = folder / "libadaattn_plugins.so"
    if shutil.which("cmake"):
        definitions = {
            "GENERATED": folder,
            "TENSORRT_INCLUDE": trt,
            "CUDA_INCLUDE": cuda,
            "CMAKE_BUILD_TYPE": "Release",
        }
        options = [f"-D{name}={value}" for name, value in definitions.items()]
        _run("cmake", "-S", SOURCES, "-B", folder / "build", *options)
        _run("cmake", "--build", folder / "build")
        return folder / "build" / made.name
    _run(
        shutil.which("g++") or "c++",
        *("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic"),
        *("-isystem", trt, "-isystem", cuda, "-I", folder),
        *(SOURCES / "adaattn_plugins.cpp", folder / "kernels.S", "-ldl", "-o", made),
    )
    return made


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TargetError(f"{command[0]} failed:\n{(done.stderr or done.stdout).strip()[-4000:]}")


def _key(spec: KernelSpec, arch: int) -> Key:
    """What makes one kernel of two launches."""
    return (arch, spec.kernel.__name__, *(tuple(x.items()) for x in (spec.arguments, spec.constants, spec.known)))


def _images(key: Key, kernel: Compiled) -> dict[str, bytes]:
    images = {"cubin": kernel.cubin}
    if key[0] < 90:  # later architectures take its PTX; from sm_90 on kernels use features of their own one
        images["ptx"] = kernel.entry.ptx.encode() + b"\0"
    return images


def _embedded(folder: Path, kernels: Mapping[Key, Compiled]) -> str:
    """kernels.S: the code of all kernels."""
    lines = [".section .rodata"]
    for place, (key, kernel) in enumerate(kernels.items()):
        for kind, image in _images(key, kernel).items():
            file = folder / f"{place}.{kind}"
            file.write_bytes(image)
            label = f"adaattn_{kind}_{place}"
            lines += [f".global {label}", f".hidden {label}", ".balign 16", f"{label}:", f'.incbin "{file}"']
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


def _declared(kernels: Mapping[Key, Compiled]) -> str:
    """images.inc: the names of kernels.S."""
    return "".join(
        f'extern "C" unsigned char const adaattn_{kind}_{place}[];\n'
        for place, (key, kernel) in enumerate(kernels.items())
        for kind in _images(key, kernel)
    )


def _generated(programs: Sequence[Program], kernels: Mapping[Key, Compiled]) -> str:
    """plugins.inc: the ops, the kernels, and a function for each program."""
    rows, functions, table = [], [], []
    for place, (key, kernel) in enumerate(kernels.items()):
        made = kernel.entry
        ptx = f"adaattn_ptx_{place}" if "ptx" in _images(key, kernel) else "nullptr"
        rows.append(f'    {{"{made.name}", {made.threads}, {made.shared_bytes}, adaattn_cubin_{place}, {ptx}}},')
    places = {key: place for place, key in enumerate(kernels)}
    for place, each in enumerate(programs):
        used = [places[_key(step.spec, each.capability)] for step in each.steps]
        functions.append(_function(place, used, each))
        types = ", ".join(str(TYPES[dtype]) for dtype in each.kind.types)
        ones = sum(1 << axis for axis, one in enumerate(each.kind.ones) if one)
        kind = f"{{{{{types}}}}}, {each.kind.head_dim}, {each.kind.flag}, {ones}"
        steps = f"{len(used)}, {{{{{', '.join(map(str, used))}}}}}"
        table.append(f'    {{"{each.kind.op}", {each.capability}, {kind}, scratch_of_{place}, run_{place}, {steps}}},')
    text = ["constexpr Op OPS[] = {", *map(_op, VARIANTS.values()), "};", "", "Kernel const KERNELS[] = {", *rows, "};"]
    return "\n".join([*text, "", *functions, "Program const PROGRAMS[] = {", *table, "};", ""])


def _function(place: int, kernels: Sequence[int], each: Program) -> str:
    total = " + ".join(f"aligned({size})" for size in each.scratch_bytes) or "0"
    unused = "" if each.scratch_bytes else "[[maybe_unused]] "
    lines = [f"int64_t scratch_of_{place}({unused}Call const& call) {{ return {total}; }}", ""]
    lines.append(f"int32_t run_{place}(Call const& call) {{")
    offset = "call.workspace"
    for index, size in enumerate(each.scratch_bytes):
        lines.append(f"    [[maybe_unused]] char* const scratch_{index} = {offset};")
        offset = f"scratch_{index} + aligned({size})"
    for number, (step, kernel) in enumerate(zip(each.steps, kernels, strict=True)):
        lines.append("    {")
        for index, argument in enumerate(step.arguments):
            lines.append(f"        auto a{index} = {argument};")
        pointers = ", ".join(f"&a{index}" for index in range(len(step.arguments)))
        lines.append(f"        void* arguments[] = {{{pointers}}};")
        launch = f"call.launch({number}, KERNELS[{kernel}], {step.programs}, arguments)"
        lines.append(f"        if ({launch} != 0) return -1;")
        lines.append("    }")
    return "\n".join([*lines, "    return 0;", "}", ""])


def _op(variant: Variant) -> str:
    """A row of OPS: shapes of outputs are read off by running them on symbols."""
    names = list(variant.inputs)
    ranks = [axes(name) for name in names]
    shapes = {
        name: [Symbol(f"{{{place}, {axis}}}") for axis in range(count)]
        for place, (name, count) in enumerate(zip(names, ranks, strict=True))
    }
    picks = [[text_of(size) for size in shape] for shape in variant.output_shapes(shapes)]
    types = [sum(1 << TYPES[dtype] for dtype in takes) for takes in variant.inputs.values()]
    outputs = [-1 if dtype is None else TYPES[dtype] for dtype in variant.outputs.values()]
    same = 3 if names[0] == "query" else 1
    masks = [place for place, name in enumerate(names) if name.endswith("mask")]
    of_mask = {"key_mask": "{{{0, 0}, {0, 1}, {0, 2}}}", "attn_mask": "{{{0, 0}, {0, 1}, {0, 2}, {1, 2}}}"}
    sizes = of_mask[names[masks[0]]] if masks else "{}"
    attributes = ", ".join(f'{{"{n}", {str(kind is float).lower()}}}' for n, kind in variant.attributes.items())

    def listed(values: Sequence[object]) -> str:
        return "{{" + ", ".join(map(str, values)) + "}}"

    shown = "{{" + ", ".join("{{" + ", ".join(pick) + "}}" for pick in picks) + "}}"
    return (
        f'    {{"{variant.name}", {len(names)}, {listed(types)}, {listed(ranks)}, {len(outputs)}, {listed(outputs)}, '
        f"{shown}, {listed([len(pick) for pick in picks])}, {same}, {masks[0] if masks else -1}, {sizes}, "
        f"{{{{{attributes}}}}}, {len(variant.attributes)}}},"
    )
