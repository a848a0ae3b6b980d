"""Triton's interpreter with the arithmetic of the hardware, for kernels that are tested without one.

As it is, it rounds to bf16 by cutting bits off, rounds to e4m3 neither to even nor always into the right binade, and
multiplies bf16 tensors as the integers that hold them. Here casts to these types round half to even and products see
the numbers. Sums are numpy's: float32, in no order that a tensor core promises. It also puts its own functions into
triton.language at every call within a kernel, a third of its time; here once a launch.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import numpy as np
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before its module is imported


def install() -> None:
    """Patch the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    formats = {
        tl.bfloat16: (torch.bfloat16, np.int16, np.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, np.int8, np.uint8),
    }
    as_it_is = {name: getattr(builder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot")}

    def widened(x: Any) -> Any:
        """Return the numbers of a handle as float32."""
        if x.dtype.scalar not in formats:
            return x
        dtype, signed, _ = formats[x.dtype.scalar]
        numbers = torch.from_numpy(x.data.view(signed).copy()).view(dtype).float().numpy()
        return interpreter.TensorHandle(numbers, tl.float32)

    def rounded(x: Any, to: Any) -> Any:
        dtype, signed, unsigned = formats[to]
        numbers = torch.from_numpy(np.ascontiguousarray(x.data, np.float32))
        if to == tl.float8e4nv:
            numbers = numbers.clamp(-448, 448)  # the hardware's conversion saturates
        integers = torch.int16 if signed == np.int16 else torch.int8
        return interpreter.TensorHandle(numbers.to(dtype).view(integers).numpy().view(unsigned), to)

    def cast(name: str) -> Any:
        def run(self: Any, x: Any, to: Any, *rest: Any) -> Any:
            if to.scalar in formats and x.dtype.scalar in (tl.float32, tl.float16):
                return rounded(x, to.scalar)
            if x.dtype.scalar in formats and to.scalar == tl.float32:
                return widened(x)
            return as_it_is[name](self, x, to, *rest)

        return run

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = widened(a), widened(b)
        if a.dtype.scalar == tl.float16:  # numpy would round the products
            a, b = (interpreter.TensorHandle(x.data.astype(np.float32), tl.float32) for x in (a, b))
        return as_it_is["create_dot"](self, a, b, d, *rest)

    builder.cast_impl, builder.create_fp_to_fp = cast("cast_impl"), cast("create_fp_to_fp")
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, x, to: self.cast_impl(x, to))
    builder.create_dot = dot

    patch_lang, patched = interpreter._patch_lang, set[ModuleType]()

    def patch_once(fn: Any) -> Any:
        """Only a launch restores what it patched; calls within it ignore what this returns."""
        langs = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
        if langs <= patched:
            return None
        scope = patch_lang(fn)
        restore = scope.restore
        scope.restore = lambda: (restore(), patched.clear())
        patched.update(langs)
        return scope

    interpreter._patch_lang = patch_once


if not GPU:
    install()
