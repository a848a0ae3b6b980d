"""Plan all heads in one launch: the reference, as torch arithmetic, is dozens of small kernels.

A program serves one head. Each step of the ladder costs it a sum over the dimensions that the step leaves out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaattn.ops.kernel_spec import KernelSpec, pointers
from adaattn.ops.signatures import OPS
from adaattn.planning.precision import BF16_MAX, BF16_U, FP8_STEP, FP8_U, FP16_MAX, FP16_STEP, FP16_U, FP32_U

CONSTANTS = {
    "FP32": 2 * FP32_U**2,
    "BF16": 2 * BF16_U**2,
    "FP16": 2 * FP16_U**2,
    "FP8": 2 * FP8_U**2,
    "INTEGER": 1 / (12 * 127**2),
    "FP16_UNDERFLOW": FP16_STEP**2 / 12,
    "FP8_UNDERFLOW": FP8_STEP**2 / 12,
    "FP16_LARGEST": FP16_MAX,
    "BF16_LARGEST": BF16_MAX,
}


@triton.jit(do_not_specialize=["heads", "kv_heads", "steps"])
def plan(
    query_mean, query_second_moment, query_channel_peak, query_token_peak,
    key_second_moment, key_channel_peak, key_token_peak, value_second_moment, value_channel_peak, ladder,
    heads, kv_heads, steps, scale, limit, precision, rank, predicted_error,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, FP32: tl.constexpr, BF16: tl.constexpr, FP16: tl.constexpr,
    FP8: tl.constexpr, INTEGER: tl.constexpr, FP16_UNDERFLOW: tl.constexpr, FP8_UNDERFLOW: tl.constexpr,
    FP16_LARGEST: tl.constexpr, BF16_LARGEST: tl.constexpr,
):  # fmt: skip
    """Choose the first step with a predicted error of at most the limit, else the last; as in `error_model.noise`."""
    head = tl.program_id(0)
    of_kv = head // (heads // kv_heads)
    dim = tl.arange(0, WIDTH)
    inside = dim < HEAD_DIM
    at, kv_at = head * HEAD_DIM + dim, of_kv * HEAD_DIM + dim
    infinity = float("inf")

    q2 = tl.load(query_second_moment + at, mask=inside, other=0)
    q_peak = tl.load(query_channel_peak + at, mask=inside, other=0)
    k2 = tl.load(key_second_moment + kv_at, mask=inside, other=0)
    k_peak = tl.load(key_channel_peak + kv_at, mask=inside, other=0)
    v_peak = tl.load(value_channel_peak + kv_at, mask=inside, other=0)
    q_power, k_power = tl.sum(q2, 0), tl.sum(k2, 0)
    v_power = tl.maximum(tl.sum(tl.load(value_second_moment + kv_at, mask=inside, other=0), 0) / HEAD_DIM, 1e-30)

    gap = tl.max(tl.abs(scale * tl.load(query_mean + at, mask=inside, other=0) * k_peak), 0)
    rarity2 = 3 * tl.exp(2 * gap)
    energy = q2 * k2 * (scale * scale)
    total = tl.sum(energy, 0) + gap * gap
    largest_v = tl.max(v_peak, 0)
    largest = tl.maximum(tl.maximum(tl.max(q_peak, 0), tl.max(k_peak, 0)), largest_v)

    steps2 = tl.load(query_token_peak + head) * k_power + tl.load(key_token_peak + of_kv) * q_power
    integer = steps2 * (scale * scale * INTEGER)
    fp16_values = FP16 + FP16_UNDERFLOW * (1 / v_power + rarity2)
    fp8_values = FP8 + FP8_UNDERFLOW * (tl.sum(v_peak * v_peak, 0) / HEAD_DIM / v_power + rarity2)
    fp16_scores = FP16 * total + scale * scale * FP16_UNDERFLOW * (q_power + k_power)
    fp32 = (total + 1) * FP32
    bf16 = tl.where(largest <= BF16_LARGEST, (total + 1) * BF16, infinity)
    fp16 = tl.where(largest <= FP16_LARGEST, fp16_scores + fp16_values, infinity)
    int8 = tl.where(largest_v <= FP16_LARGEST, integer + fp16_values, infinity)
    int8_fp8 = integer + fp8_values

    for back in range(steps):
        step = steps - 1 - back
        code, width = tl.load(ladder + step), tl.load(ladder + steps + step)
        noise = tl.where(code == 1, bf16, tl.where(code == 2, fp16, tl.where(code == 3, int8, int8_fp8)))
        noise = tl.where(code == 0, fp32, noise)
        squared = noise + tl.sum(tl.where(inside & (dim >= width), energy, 0.0), 0)
        error = tl.where(squared >= 0, tl.sqrt(squared), infinity)  # NaN means unknown, which must not look small
        if (back == 0) | (error <= limit):
            tl.store(precision + head, code.to(tl.int32))
            tl.store(rank + head, width.to(tl.int32))
            tl.store(predicted_error + head, error)


@functools.cache
def plan_spec(head_dim: int) -> KernelSpec:
    """Return the launch for a head dimension."""
    signature = OPS["plan"]
    return KernelSpec(
        plan,
        {
            **pointers(signature.inputs),
            **dict.fromkeys(("heads", "kv_heads", "steps"), "i32"),
            **dict.fromkeys(signature.attributes, "fp32"),
            **pointers(signature.outputs),
        },
        {"HEAD_DIM": head_dim, "WIDTH": triton.next_power_of_2(head_dim), **CONSTANTS},
        lambda v: v["batch"] * v["heads"],
        warps=1,
        known={},
    )


def choose(moments: Mapping[str, Tensor], ladder: Tensor, scale: float, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return precision, rank and predicted error (B, H), from the moments by their names."""
    signature, inputs = OPS["plan"], {name: x.contiguous() for name, x in {**moments, "ladder": ladder}.items()}
    sizes = signature.sizes({name: x.shape for name, x in inputs.items()})
    of_heads = (sizes["batch"], sizes["heads"])
    outputs = {x.name: ladder.new_empty(of_heads, dtype=x.types[0]) for x in signature.outputs}
    with torch.cuda.device_of(ladder):
        plan_spec(sizes["head_dim"]).launch({**inputs, **sizes, "scale": scale, "limit": limit, **outputs})
    return outputs["precision"], outputs["rank"], outputs["predicted_error"]
