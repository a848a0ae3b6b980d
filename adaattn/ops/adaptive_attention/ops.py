"""Register `adaattn::adaptive_attention`: schema, shapes, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaattn.heads import per_query_head
from adaattn.ops.adaptive_attention.impl import dense, reference
from adaattn.ops.dispatch import takes_triton
from adaattn.ops.signatures import OPS


@torch.library.custom_op("adaattn::adaptive_attention", mutates_args=())
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
    impl: str = "auto",
) -> Tensor:
    """Attend as `adaattn.ops.adaptive_attention` says, without its checks."""
    run = dense.adaptive_attention if impl == "auto" else reference.adaptive_attention
    if takes_triton(impl, query):
        from adaattn.ops.adaptive_attention.impl import triton

        run = triton.adaptive_attention
    with torch.autocast(query.device.type, enabled=False):  # the plan alone says what may be rounded
        return run(query, key, value, key_mean, value_peak, precision, rank, attn_mask, scale, is_causal)


@adaptive_attention.register_fake
def _(
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
    impl: str = "auto",
) -> Tensor:
    return query.new_empty(query.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = OPS["adaptive_attention"].bound(inputs)
    ctx.scale, ctx.is_causal = given["scale"], given["is_causal"]
    ctx.save_for_backward(*(given[name] for name in ("query", "key", "value", "rank", "attn_mask")))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of the unrounded formula at the plan's rank; softmax does not see `key_mean`."""
    query, key, value, rank, attn_mask = ctx.saved_tensors
    compute = torch.promote_types(query.dtype, torch.float32)
    heads, head_dim, kv_heads = query.shape[1], query.shape[3], key.shape[1]

    p = reference.attention_weights(query, key, rank, attn_mask, ctx.scale, ctx.is_causal)
    g = grad.to(compute)
    k, v = (per_query_head(x.to(compute), heads) for x in (key, value))
    kept = torch.arange(head_dim, device=query.device) < rank[:, :, None, None]

    grad_p = g @ v.mT
    grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
    grad_query = torch.where(kept, (grad_scores @ k) * ctx.scale, 0)
    grad_key = grad_scores.mT @ torch.where(kept, query.to(compute) * ctx.scale, 0)
    grad_value = p.mT @ g
    grad_mask = None
    if ctx.needs_input_grad[OPS["adaptive_attention"].parameters.index("attn_mask")]:
        grad_mask = grad_scores.sum_to_size(attn_mask.shape).to(attn_mask.dtype)

    def per_kv_head(x: Tensor) -> Tensor:
        grouped: Tensor = x.unflatten(1, (kv_heads, heads // kv_heads))
        return grouped.sum(dim=2)

    grads = {"query": grad_query.to(query.dtype), "attn_mask": grad_mask}
    grads |= {"key": per_kv_head(grad_key).to(key.dtype), "value": per_kv_head(grad_value).to(value.dtype)}
    return tuple(grads.get(name) for name in OPS["adaptive_attention"].parameters)


adaptive_attention.register_autograd(_backward, setup_context=_setup_context)
