"""Register `adaattn::token_moments`: schema, shapes, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaattn.ops.dispatch import takes_triton
from adaattn.ops.signatures import OPS
from adaattn.ops.token_moments.impl import reference
from adaattn.planning.error_model import Moments


@torch.library.custom_op("adaattn::token_moments", mutates_args=())
def token_moments(
    x: Tensor, key_mask: Tensor | None, center: bool, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the moments that `adaattn.ops.token_moments` describes, without its checks."""
    if takes_triton(impl, x):
        from adaattn.ops.token_moments.impl import triton

        return triton.token_moments(x, key_mask, center)
    return reference.token_moments(x, key_mask, center)


@token_moments.register_fake
def _(x: Tensor, key_mask: Tensor | None, center: bool, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, _, head_dim = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    per_dim = [x.new_empty(batch, heads, head_dim, dtype=dtype) for _ in range(3)]
    return per_dim[0], per_dim[1], per_dim[2], x.new_empty(batch, heads, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = OPS["token_moments"].bound(inputs)
    ctx.center = given["center"]
    ctx.save_for_backward(given["x"], given["key_mask"], Moments(*output).mean)


def _backward(
    ctx: Any, mean: Tensor, second: Tensor, channel: Tensor, token: Tensor
) -> tuple[Tensor, None, None, None]:
    """Return the gradient of the formula; a peak's goes to the elements that reach it in equal parts, as in `amax`."""
    x, key_mask, mean_of_x = ctx.saved_tensors
    y = x.to(mean.dtype)
    attended = y.new_ones(1, 1, 1, 1) if key_mask is None else key_mask.to(y.dtype).unsqueeze(-1)
    attended = attended.expand(y.shape[0], y.shape[1], y.shape[2], 1)
    tokens = attended.sum(dim=2, keepdim=True).clamp_min(1)
    if ctx.center:
        y = y - mean_of_x.unsqueeze(2)
    y = torch.where(attended > 0, y, 0)

    grad = y * (2 / tokens) * second.unsqueeze(2)
    for dim, upstream in ((2, channel.unsqueeze(2)), (3, (2 / tokens) * token[..., None, None])):
        peak = y.abs().amax(dim, keepdim=True)
        at_peak = ((y.abs() == peak) & (attended > 0)).to(y.dtype)
        share = at_peak / at_peak.sum(dim, keepdim=True).clamp_min(1)
        grad = grad + share * y.sign() * upstream * (1 if dim == 2 else peak)
    if ctx.center:
        grad = grad - (grad * attended).sum(dim=2, keepdim=True) / tokens
    grad = (grad + mean.unsqueeze(2) / tokens) * attended
    return grad.to(x.dtype), None, None, None


token_moments.register_autograd(_backward, setup_context=_setup_context)
