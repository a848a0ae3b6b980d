"""Write the C++ and assembly that carry the compiled kernels into the library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaattn.ops.kernel_spec import KernelSpec
from adaattn.ops.signatures import Argument
from adaattn.plugins.native.launch_program import Program
from adaattn.plugins.op_variants import VARIANTS, Variant
from adaattn.plugins.ptx import Entry

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
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Compiled:
    """A kernel as the library carries it."""

    entry: Entry
    cubin: bytes


def kernel_key(spec: KernelSpec, arch: int) -> Key:
    """Return what two launches must share to be one kernel."""
    return (arch, spec.kernel.__name__, *(tuple(x.items()) for x in (spec.arguments, spec.constants, spec.known)))


def _images(key: Key, kernel: Compiled) -> dict[str, bytes]:
    images = {"cubin": kernel.cubin}
    if key[0] < 90:  # later architectures take its PTX; from sm_90 on kernels use features of their own one
        images["ptx"] = kernel.entry.ptx.encode() + b"\0"
    return images


def kernels_assembly(folder: Path, kernels: Mapping[Key, Compiled]) -> str:
    """Return kernels.S: the code of all kernels."""
    lines = [".section .rodata"]
    for place, (key, kernel) in enumerate(kernels.items()):
        for kind, image in _images(key, kernel).items():
            file = folder / f"{place}.{kind}"
            file.write_bytes(image)
            label = f"adaattn_{kind}_{place}"
            lines += [f".global {label}", f".hidden {label}", ".balign 16", f"{label}:", f'.incbin "{file}"']
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


def image_declarations(kernels: Mapping[Key, Compiled]) -> str:
    """Return images.inc: the names of kernels.S."""
    return "".join(
        f'extern "C" unsigned char const adaattn_{kind}_{place}[];\n'
        for place, (key, kernel) in enumerate(kernels.items())
        for kind in _images(key, kernel)
    )


def plugin_tables(programs: Sequence[Program], kernels: Mapping[Key, Compiled]) -> str:
    """Return plugins.inc: the ops, the kernels, and a function for each program."""
    rows, functions, table = [], [], []
    for place, (key, kernel) in enumerate(kernels.items()):
        made = kernel.entry
        ptx = f"adaattn_ptx_{place}" if "ptx" in _images(key, kernel) else "nullptr"
        rows.append(f'    {{"{made.name}", {made.threads}, {made.shared_bytes}, adaattn_cubin_{place}, {ptx}}},')
    places = {key: place for place, key in enumerate(kernels)}
    for place, each in enumerate(programs):
        used = [places[kernel_key(step.spec, each.capability)] for step in each.steps]
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
    """Return a row of OPS. Sizes of outputs and of a mask are places in inputs: `{input, dimension}`."""
    signature, sources = variant.signature, variant.signature.sources()

    def listed(values: Iterable[object]) -> str:
        return "{{" + ", ".join(map(str, values)) + "}}"

    def sizes(argument: Argument) -> str:
        return listed(f"{{{place}, {dim}}}" for place, dim in (sources[axis] for axis in argument.axes))

    types = [sum(1 << TYPES[dtype] for dtype in takes) for takes in variant.inputs.values()]
    outputs = [-1 if dtype is None else TYPES[dtype] for dtype in variant.outputs.values()]
    first = signature.inputs[0].name
    attributes = ", ".join(f'{{"{n}", {str(kind is float).lower()}}}' for n, kind in variant.attributes.items())
    fields = (
        f'"{signature.name}"',
        *(len(types), listed(types), listed(len(x.axes) for x in signature.inputs)),
        *(len(outputs), listed(outputs), listed(sizes(x) for x in signature.outputs)),
        listed(len(x.axes) for x in signature.outputs),
        sum(first in (x.name, x.like) for x in signature.inputs),
        *((-1, "{}") if signature.mask is None else (signature.place(signature.mask.name), sizes(signature.mask))),
        *(f"{{{{{attributes}}}}}", len(variant.attributes)),
    )
    return f"    {{{', '.join(map(str, fields))}}},"
