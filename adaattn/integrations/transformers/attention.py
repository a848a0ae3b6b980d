"""Define the attention and mask functions that transformers calls."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from adaattn.errors import ConfigError
from adaattn.functional import adaptive_attention, chooses_as_exported, in_autocast_type
from adaattn.integrations.transformers.registry import SETTING
from adaattn.planning.budget import Budget

# So many queries share one read of the keys and values in the fused kernels. Fewer are bound by that read, which
# adaptive attention does twice: once for its statistics. So it cannot win there, whatever it saves in products.
DENSE_BELOW = 64

REFUSED = {
    "softcap": "a cap on the scores (softcap)",
    "s_aux": "attention sinks (s_aux)",
    "sinks": "attention sinks",
    "head_mask": "head_mask",
    "output_attentions": "output_attentions: fused attention has no weights to show",
    "cu_seq_lens_q": "packed sequences (cu_seq_lens_q)",
    "cu_seq_lens_k": "packed sequences (cu_seq_lens_k)",
    "indices": "keys chosen by an index (indices)",
    "block_indices": "keys chosen by an index (block_indices)",
    "sliding_window": "a window of keys (sliding_window) without a mask that says so",
}
_checked: set[type] = set()  # configs whose models dispatch through AttentionInterface


def attention_mask(sdpa_mask: Any, *arguments: Any, **options: Any) -> Tensor | None:
    """Return the mask of transformers' `sdpa`: boolean, of causality, windows and padding alike.

    In eager mode there is no mask where nothing is padded and `is_causal` suffices; a program always has one.
    """
    config = type(options.get("config"))
    if config not in _checked and not torch.compiler.is_dynamo_compiling():
        _check_code(config)
        _checked.add(config)
    mask: Tensor | None = sdpa_mask(*arguments, **options)
    return mask


def _check_code(config: type) -> None:
    """Raise ConfigError where a model does not dispatch through AttentionInterface: it would take the mask alone.

    Transformers asks no model whether its code calls the registered function. Its own test, before an implementation is
    changed, is to look for the call beside the attention classes, as here.
    """
    package = config.__module__.rpartition(".")[0]
    for name, code in list(sys.modules.items()):
        if not name.startswith(f"{package}.modeling_") or hasattr(code, "ALL_ATTENTION_FUNCTIONS"):
            continue
        own = [cls for cls in vars(code).values() if isinstance(cls, type) and cls.__module__ == name]
        if any("Attention" in cls.__name__ and cls.__base__ is nn.Module for cls in own):
            raise ConfigError(
                f"{name.rpartition('.')[2]} of this transformers does not dispatch through transformers' "
                'AttentionInterface; use attn_implementation="eager" for its models, or a newer transformers'
            )


def attend(
    budget: Budget,
    dense_below: int,
    dense: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers calls it: q (B, H, Sq, D), k and v (B, Hk, Sk, D) to (B, Sq, H, D), without weights.

    A mask says all; without one, `is_causal` does.
    """
    # The sizes of a program are symbols: a question about them would become a guard.
    sizes = None if torch.compiler.is_exporting() else (query.shape[2], key.shape[2])
    window = options.pop("sliding_window", None)
    if window is not None and attention_mask is None and (sizes is None or sizes[1] > window):
        options["sliding_window"] = window  # else the mask shows it, or it shows all keys
    _refuse(module, options)
    short = sizes is not None and not chooses_as_exported() and sizes[0] < min(dense_below, sizes[1])
    if dropout > 0 or short:
        operands = (module, query, key, value, attention_mask, dropout, scaling, is_causal)
        return dense(*operands, position_bias=position_bias, **options)[0], None
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = bool(is_causal) and attention_mask is None
    if is_causal and sizes is not None and sizes[0] < sizes[1]:
        if sizes[0] == 1:  # the newest token sees all before it
            is_causal = False
        else:  # a prompt in a static cache, whose end is still empty
            key, value = key[:, :, : sizes[0]], value[:, :, : sizes[0]]
            position_bias = None if position_bias is None else position_bias[..., : sizes[0]]
    query, key, value = in_autocast_type(query, key, value)  # rotary embedding leaves q and k in float32
    output = adaptive_attention(
        query,
        key,
        value,
        _biased(attention_mask, position_bias),
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=True,
        tolerance=getattr(module.config, SETTING, budget.tolerance),
        safety=budget.safety,
        precisions=budget.precisions,
        low_rank=budget.low_rank,
    )
    return output.transpose(1, 2).contiguous(), None


def _biased(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Return the mask with a bias on the scores, as of T5, in it."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def _refuse(module: nn.Module, options: dict[str, Any]) -> None:
    """Raise ConfigError for an option of the model's attention that AdaAttn does not have."""
    options = {"output_attentions": getattr(module.config, "output_attentions", False)} | options
    given = {name for name, option in options.items() if option is not None and option is not False}
    wanted = [reason for name, reason in REFUSED.items() if name in given]
    if wanted:
        raise ConfigError(
            f"{type(module).__name__} asks for {wanted[0]}, which adaptive attention does not have; use "
            'attn_implementation="eager" for this model, or leave the option out'
        )
