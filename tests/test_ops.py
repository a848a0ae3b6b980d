"""The two ops against float64, and rounding for rounding against an emulation of their specification.

The reference implementation is what every other implementation is held to, so it is held here to the mathematics: how
far each plan may stray is what the error model predicted for it.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import yardstick
from torch import Tensor

from adaattn.budget import Moments, plan_of, rank_classes
from adaattn.config import BF16, FP16, FP32, INT8, INT8_FP8, PRECISIONS
from adaattn.errors import DtypeError, ShapeError
from adaattn.masks import attended_keys
from adaattn.ops import adaptive_attention, token_moments
from adaattn.ops.adaptive_attention.impl import reference
from adaattn.ops.adaptive_attention.ops import adaptive_attention as attention_op
from adaattn.ops.token_moments.ops import token_moments as moments_op

# batch, kv heads, queries, keys, head_dim; there are always 20 query heads, one for each precision and rank.
SHAPES = [(1, 20, 1, 1, 64), (8, 4, 1, 17, 64), (8, 2, 17, 129, 20), (1, 4, 127, 127, 64), (1, 1, 129, 17, 20)]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LARGEST = {torch.float16: 3e4}  # inputs of a type are scaled down to this


def every_plan(batch: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Precision and rank (batch, 20): each pair once."""
    pairs = torch.tensor(list(product(range(len(PRECISIONS)), rank_classes(head_dim))), dtype=torch.int32)
    return pairs[:, 0].expand(batch, -1), pairs[:, 1].expand(batch, -1)


def draw(distribution: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    batch, kv_heads, queries, keys, head_dim = shape
    make = yardstick.DISTRIBUTIONS[distribution]
    drawn = make((batch, 20, queries, head_dim), (batch, kv_heads, keys, head_dim))
    limit = LARGEST.get(dtype, torch.inf)
    return [(x * min(1.0, limit / float(x.abs().max().clamp_min(1e-300)))).to(dtype) for x in drawn]


def moments(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Moments, Moments, Moments]:
    keys = attended_keys(mask, k.shape[1])
    return token_moments(q), token_moments(k, keys, True), token_moments(v, keys)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("distribution", yardstick.DISTRIBUTIONS)
def test_error_stays_within_what_the_model_predicts(distribution: str, shape: tuple[int, ...]) -> None:
    batch, _, queries, keys, head_dim = shape
    precision, rank = every_plan(batch, head_dim)
    over = []
    for dtype, kind, causal in product(DTYPES, yardstick.MASKS, (False, True)):
        q, k, v = draw(distribution, shape, dtype)
        mask = yardstick.mask(kind, batch, 20, queries, keys)
        of_q, of_k, of_v = moments(q, k, v, mask)
        predicted = plan_of(precision, rank, of_q, of_k, of_v, head_dim**-0.5).predicted_error.double()
        args = (q, k, v, of_k.mean, of_v.channel_peak, precision, rank, mask)
        output = adaptive_attention(*args, is_causal=causal)
        assert output.isfinite().all() and output.dtype == dtype, f"{dtype} {kind} mask, causal={causal}"

        # A prediction is a root mean square over tokens: few tokens are pooled with those of the other batch entries.
        together = (lambda x: x.transpose(0, 1).flatten(1, 2)) if queries < 100 else (lambda x: x)
        want = yardstick.attention(q, k, v, mask, causal)
        measured = yardstick.error(together(output), together(want))
        predicted = predicted.square().mean(0).sqrt() if queries < 100 else predicted
        sums = 0.0 if dtype == torch.float64 else yardstick.SUMS
        allowed = yardstick.MODEL * predicted + sums + yardstick.OUTPUT[dtype] + yardstick.EXACT
        for at in (measured > allowed).nonzero():
            head = int(at[-1])
            ratio = float(measured[tuple(at)] / predicted[tuple(at)])
            over.append(f"{PRECISIONS[precision[0, head]]} rank {rank[0, head]}, {dtype}, {kind} mask, causal={causal}: {ratio:.2f}x")
    assert not over, "\n".join(over)
