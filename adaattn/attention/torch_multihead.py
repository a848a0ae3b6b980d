"""Define the drop-in replacement of `torch.nn.MultiheadAttention` that `adaattn.convert` inserts.

Masks follow torch's convention for that module: True masks the key.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adaattn.attention.base import AttentionBase
from adaattn.checks import as_bool, check_instance
from adaattn.errors import ConfigError, ShapeError
from adaattn.tensor_checks import check_device, check_mask, check_tensor


class MultiheadAttention(nn.Module):
    """Attend with a module of this package under the signature of `torch.nn.MultiheadAttention`.

    Args:
        attention: the module that attends; not causal by itself, as torch's is not.
        batch_first: whether inputs are (batch, tokens, width) rather than (tokens, batch, width).

    Example:
        >>> layer = MultiheadAttention(AdaptiveAttention(64, 4), batch_first=True)
        >>> x = torch.randn(2, 10, 64)
        >>> output, weights = layer(x, x, x, key_padding_mask=torch.zeros(2, 10, dtype=torch.bool))
        >>> output.shape, weights.shape
        (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
    """

    # What torch's encoder layer and encoder read to choose their fused kernels, which call no module: these two values
    # turn those off, as for a layer without bias whose keys have another width.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: AttentionBase, batch_first: bool = False) -> None:
        super().__init__()
        check_instance("attention", attention, AttentionBase, "an attention module of this package")
        self.attention, self.batch_first = attention, as_bool("batch_first", batch_first)
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query over key and value, as in `torch.nn.MultiheadAttention.forward`.

        Args:
            query, key, value: (batch, tokens, width) if batch_first, else (tokens, batch, width); or (tokens, width).
            key_padding_mask: (batch, keys), or (keys) without a batch: True masks the key, a float is added.
            attn_mask: (queries, keys) or (batch·heads, queries, keys): the same for single scores.
            need_weights: also return the attention weights, at a cost.
            average_attn_weights: over heads.
            is_causal: says that `attn_mask` is causal. A hint: the mask decides, so it cannot be without one.

        Returns:
            The output, of the query's shape, and the weights (batch, queries, keys), (batch, heads, queries, keys) if
            not averaged, or None. A query that may attend to nothing attends to zeros, where torch gives NaN. In
            training the weights are those before dropout, where torch gives those after.

        Raises:
            ConfigError: `is_causal` without a mask.
            ShapeError, DtypeError, DeviceError: inputs or masks that do not go together.
        """
        need_weights = as_bool("need_weights", need_weights)
        average_attn_weights = as_bool("average_attn_weights", average_attn_weights)
        if as_bool("is_causal", is_causal) and attn_mask is None:
            raise ConfigError("is_causal says that attn_mask is causal, but attn_mask is None; give attn_mask too")
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_tensor(name, x)
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None:
                check_tensor(name, mask)
                check_device(name, mask, query.device)
        axes = query.dim()
        if axes not in (2, 3) or key.dim() != axes or value.dim() != axes:
            raise ShapeError(
                f"query, key and value have {axes}, {key.dim()} and {value.dim()} axes; expected 3 each, or 2 each "
                "without a batch"
            )
        if axes == 2:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)

        scores = (query.shape[0], self.num_heads, query.shape[1], key.shape[1])
        mask = merge_masks(key_padding_mask, attn_mask, scores, query.dtype)
        wanted = "per head" if need_weights and not average_attn_weights else need_weights
        output, weights = self.attention(query, key, value, mask, wanted)
        if axes == 2:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights


def _check(name: str, mask: Tensor, *shapes: Mapping[str, int]) -> None:
    """Check a mask in torch's convention, which does not broadcast."""
    check_mask(name, mask, *shapes, true="is masked", broadcasts=False)


def merge_masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, scores: tuple[int, int, int, int], dtype: torch.dtype
) -> Tensor | None:
    """Merge torch's two masks into one with four axes: boolean (True attends) if both are, else added to the scores.

    Args:
        key_padding_mask: (batch, keys).
        attn_mask: (queries, keys) or (batch·heads, queries, keys).
        scores: (batch, heads, queries, keys).
        dtype: of the additive mask that a boolean one becomes beside an additive one.

    Raises:
        ShapeError, DtypeError: a mask of another shape or type.
    """
    batch, heads, queries, keys = scores
    masks = []
    if key_padding_mask is not None:
        _check("key_padding_mask", key_padding_mask, {"batch": batch, "keys": keys})
        masks.append(key_padding_mask[:, None, None, :])
    if attn_mask is not None:
        scores_of_heads = {"batch·heads": batch * heads, "queries": queries, "keys": keys}
        _check("attn_mask", attn_mask, {"queries": queries, "keys": keys}, scores_of_heads)
        masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads)))
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        masked = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~masked
    added = [
        torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]
