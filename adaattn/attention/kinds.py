"""Name the kinds of attention, as `Encoder` and `Conversion` take them."""

from __future__ import annotations

from collections.abc import Callable

from adaattn.attention.adaptive import AdaptiveAttention
from adaattn.attention.adaptive_precision import AdaptivePrecisionAttention
from adaattn.attention.adaptive_rank import AdaptiveRankAttention
from adaattn.attention.base import AttentionBase
from adaattn.attention.dense import DenseAttention

ATTENTION: dict[str, Callable[..., AttentionBase]] = {
    "dense": DenseAttention,
    "adaptive_precision": AdaptivePrecisionAttention,
    "adaptive_rank": AdaptiveRankAttention,
    "adaptive": AdaptiveAttention,
}
