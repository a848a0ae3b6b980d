"""Define the fused kernels of `token_moments`: x is read once, twice where it is centred.

Where heads are many, `moments` serves one head a program. Where they are few, their tokens are split into chunks, so
that one long sequence fills a GPU too: `reduce` sums each, and `finish` adds the chunks up in order, so that equal
inputs give equal plans.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaattn.ops.kernel_spec import TYPES, KernelSpec, pointers
from adaattn.ops.signatures import OPS
from adaattn.planning.error_model import Moments

PROGRAMS = 1024  # what fills the largest GPU several times over
LEAST_TOKENS = 256  # of a chunk: with fewer, reading the partial sums would cost as much as reading x
STRIDES, MASK_STRIDES = ("x_b", "x_h", "x_s", "x_d"), ("m_b", "m_h", "m_s")


@triton.jit
def _sums(x, x_s, x_d, mask, m_s, about, first, end, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Sum tokens from `first` to `end`: Σx, Σ(x−c)², max|x−c| per dimension, Σ max_d (x−c)² and their number."""
    dim = tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    squares = tl.zeros([BLOCK, WIDTH], tl.float32)
    peak = tl.zeros([BLOCK, WIDTH], tl.float32)
    token = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        counts = row < end
        if mask is not None:
            counts = counts & (tl.load(mask + tl.cast(row, tl.int64) * m_s, mask=counts, other=0) != 0)
        inside = counts[:, None] & (dim < HEAD_DIM)[None, :]
        at = x + tl.cast(row, tl.int64)[:, None] * x_s + dim[None, :] * x_d
        y = tl.load(at, mask=inside, other=0).to(tl.float32)
        total += y
        y = tl.where(inside, y - about[None, :], 0.0)
        squares += y * y
        peak = tl.maximum(peak, tl.abs(y))
        largest = tl.max(tl.abs(y), 1)
        token += largest * largest
        count += counts.to(tl.float32)
    return tl.sum(total, 0), tl.sum(squares, 0), tl.max(peak, 0), tl.sum(token, 0), tl.sum(count, 0)


