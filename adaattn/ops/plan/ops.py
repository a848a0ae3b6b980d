"""Register `adaattn::plan`: one node of a program, and one kernel on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from adaattn.ops.dispatch import takes_triton
from adaattn.ops.plan.impl.reference import choose
from adaattn.planning.error_model import Moments


@torch.library.custom_op("adaattn::plan", mutates_args=())
def plan(
    query_mean: Tensor,
    query_second_moment: Tensor,
    query_channel_peak: Tensor,
    query_token_peak: Tensor,
    key_second_moment: Tensor,
    key_channel_peak: Tensor,
    key_token_peak: Tensor,
    value_second_moment: Tensor,
    value_channel_peak: Tensor,
    ladder: Tensor,
    scale: float,
    limit: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return precision, rank and predicted error (B, H) of each head's plan; see `plan_within`."""
    if takes_triton(impl, query_mean):
        from adaattn.ops.plan.impl import triton

        moments = {
            "query_mean": query_mean,
            "query_second_moment": query_second_moment,
            "query_channel_peak": query_channel_peak,
            "query_token_peak": query_token_peak,
            "key_second_moment": key_second_moment,
            "key_channel_peak": key_channel_peak,
            "key_token_peak": key_token_peak,
            "value_second_moment": value_second_moment,
            "value_channel_peak": value_channel_peak,
        }
        return triton.choose(moments, ladder, scale, limit)
    unused = query_second_moment  # the error model reads neither the other means nor the value's token peaks
    query = Moments(query_mean, query_second_moment, query_channel_peak, query_token_peak)
    key = Moments(unused, key_second_moment, key_channel_peak, key_token_peak)
    value = Moments(unused, value_second_moment, value_channel_peak, unused)
    chosen = choose(query, key, value, ladder, scale, limit)
    return chosen.precision, chosen.rank, chosen.predicted_error


@plan.register_fake
def _(
    query_mean: Tensor,
    query_second_moment: Tensor,
    query_channel_peak: Tensor,
    query_token_peak: Tensor,
    key_second_moment: Tensor,
    key_channel_peak: Tensor,
    key_token_peak: Tensor,
    value_second_moment: Tensor,
    value_channel_peak: Tensor,
    ladder: Tensor,
    scale: float,
    limit: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    heads = query_token_peak
    return (
        heads.new_empty(heads.shape, dtype=torch.int32),
        heads.new_empty(heads.shape, dtype=torch.int32),
        heads.new_empty(heads.shape),
    )
