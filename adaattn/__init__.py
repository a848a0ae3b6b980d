"""Attention that chooses, per input and per head, how precisely and at what rank to compute.

Names load on first use, so that `adaattn-export --help` answers before torch has been imported. To load a `.pt2`
program that uses the ops, import `adaattn.ops` first: that registers them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaattn.attention.adaptive import AdaptiveAttention
    from adaattn.attention.adaptive_precision import AdaptivePrecisionAttention
    from adaattn.attention.adaptive_rank import AdaptiveRankAttention
    from adaattn.attention.dense import DenseAttention
    from adaattn.calibration import calibrate
    from adaattn.checkpoint import load, save
    from adaattn.conversion import Conversion, convert
    from adaattn.encoder import Encoder
    from adaattn.errors import AdaAttnError
    from adaattn.functional import adaptive_attention
    from adaattn.integrations.sdpa import adapt, adaptive_sdpa

__version__ = "0.1.0"

_HOME = {
    "AdaAttnError": "adaattn.errors",
    "AdaptiveAttention": "adaattn.attention.adaptive",
    "AdaptivePrecisionAttention": "adaattn.attention.adaptive_precision",
    "AdaptiveRankAttention": "adaattn.attention.adaptive_rank",
    "Conversion": "adaattn.conversion",
    "DenseAttention": "adaattn.attention.dense",
    "Encoder": "adaattn.encoder",
    "adapt": "adaattn.integrations.sdpa",
    "adaptive_attention": "adaattn.functional",
    "adaptive_sdpa": "adaattn.integrations.sdpa",
    "calibrate": "adaattn.calibration",
    "convert": "adaattn.conversion",
    "load": "adaattn.checkpoint",
    "save": "adaattn.checkpoint",
}

__all__ = [
    "AdaAttnError",
    "AdaptiveAttention",
    "AdaptivePrecisionAttention",
    "AdaptiveRankAttention",
    "Conversion",
    "DenseAttention",
    "Encoder",
    "adapt",
    "adaptive_attention",
    "adaptive_sdpa",
    "calibrate",
    "convert",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adaattn' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