@triton.jit(do_not_specialize=["heads", "tokens"])
def moments(
    x, mask, heads, tokens, x_b, x_h, x_s, x_d, m_b, m_h, m_s, mean, second_moment, channel_peak, token_peak,
    CENTER: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the moments of a head: mean, E[(x−c)²], max|x−c| (HEAD_DIM each) and the mean squared token peak."""
    head = tl.cast(tl.program_id(0), tl.int64)
    b, h = head // heads, head % heads
    x += b * x_b + h * x_h
    if mask is not None:
        mask += b * m_b + h * m_h
    dim = tl.arange(0, WIDTH)
    about = tl.zeros([WIDTH], tl.float32)
    total, squares, peak, token, count = _sums(x, x_s, x_d, mask, m_s, about, 0, tokens, HEAD_DIM, WIDTH, BLOCK)
    count = tl.maximum(count, 1.0)
    about = total / count
    if CENTER:
        _, squares, peak, token, _ = _sums(x, x_s, x_d, mask, m_s, about, 0, tokens, HEAD_DIM, WIDTH, BLOCK)
    at = head * HEAD_DIM + dim
    tl.store(mean + at, about, mask=dim < HEAD_DIM)
    tl.store(second_moment + at, squares / count, mask=dim < HEAD_DIM)
    tl.store(channel_peak + at, peak, mask=dim < HEAD_DIM)
    tl.store(token_peak + head, token / count)


@triton.jit(do_not_specialize=["heads", "tokens", "chunk"])
def reduce(
    x, mask, center, heads, tokens, chunk, x_b, x_h, x_s, x_d, m_b, m_h, m_s, partial,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum a chunk of a head's tokens: 3·HEAD_DIM + 2 partial sums, about `center` where it is given."""
    chunks = tl.cdiv(tokens, chunk)
    head = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * chunk
    b, h = tl.cast(head // heads, tl.int64), tl.cast(head % heads, tl.int64)
    dim = tl.arange(0, WIDTH)
    about = tl.zeros([WIDTH], tl.float32)
    if center is not None:
        about = tl.load(center + tl.cast(head, tl.int64) * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0)
    x += b * x_b + h * x_h
    if mask is not None:
        mask += b * m_b + h * m_h
    end = tl.minimum(first + chunk, tokens)
    total, squares, peak, token, count = _sums(x, x_s, x_d, mask, m_s, about, first, end, HEAD_DIM, WIDTH, BLOCK)
    partial += tl.cast(tl.program_id(0), tl.int64) * (3 * HEAD_DIM + 2)
    tl.store(partial + dim, total, mask=dim < HEAD_DIM)
    tl.store(partial + HEAD_DIM + dim, squares, mask=dim < HEAD_DIM)
    tl.store(partial + 2 * HEAD_DIM + dim, peak, mask=dim < HEAD_DIM)
    tl.store(partial + 3 * HEAD_DIM, token)
    tl.store(partial + 3 * HEAD_DIM + 1, count)


@triton.jit(do_not_specialize=["chunks"])
def finish(partial, chunks, mean, second_moment, channel_peak, token_peak, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Combine the partial sums of a head's chunks, in order, into its moments."""
    head = tl.cast(tl.program_id(0), tl.int64)
    dim = tl.arange(0, WIDTH)
    inside = dim < HEAD_DIM
    total = tl.zeros([WIDTH], tl.float32)
    squares = tl.zeros([WIDTH], tl.float32)
    peak = tl.zeros([WIDTH], tl.float32)
    token = 0.0
    count = 0.0
    partial += head * chunks * (3 * HEAD_DIM + 2)
    for _ in range(chunks):
        total += tl.load(partial + dim, mask=inside, other=0)
        squares += tl.load(partial + HEAD_DIM + dim, mask=inside, other=0)
        peak = tl.maximum(peak, tl.load(partial + 2 * HEAD_DIM + dim, mask=inside, other=0))
        token += tl.load(partial + 3 * HEAD_DIM)
        count += tl.load(partial + 3 * HEAD_DIM + 1)
        partial += 3 * HEAD_DIM + 2
    count = tl.maximum(count, 1.0)
    tl.store(mean + head * HEAD_DIM + dim, total / count, mask=inside)
    tl.store(second_moment + head * HEAD_DIM + dim, squares / count, mask=inside)
    tl.store(channel_peak + head * HEAD_DIM + dim, peak, mask=inside)
    tl.store(token_peak + head, token / count)


def moments_spec(dtype: torch.dtype, head_dim: int, masked: bool, center: bool) -> KernelSpec:
    """Describe the launch of `moments`, one program a head."""
    return KernelSpec(
        moments,
        {
            **_operands(dtype, masked),
            **_scalars(("heads", "tokens"), masked),
            **pointers(OPS["token_moments"].outputs),
        },
        {"CENTER": center, **_block(head_dim)},
        lambda v: v["batch"] * v["heads"],
        warps=4,
        known=_known(head_dim),
    )


def reduce_spec(dtype: torch.dtype, head_dim: int, masked: bool, center: bool) -> KernelSpec:
    """Describe the launch of `reduce`, one program a chunk of a head."""
    return KernelSpec(
        reduce,
        {
            **_operands(dtype, masked),
            "center": "*fp32" if center else None,
            **_scalars(("heads", "tokens", "chunk"), masked),
            "partial": "*fp32",
        },
        _block(head_dim),
        lambda v: v["batch"] * v["heads"] * ((v["tokens"] + v["chunk"] - 1) // v["chunk"]),
        warps=4,
        known=_known(head_dim),
    )


def finish_spec(head_dim: int) -> KernelSpec:
    """Describe the launch of `finish`, which adds up chunks."""
    return KernelSpec(
        finish,
        {"partial": "*fp32", "chunks": "i32", **pointers(OPS["token_moments"].outputs)},
        {"HEAD_DIM": head_dim, "WIDTH": triton.next_power_of_2(head_dim)},
        lambda v: v["batch"] * v["heads"],
        warps=1,
        known={},
    )


def _operands(dtype: torch.dtype, masked: bool) -> dict[str, str | None]:
    return {"x": f"*{TYPES[dtype]}", "mask": "*u8" if masked else None}


def _scalars(sizes: tuple[str, ...], masked: bool) -> dict[str, str | None]:
    return {**dict.fromkeys((*sizes, *STRIDES), "i32"), **dict.fromkeys(MASK_STRIDES, "i32" if masked else None)}


def _block(head_dim: int) -> dict[str, int]:
    width = triton.next_power_of_2(head_dim)
    return {"HEAD_DIM": head_dim, "WIDTH": width, "BLOCK": max(1, 4096 // width)}  # 32 elements a thread


def _known(head_dim: int) -> dict[str, int]:
    return {"x_d": 1, **({"x_b": 16, "x_h": 16, "x_s": 16} if head_dim % 16 == 0 else {})}


def token_moments(x: Tensor, key_mask: Tensor | None, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the moments of x, (B, H, D) and a token peak (B, H); see `adaattn.ops.token_moments`."""
    batch, heads, tokens, head_dim = x.shape
    sizes = {"batch": batch, "heads": heads, "head_dim": head_dim}
    outputs = Moments(
        *(x.new_empty([sizes[axis] for axis in y.axes], dtype=torch.float32) for y in OPS["token_moments"].outputs)
    )
    mask = None if key_mask is None else key_mask.expand(batch, heads, tokens).view(torch.uint8)
    values: dict[str, Any] = {
        "x": x,
        "mask": mask,
        "batch": batch,
        "heads": heads,
        "tokens": tokens,
        **dict(zip(STRIDES, x.stride(), strict=True)),
        **({} if mask is None else dict(zip(MASK_STRIDES, mask.stride(), strict=True))),
        **outputs._asdict(),
    }
    chunks = min(triton.cdiv(PROGRAMS, batch * heads), triton.cdiv(tokens, LEAST_TOKENS))
    with torch.cuda.device_of(x):
        if chunks == 1:
            moments_spec(x.dtype, head_dim, mask is not None, center).launch(values)
            return outputs
        values["chunk"] = triton.cdiv(tokens, chunks)
        values["chunks"] = triton.cdiv(tokens, values["chunk"])
        values["partial"] = x.new_empty(batch * heads * values["chunks"], 3 * head_dim + 2, dtype=torch.float32)
        for about in (None, outputs.mean) if center else (None,):
            reduce_spec(x.dtype, head_dim, mask is not None, about is not None).launch({**values, "center": about})
            finish_spec(head_dim).launch(values)
    return outputs
