"""Launch the fused kernels of `adaptive_attention`: block sizes, scratch memory, arguments."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from adaattn.ops.adaptive_attention.impl.kernels import ADDITIVE, BOOLEAN, PADDING, attend, pack
from adaattn.ops.kernel_spec import TYPES, KernelSpec, pointers
from adaattn.ops.signatures import OPS
from adaattn.planning.precision import INT8, INT8_FP8, PRECISIONS

# Queries and keys of a block by architecture, largest head_dim and bits of the inputs: for fp32, for 16-bit operands as
# they come or packed, for operands cast on the way, int8, int8_fp8. Each is the largest of those tried that lets tensor
# cores run without waiting and keeps everything in registers; docs/kernels.md has what the compiler made of them.
TILES = {
    (80, 64, 16): ((128, 32), (128, 64), (128, 64), (128, 128), (128, 128)),
    (80, 64, 32): ((32, 32), (128, 64), (128, 32), (128, 128), (128, 128)),
    (80, 128, 16): ((64, 32), (128, 32), (128, 32), (128, 64), (128, 64)),
    (80, 128, 32): ((32, 16), (128, 32), (64, 32), (128, 64), (128, 64)),
    (80, 256, 16): ((64, 32), (64, 32), (64, 32), (64, 64), (64, 64)),
    (80, 256, 32): ((32, 16), (64, 32), (64, 16), (64, 64), (64, 64)),
    (90, 64, 16): ((128, 64), (128, 128), (128, 128), (128, 128), (128, 128)),
    (90, 64, 32): ((128, 64), (128, 128), (128, 64), (128, 128), (128, 128)),
    (90, 128, 16): ((128, 64), (128, 128), (128, 64), (128, 64), (128, 64)),
    (90, 128, 32): ((128, 32), (128, 128), (128, 32), (128, 64), (128, 64)),
    (90, 256, 16): ((128, 16), (128, 32), (64, 64), (128, 32), (64, 128)),
    (90, 256, 32): ((32, 16), (128, 32), (64, 32), (64, 64), (64, 128)),
    (100, 64, 16): ((128, 64), (128, 128), (128, 64), (128, 64), (128, 64)),
    (100, 64, 32): ((64, 64), (128, 128), (128, 64), (128, 64), (128, 64)),
    (100, 128, 16): ((128, 64), (128, 64), (128, 64), (128, 64), (128, 64)),
    (100, 128, 32): ((64, 32), (128, 64), (128, 32), (128, 64), (128, 64)),
    (100, 256, 16): ((128, 32), (64, 64), (64, 64), (128, 32), (64, 128)),
    (100, 256, 32): ((64, 16), (64, 64), (64, 32), (64, 64), (64, 128)),
}
# Within 48 KiB of shared memory: for fp32, and for the other rows.
SMALL_TILES = {64: ((32, 16), (64, 32)), 128: ((32, 16), (64, 32)), 256: ((16, 16), (32, 32))}
WARPS = 8
INTERPRETED = (16, 32)  # small, so that small tests cross the edges of blocks

PACKED = ("key8", "key_step", "value8", "key16", "value16")
PACK_BLOCK = 32
SIZES = ("heads", "kv_heads", "queries", "keys")
STRIDES = tuple(f"{tensor}_{axis}" for tensor in "qkv" for axis in "bhsd")
MASK_STRIDES = ("m_b", "m_h", "m_q", "m_k")


def has_fp8(capability: int) -> bool:
    """Return whether tensor cores multiply e4m3 numbers; the interpreter, 0, emulates them."""
    return capability == 0 or capability >= 89


def tiles(
    dtype: torch.dtype,
    head_dim: int,
    capability: int,
    mask: torch.dtype | None = None,
    mask_of_queries: bool = False,
    packed: bool = True,
) -> list[tuple[int, int]]:
    """Return the queries and keys of a block for each precision, in the order of PRECISIONS."""
    if capability == 0:
        return [INTERPRETED] * len(PRECISIONS)
    family = capability // 10 * 10 if capability // 10 in (9, 10) else 80  # others multiply as sm_80 does
    width = _width(head_dim)
    fp32, plain, cast, int8, int8_fp8 = TILES[family, width, 32 if dtype == torch.float32 else 16]
    rows = [fp32, plain if dtype == torch.bfloat16 else cast, plain, int8, int8_fp8]
    if not packed:  # keys and values are rounded in registers, for a few queries
        rows = [(min(m, 64), min(n, 64)) for m, n in rows[:3]] + [(64, 32)] * 2
    if mask is None:
        return rows
    if mask_of_queries and mask != torch.uint8:  # a block of it is as large as one of scores
        most = {80: [(64, 32)] * 5, 90: [(128, 32)] * 3 + [(128, 16), (64, 32)], 100: [(64, 64)] * 5}[family]
        return [(min(m, wide), min(n, deep)) for (m, n), (wide, deep) in zip(rows, most, strict=True)]
    return [(m, n // 2 if n > 32 and family != 100 else n) for m, n in rows]  # it takes registers too


def launches(
    dtype: torch.dtype, head_dim: int, capability: int, mask_of_queries: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Return the precisions of each launch: all in one, or one in each where together they need too many registers.

    A launch whose precision no head has costs little but the start of its programs.
    """
    codes = tuple(code for code in range(len(PRECISIONS)) if code != INT8_FP8 or has_fp8(capability))
    together = capability <= 90 and head_dim <= 128 and dtype != torch.float32 and not mask_of_queries
    return (codes,) if together else tuple((code,) for code in codes)


