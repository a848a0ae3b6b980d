"""Compile a kernel to what TensorRT launches: PTX, entry point, threads and shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from adaattn.errors import TargetError
from adaattn.ops.kernel_spec import KernelSpec

# PTX that knows an architecture at all, by CUDA's release notes.
LEAST_PTX = {80: 70, 86: 71, 87: 74, 89: 78, 90: 80, 100: 86, 103: 88, 120: 87, 121: 88}
HIDDEN = ("global scratch", "profile scratch")  # pointers that Triton appends to every kernel


@dataclass(frozen=True)
class Entry:
    """A kernel as any CUDA driver takes it."""

    name: str
    ptx: str
    kinds: tuple[str, ...]
    """Of its parameters: ".u64" a pointer, ".u32" an integer."""
    threads: int
    shared_bytes: int


def entry(spec: KernelSpec, capability: int, ptx_version: int | None = None) -> Entry:
    """Compile a launch for an architecture and strip what only Triton's own launcher passes.

    Args:
        capability: 90 for sm_90.
        ptx_version: newest PTX version that the driver accepts, 84 for 8.4; by default the compiler's.

    Raises:
        TargetError: the kernel needs scratch memory, which TensorRT does not give it, or the architecture is newer than
            the driver's PTX.
    """
    least = LEAST_PTX.get(capability, 0)
    if ptx_version is not None and ptx_version < least:
        raise TargetError(
            f"sm_{capability} needs PTX {least / 10} and the driver takes {ptx_version / 10}: install a newer driver"
        )
    compiled = spec.compile(capability, ptx_version)
    return fit(compiled.asm["ptx"], compiled.metadata, spec)


def fit(ptx: str, metadata: Any, spec: KernelSpec) -> Entry:
    """Return the `entry` of a compiled kernel."""
    for kind in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, kind, 0):
            raise TargetError(f"{metadata.name} needs {getattr(metadata, kind)} bytes of scratch memory: {kind}")
    head, start, rest = ptx.partition(".visible .entry ")
    name, _, rest = rest.partition("(")
    declared, end, body = rest.partition(")")
    parameters = [part.strip() for part in declared.split(",")]
    expected = len(spec.parameters)
    if not start or not end or len(parameters) != expected + len(HIDDEN):
        raise TargetError(
            f"{metadata.name} has {len(parameters)} parameters in PTX; expected {expected} and {' and '.join(HIDDEN)}: "
            "the plugins do not know this version of triton"
        )
    for parameter in parameters[expected:]:
        label = parameter.split()[-1]
        if re.search(rf"\b{label}\b", body):
            raise TargetError(f"{metadata.name} reads its hidden parameter {label}")
    declared = ",\n\t".join(parameters[:expected])
    text = _without_debug_information(f"{head}{start}{name}(\n\t{declared}\n){body}")
    stable = f"adaattn_{name}"
    return Entry(
        stable,
        re.sub(rf"\b{name}(?=\b|_param_\d)", stable, text),
        tuple(parameter.split()[1] for parameter in parameters[:expected]),
        spec.warps * 32,
        int(metadata.shared),
    )


def _without_debug_information(ptx: str) -> str:
    """Return PTX without the paths of this machine."""
    code, _, _ = ptx.partition("\t.section\t.debug")  # all of it is at the end
    code = re.sub(r"^\s*\.(?:loc|file)\s.*\n", "", code, flags=re.MULTILINE)
    return re.sub(r"[ \t]*//.*", "", code).strip() + "\n"
