"""Describe a kernel launch once, for eager mode, cross-compilation, plugins and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from adaattn.ops.signatures import Argument

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}


def pointers(tensors: Iterable[Argument], dtype: torch.dtype | None = None) -> dict[str, str]:
    """Return Triton's types of tensors, `{"rank": "*i32"}`; `dtype` is that of those that may have several."""
    types = {x.name: x.types[0] if len(x.types) == 1 else dtype for x in tensors}
    return {name: f"*{TYPES[each]}" for name, each in types.items() if each is not None}


@dataclass(frozen=True)
class KernelSpec:
    """A Triton kernel, its arguments and how it is launched.

    Example:
        >>> spec = attend_spec(torch.float16, 128, capability=90, rows=(0, 1, 2, 3, 4))  # doctest: +SKIP
        >>> spec.compile(90).metadata.shared  # doctest: +SKIP
        163840
    """

    kernel: Any
    arguments: Mapping[str, str | None]
    """Run-time arguments in the kernel's order with Triton's types, `"*fp16"`; None for one that is left out."""
    constants: Mapping[str, Any]
    """Compile-time arguments."""
    grid: Callable[[Mapping[str, Any]], Any]
    """Number of programs, from the scalar arguments by +, -, * and // alone, so that it may be traced."""
    warps: int
    known: Mapping[str, int]
    """What compilation ahead may take for granted: 1 for a scalar that is 1, 16 for one that 16 divides."""

    def launch(self, values: Mapping[str, Any]) -> None:
        """Run the kernel on tensors and numbers, named as in `arguments`."""
        ordered = [None if kind is None else values[name] for name, kind in self.arguments.items()]
        self.kernel[(self.grid(values),)](*ordered, **self.constants, num_warps=self.warps, enable_fp_fusion=True)

    def bound(self, **values: Any) -> KernelSpec:
        """Return the same launch with some of its scalars fixed at compile time."""
        return replace(self, constants={**self.constants, **values})

    @property
    def parameters(self) -> list[str]:
        """The arguments that are left when it is compiled ahead, in order."""
        fixed = {name for name, value in self.known.items() if value == 1} | self.constants.keys()
        return [name for name, kind in self.arguments.items() if kind is not None and name not in fixed]

    def compile(self, capability: int, ptx_version: int | None = None) -> Any:
        """Return the compiled kernel for an architecture (90: sm_90), with `asm["ptx"]`, `asm["cubin"]` and `metadata`.

        Needs no GPU. Pointers are taken to be aligned to 16 bytes. `ptx_version` (84: 8.4) is the newest PTX that the
        driver to come takes; the compiler's own by default.
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature: dict[str, str] = {}
        constants = dict(self.constants)
        attributes = {}
        parameters = self.parameters
        for index, name in enumerate(self.kernel.arg_names):
            if name not in parameters:
                signature[name] = "constexpr"
                constants.setdefault(name, self.known.get(name))
                continue
            kind = str(self.arguments[name])
            signature[name] = kind
            if kind.startswith("*") or self.known.get(name) == 16:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": self.warps, "enable_fp_fusion": True, "ptx_version": ptx_version}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