def _width(head_dim: int) -> int:
    return next(width for width in (64, 128, 256) if head_dim <= width)


def padded(keys: Any) -> Any:
    """Return the number of tokens for which packed e4m3 values have room."""
    return (keys + PADDING.value - 1) // PADDING.value * PADDING.value


@functools.cache
def attend_spec(
    dtype: torch.dtype,
    head_dim: int,
    capability: int,
    *,
    causal: bool = False,
    mask: torch.dtype | None = None,
    mask_of_queries: bool = False,
    packed: bool = True,
    small: bool = False,
    rows: tuple[int, ...],
) -> KernelSpec:
    """Return the launch of `attend`.

    Args:
        dtype: of query, key, value and output.
        capability: architecture, 90 for sm_90; 0 for Triton's interpreter.
        mask: type of the mask, uint8 for a boolean one; None without.
        mask_of_queries: whether the mask differs from query to query.
        packed: whether `pack` ran before.
        small: whether shared memory has to stay within 48 KiB, which every launcher grants.
        rows: precision codes of the heads that it serves; int8_fp8 runs as int8 where it cannot be multiplied.
    """
    if small:
        fp32, others = SMALL_TILES[_width(head_dim)]
        blocks = [fp32, *[others] * (len(PRECISIONS) - 1)]
    else:
        blocks = tiles(dtype, head_dim, capability, mask, mask_of_queries, packed)
    program = max(blocks[row][0] for row in rows)
    signature = OPS["adaptive_attention"]
    return KernelSpec(
        attend,
        {
            **pointers(signature.inputs, dtype),
            "mask": None if mask is None else f"*{TYPES[mask]}",
            **(_packed_types(dtype, capability) if packed else dict.fromkeys(PACKED)),
            **dict.fromkeys((*SIZES, *STRIDES, *MASK_STRIDES), "i32"),
            "scale": "fp32",
            **pointers(signature.outputs, dtype),
        },
        {
            "DIM": head_dim,
            "CAUSAL": causal,
            "MASK": 0 if mask is None else BOOLEAN.value if mask == torch.uint8 else ADDITIVE.value,
            "MASK_OF_QUERIES": mask_of_queries,
            "PACKED": packed,
            "FP8": has_fp8(capability),
            "ROWS": rows,
            "PROGRAM": program,
            "BLOCK_M": tuple(min(m, program) for m, _ in blocks),
            "BLOCK_N": tuple(n for _, n in blocks),
            "STAGES": tuple(1 if n == 16 or small else 2 for _, n in blocks),
        },
        lambda v: v["batch"] * v["heads"] * ((v["queries"] + program - 1) // program),
        warps=WARPS,
        known=_known(head_dim),
    )


@functools.cache
def pack_spec(dtype: torch.dtype, head_dim: int, capability: int) -> KernelSpec:
    """Return the launch of `pack`."""
    return KernelSpec(
        pack,
        {
            **pointers((x for x in OPS["adaptive_attention"].inputs if x.name not in ("query", "rank")), dtype),
            **dict.fromkeys(("heads", "kv_heads", "keys", *STRIDES[4:]), "i32"),
            **_packed_types(dtype, capability),
        },
        {"DIM": head_dim, "BLOCK": PACK_BLOCK},
        lambda v: v["batch"] * v["kv_heads"] * (padded(v["keys"]) // PACK_BLOCK),
        warps=4,
        known=_known(head_dim),
    )


def adaptive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mean: Tensor,
    value_peak: Tensor,
    precision: Tensor,
    rank: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Compute attention in which each head follows its plan; see `adaattn.ops.adaptive_attention`."""
    if scale < 0:  # the kernel takes the largest product for the largest score
        query, scale = -query, -scale
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    capability = _capability(query.device)
    mask = None if attn_mask is None else attn_mask.expand(batch, heads, queries, keys)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    output = query.new_empty(query.shape)
    values: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "key_mean": key_mean.float().contiguous(),
        "value_peak": value_peak.float().contiguous(),
        "precision": precision.contiguous(),
        "rank": rank.contiguous(),
        "mask": mask,
        **dict.fromkeys(PACKED),
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "queries": queries,
        "keys": keys,
        **dict(zip(STRIDES, (*query.stride(), *key.stride(), *value.stride()), strict=True)),
        **dict(zip(MASK_STRIDES, (0,) * 4 if mask is None else mask.stride(), strict=True)),
        "scale": scale,
        "output": output,
    }
    # One block of queries rounds no key twice.
    packed = queries > tiles(query.dtype, head_dim, capability, packed=False)[INT8][0]
    mask_of_queries = attn_mask is not None and attn_mask.shape[2] > 1
    with torch.cuda.device_of(query):
        if packed:
            for name, (shape, dtype) in scratch(query.dtype, head_dim, capability, batch, kv_heads, keys).items():
                values[name] = query.new_empty(shape, dtype=dtype)
            pack_spec(query.dtype, head_dim, capability).launch(values)
        for rows in launches(query.dtype, head_dim, capability, mask_of_queries):
            spec = attend_spec(
                query.dtype,
                head_dim,
                capability,
                causal=is_causal,
                mask=None if mask is None else mask.dtype,
                mask_of_queries=mask_of_queries,
                packed=packed,
                rows=rows,
            )
            spec.launch(values)
    return output


def scratch(
    dtype: torch.dtype, head_dim: int, capability: int, batch: Any, kv_heads: Any, keys: Any
) -> dict[str, tuple[tuple[Any, ...], torch.dtype]]:
    """Return shapes and types of what `pack` writes: fp16 copies of other types, e4m3 where tensor cores have it."""
    tokens = (batch, kv_heads, keys)
    shapes = {"key8": ((*tokens, head_dim), torch.int8), "key_step": (tokens, torch.float32)}
    if has_fp8(capability):
        shapes["value8"] = ((batch, kv_heads, padded(keys), head_dim), torch.float8_e4m3fn)
    if dtype != torch.float16:
        shapes.update(dict.fromkeys(("key16", "value16"), ((*tokens, head_dim), torch.float16)))
    return shapes


def _packed_types(dtype: torch.dtype, capability: int) -> dict[str, str | None]:
    written = scratch(dtype, 0, capability, 0, 0, 0)
    return {name: f"*{TYPES[written[name][1]]}" if name in written else None for name in PACKED}


def _known(head_dim: int) -> dict[str, int]:
    """Return what compilation may assume of contiguous operands."""
    aligned = {name: 16 for name in STRIDES if not name.endswith("_d")} if head_dim % 16 == 0 else {}
    return {**aligned, "q_d": 1, "k_d": 1, "v_d": 1, "m_k": 1}


@functools.cache
def _capability(device: torch.device) -> int:
    if triton.knobs.runtime.interpret:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
