"""Match the attention of transformers that calibration can change: separate projections, and nothing after them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from adaattn.calibration.projections import QueryKeyProjections
from adaattn.integrations.transformers.registry import takes_implementations
from adaattn.masks import attended_keys

NAMES = (("query", "key"), ("q_proj", "k_proj"), ("q_lin", "k_lin"), ("q", "k"))
WIDTHS = ("attention_head_size", "head_dim", "key_value_proj_dim")


def match_attention(module: nn.Module) -> QueryKeyProjections | str | None:
    """Match the attention modules of transformers.

    Their code says whether the embedding of positions is rotary: such keys are turned after their projection, and no
    basis of a projection commutes with that.
    """
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return None
    children = dict(module.named_children())
    projections = next(((children[q], children[k]) for q, k in NAMES if {q, k} <= children.keys()), None)
    if not takes_implementations(module):
        return "it does not dispatch through transformers' AttentionInterface"
    try:
        code = inspect.getsource(type(module).forward)
    except (OSError, TypeError):  # a class that was typed into a shell, or code without its source
        return None if projections is None else "its source is not here to be read"
    if "ALL_ATTENTION_FUNCTIONS" not in code:  # a layer or a model, which has attention in it
        return None
    if "rotary" in code.lower():
        return "rotary embedding turns its queries and keys after their projections, which no basis commutes with"
    if any(name.endswith(("q_norm", "k_norm", "query_norm", "key_norm")) for name, _ in module.named_children()):
        return "its queries and keys are normalised after their projections"
    query, key = projections or (None, None)
    if not isinstance(query, nn.Linear) or not isinstance(key, nn.Linear):
        return "its queries and keys share a projection, or have one of a kind that is not known here"
    width = next((getattr(module, name) for name in WIDTHS if isinstance(getattr(module, name, None), int)), None)
    if width is None:
        return "it does not say how wide its heads are"
    heads, kv_heads = query.out_features // width, key.out_features // width

    def attended(arguments: Mapping[str, Any], batch: int, queries: int, keys: int) -> Tensor | None:
        mask = next((x for name in ("attention_mask", "mask") if (x := arguments.get(name)) is not None), None)
        return attended_keys(mask, kv_heads) if isinstance(mask, Tensor) and mask.dim() == 4 else None

    return QueryKeyProjections(
        module, query, key, heads, kv_heads, width, getattr(module, "scaling", width**-0.5), attended
    )
