"""Define attention without approximation, the baseline of the adaptive modules."""

from __future__ import annotations

from torch import Tensor

from adaattn.attention.base import AttentionBase
from adaattn.ops.adaptive_attention.impl.dense import dense_attention


class DenseAttention(AttentionBase):
    """Multi-head attention by `scaled_dot_product_attention`; an export keeps it a standard layer.

    Args:
        embed_dim: width of query and output.
        num_heads: query heads; embed_dim must be a multiple of it.
        dropout: of the attention weights, in training only.
        causal: query i attends to keys j ≤ i.
        bias: whether the four projections have one.
        kdim, vdim: widths of key and value; embed_dim by default.
        num_kv_heads: key and value heads (grouped-query attention); num_heads by default.

    Example:
        >>> attention = DenseAttention(64, 4)
        >>> x = torch.randn(2, 10, 64)
        >>> output, weights = attention(x, x, x, need_weights=True)
        >>> output.shape, weights.shape
        (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))

    Raises:
        ConfigError: an argument out of range.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        causal: bool = False,
        *,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, causal, bias, kdim, vdim, num_kv_heads)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return dense_attention(q, k, v, mask, self.causal, self.scale), None
