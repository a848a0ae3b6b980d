"""The fused kernel of `token_moments`: x is read once, twice where it is centred.

Its tokens are split into chunks, so that one long sequence fills a GPU as well as many short ones; `finish` adds the
chunks up in order, and equal inputs give equal plans.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaattn.ops.kernel_spec import TYPES, KernelSpec

PROGRAMS = 1024  # what fills the largest GPU several times over
LEAST_TOKENS = 256  # of a chunk: fewer would make the partial sums a traffic of their own


@triton.jit(do_not_specialize=["heads", "tokens", "chunk", "m_b", "m_h", "m_s"])
def reduce(
    x, mask, center, heads, tokens, chunk, x_b, x_h, x_s, x_d, m_b, m_h, m_s, partial,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one chunk of a head: Σx, Σ(x−c)², max|x−c| per dimension, then Σ max_d (x−c)² and the number of tokens."""
    chunks = tl.cdiv(tokens, chunk)
    head = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * chunk
    b, h = tl.cast(head // heads, tl.int64), tl.cast(head % heads, tl.int64)
    dim = tl.arange(0, WIDTH)
    about = tl.zeros([WIDTH], tl.float32)
    if center is not None:
        about = tl.load(center + head * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0)
    x += b * x_b + h * x_h
    if mask is not None:
        mask += b * m_b + h * m_h

    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    squares = tl.zeros([BLOCK, WIDTH], tl.float32)
    peak = tl.zeros([BLOCK, WIDTH], tl.float32)
    token = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(first, tl.minimum(first + chunk, tokens), BLOCK):
        row = start + tl.arange(0, BLOCK)
        counts = (row < tokens) & (row < first + chunk)
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

    partial += tl.cast(tl.program_id(0), tl.int64) * (3 * HEAD_DIM + 2)
    tl.store(partial + dim, tl.sum(total, 0), mask=dim < HEAD_DIM)
    tl.store(partial + HEAD_DIM + dim, tl.sum(squares, 0), mask=dim < HEAD_DIM)
    tl.store(partial + 2 * HEAD_DIM + dim, tl.max(peak, 0), mask=dim < HEAD_DIM)
    tl.store(partial + 3 * HEAD_DIM, tl.sum(token, 0))
    tl.store(partial + 3 * HEAD_DIM + 1, tl.sum(count, 0))


@triton.jit(do_not_specialize=["chunks"])
def finish(partial, chunks, mean, second_moment, channel_peak, token_peak, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The chunks of a head, put together."""
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


def reduce_spec(dtype: torch.dtype, head_dim: int, masked: bool, center: bool) -> KernelSpec:
    """The pass over x, for a type and head dimension."""
    scalars = ("heads", "tokens", "chunk", "x_b", "x_h", "x_s", "x_d", "m_b", "m_h", "m_s")
    width = triton.next_power_of_2(head_dim)
    return KernelSpec(
        reduce,
        {
            "x": f"*{TYPES[dtype]}",
            "mask": "*u8" if masked else None,
            "center": "*fp32" if center else None,
            **dict.fromkeys(scalars, "i32"),
            "partial": "*fp32",
        },
        {"HEAD_DIM": head_dim, "WIDTH": width, "BLOCK": max(1, 4096 // width)},  # 32 elements a thread
        lambda v: v["batch"] * v["heads"] * ((v["tokens"] + v["chunk"] - 1) // v["chunk"]),
        warps=4,
        known={"x_d": 1, **({"x_b": 16, "x_h": 16, "x_s": 16} if head_dim % 16 == 0 else {})},
    )


def finish_spec(head_dim: int) -> KernelSpec:
    """The sum over chunks."""
    outputs = ("mean", "second_moment", "channel_peak", "token_peak")
    return KernelSpec(
        finish,
        {"partial": "*fp32", "chunks": "i32", **dict.fromkeys(outputs, "*fp32")},
        {"HEAD_DIM": head_dim, "WIDTH": triton.next_power_of_2(head_dim)},
        lambda v: v["batch"] * v["heads"],
        warps=1,
        known={},
    )


def token_moments(x: Tensor, key_mask: Tensor | None, center: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, second moment and peak per dimension, mean squared peak per token; see `adaattn.ops.token_moments`."""
    batch, heads, tokens, head_dim = x.shape
    chunks = min(triton.cdiv(PROGRAMS, batch * heads), triton.cdiv(tokens, LEAST_TOKENS))
    chunk = triton.cdiv(tokens, chunks)
    chunks = triton.cdiv(tokens, chunk)
    partial = x.new_empty(batch * heads * chunks, 3 * head_dim + 2, dtype=torch.float32)
    per_dim = [x.new_empty(batch, heads, head_dim, dtype=torch.float32) for _ in range(3)]
    outputs = dict(zip(("mean", "second_moment", "channel_peak"), per_dim, strict=True))
    outputs["token_peak"] = x.new_empty(batch, heads, dtype=torch.float32)
    mask = None if key_mask is None else key_mask.expand(batch, heads, tokens).view(torch.uint8)
    values: dict[str, Any] = {
        "x": x,
        "mask": mask,
        "batch": batch,
        "heads": heads,
        "tokens": tokens,
        "chunk": chunk,
        **dict(zip(("x_b", "x_h", "x_s", "x_d"), x.stride(), strict=True)),
        **dict(zip(("m_b", "m_h", "m_s"), (0, 0, 0) if mask is None else mask.stride(), strict=True)),
        "partial": partial,
        "chunks": chunks,
        **outputs,
    }
    for about in (None, outputs["mean"]) if center else (None,):
        reduce_spec(x.dtype, head_dim, mask is not None, about is not None).launch({**values, "center": about})
        finish_spec(head_dim).launch(values)
    return per_dim[0], per_dim[1], per_dim[2], outputs["token_peak"]
