"""Exact attention in float64, and every tolerance of these tests: one place that says what counts as right.

Nothing here comes from adaattn, so that a mistake there cannot hide itself: numpy, its own softmax, masks and grouping.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]

# Measured error over the error model's prediction: DESIGN.md found 0.10 to 2.6 head by head.
MODEL = 3.0
# It is first order in the noise: a prediction above this says no more than that the plan is no good.
FIRST_ORDER = 0.5
# Float32 sums of n terms err by up to n times the unit roundoff; no shape here is longer than 129. The error model
# predicts what they typically err by, so a float32 result may err by this much more.
SUMS = 129 * 2.0**-24
# What the cast of the output to its own type adds: half a step, relative. The plan does not count it.
OUTPUT = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Float64 against float64: sums of at most 129 terms, in another order.
EXACT = 1e-12


def array(x: Tensor) -> Array:
    return x.detach().double().numpy()


def weights(q: Array, k: Array, mask: Tensor | None, causal: bool, scale: float) -> Array:
    """Probabilities (B, H, Sq, Sk); zeros for a query that may attend to nothing."""
    heads, kv_heads = q.shape[1], k.shape[1]
    # Query head h reads kv head h // (heads / kv_heads), as in scaled_dot_product_attention.
    k = np.stack([k[:, h // (heads // kv_heads)] for h in range(heads)], axis=1)
    scores = np.einsum("bhid,bhjd->bhij", q, k) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = np.where(np.broadcast_to(mask.numpy(), scores.shape), scores, -np.inf)
    elif mask is not None:
        scores = scores + array(mask)
    if causal:
        scores = np.where(np.tri(*scores.shape[2:], dtype=bool), scores, -np.inf)
    peak = scores.max(axis=-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(peak), peak, 0))
    total = p.sum(axis=-1, keepdims=True)
    return np.divide(p, total, out=np.zeros_like(p), where=total > 0)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Softmax attention of (B, H, Sq, D) over (B, Hk, Sk, D), float64; the mask broadcasts to (B, H, Sq, Sk)."""
    p = weights(array(q), array(k), mask, causal, q.shape[-1] ** -0.5 if scale is None else scale)
    heads, kv_heads = q.shape[1], v.shape[1]
    values = np.stack([array(v)[:, h // (heads // kv_heads)] for h in range(heads)], axis=1)
    return torch.from_numpy(p @ values)


def module(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and head-averaged weights that a module's own projections make, float64; mask of four axes."""

    def project(name: str, x: Array) -> Array:
        linear = getattr(layer, name)
        return x @ array(linear.weight).T + (0 if linear.bias is None else array(linear.bias))

    def heads(name: str, x: Tensor) -> Array:
        y = project(name, array(x))
        return y.reshape(*y.shape[:2], -1, layer.embed_dim // layer.num_heads).transpose(0, 2, 1, 3)

    q, k, v = heads("q_proj", query), heads("k_proj", key), heads("v_proj", value)
    p = weights(q, k, mask, layer.causal, q.shape[-1] ** -0.5)
    attended = p @ np.repeat(v, q.shape[1] // v.shape[1], axis=1)
    output = project("out_proj", attended.transpose(0, 2, 1, 3).reshape(*query.shape[:2], -1))
    return torch.from_numpy(output), torch.from_numpy(p.mean(axis=1))


def error(got: Tensor, want: Tensor) -> Tensor:
    """Root mean square of got − want over that of want, over the last two axes: one number a head."""
    difference = (got.double() - want).square().mean((-2, -1)).sqrt()
    size = want.square().mean((-2, -1)).sqrt()
    return torch.where(difference == 0, 0, difference / size)  # 0 for an output that is zero and must be, else inf


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _outliers(*shape: int) -> Tensor:
    return _normal(*shape) + 10 * _normal(*shape) * (torch.rand(*shape) < 1e-3)  # N(0,1) + N(0,100)·Bernoulli(0.001)


def _loud_tokens(*shape: int) -> Tensor:
    return _normal(*shape) * torch.where(_normal(*shape[:3], 1) > 2, 10, 1)


def _loud_channel(*shape: int) -> Tensor:
    return _normal(*shape) * torch.where(torch.arange(shape[-1]) == 3, 10, 1)


def _correlated(*shape: int) -> Tensor:
    return _normal(*shape[:-1], 2) @ _normal(2, shape[-1])


def _heavy(*shape: int) -> Tensor:
    return _normal(*shape) / _normal(*shape).abs().clamp_min(0.05)


Shape = tuple[int, int, int, int]


def silent_sink(q: Shape, k: Shape, width: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """One key 12 above the others and with no value, as language models park their attention, in `width` dimensions."""
    queries, keys, values = torch.zeros(q), torch.zeros(k), 1 + 0.1 * _normal(*k)
    queries[..., :width], keys[..., 0, :width], values[..., 0, :] = (q[3] / width) ** 0.5, 12 * width**-0.5, 0
    return queries, keys, values


# Name: q, k and v from their shapes.
DISTRIBUTIONS: dict[str, Callable[[Shape, Shape], tuple[Tensor, Tensor, Tensor]]] = {
    "normal": lambda q, k: (_normal(*q), _normal(*k), _normal(*k)),
    "outliers": lambda q, k: (_outliers(*q), _outliers(*k), _outliers(*k)),
    "peaked": lambda q, k: (4 * _normal(*q), 2 * _normal(*k), _normal(*k)),
    "biased keys": lambda q, k: (_normal(*q), _normal(*k) + 10 * _normal(*k[:2], 1, k[3]), _normal(*k)),
    "loud tokens": lambda q, k: (_loud_tokens(*q), _loud_tokens(*k), _loud_tokens(*k)),
    "loud channel": lambda q, k: (_loud_channel(*q), _loud_channel(*k), _loud_channel(*k)),
    "decaying": lambda q, k: (_normal(*q) * _decay(q), _normal(*k) * _decay(k), _normal(*k)),
    "correlated": lambda q, k: (_correlated(*q), _correlated(*k), _normal(*k)),
    "heavy tails": lambda q, k: (_heavy(*q), _heavy(*k), _heavy(*k)),
    "silent sink": silent_sink,
    "tiny": lambda q, k: (1e-20 * _normal(*q), 1e-20 * _normal(*k), 1e-20 * _normal(*k)),
    "tiny values": lambda q, k: (_normal(*q), _normal(*k), 1e-20 * _normal(*k)),
    "huge": lambda q, k: (1e15 * _normal(*q), 1e15 * _normal(*k), 1e15 * _normal(*k)),
    "huge values": lambda q, k: (_normal(*q), _normal(*k), 1e15 * _normal(*k)),
    "huge and tiny": lambda q, k: (1e15 * _normal(*q), 1e-15 * _normal(*k), _normal(*k)),
    "constant": lambda q, k: (torch.full(q, 0.7), torch.full(k, 0.7), torch.full(k, 0.7)),
    "zero": lambda q, k: (torch.zeros(q), torch.zeros(k), torch.zeros(k)),
}


def _decay(shape: Shape) -> Tensor:
    return 2.0 ** -(torch.arange(shape[3]) / 4)


def mask(kind: str, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    """Return a mask of four axes that leaves each query a key; "empty rows" leaves every third query none."""
    full = (batch, heads, queries, keys)
    if kind == "none":
        return None
    if kind == "additive":
        return 2 * torch.randn(batch, heads, 1, keys)
    if kind == "biased":  # additive with keys shut out
        return torch.where(mask("per query", *full), torch.randn(full), -torch.inf)
    allowed = torch.rand(batch, 1, 1, keys) < 0.7 if kind == "padding" else torch.rand(full) < 0.5
    allowed[..., 0] = True
    if kind == "empty rows":
        allowed[:, :, ::3] = False
    return allowed


MASKS = ("none", "padding", "per query", "additive", "biased", "empty rows")
