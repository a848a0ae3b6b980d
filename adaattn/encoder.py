"""Define a pre-norm Transformer encoder with any kind of attention: a complete model to save, export and measure."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from adaattn.attention.base import AttentionBase, PlannedAttention, check_tokens
from adaattn.attention.kinds import ATTENTION
from adaattn.checks import as_bool, as_int, as_names
from adaattn.input_spec import InputSpec
from adaattn.planning.budget import as_tolerance


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: AttentionBase) -> None:
        super().__init__()
        width = attention.embed_dim
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map x (batch, tokens, width) to the same shape; the mask is as in the attention modules."""
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed, normed, attention_mask)[0]
        output: Tensor = x + self.mlp(self.mlp_norm(x))
        return output


class Encoder(nn.Module):
    """Encoder whose layers each name their attention.

    Args:
        embed_dim, num_heads, causal: as in `DenseAttention`.
        layers: one of "dense", "adaptive_precision", "adaptive_rank", "adaptive" for each layer.
        tolerance: of all adaptive layers; without one each module's own default.

    Example:
        >>> encoder = Encoder(64, 4, layers=("dense", "adaptive"), causal=True)
        >>> encoder(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])

    Raises:
        ConfigError: an argument out of range.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        layers: Sequence[str] = ("adaptive",) * 4,
        causal: bool = False,
        *,
        tolerance: float | None = None,
    ) -> None:
        super().__init__()
        self.layers = as_names("layers", layers, ATTENTION)
        self.embed_dim = as_int("embed_dim", embed_dim, "a width of at least 1")
        self.num_heads = as_int("num_heads", num_heads, "a number of heads of at least 1")
        self.causal = as_bool("causal", causal)
        self.tolerance = None if tolerance is None else as_tolerance(tolerance)
        self.stack = nn.ModuleList(EncoderLayer(self._attention(name)) for name in self.layers)
        self.norm = nn.LayerNorm(self.embed_dim)

    def _attention(self, name: str) -> AttentionBase:
        attention = ATTENTION[name](self.embed_dim, self.num_heads, causal=self.causal)
        if self.tolerance is not None and isinstance(attention, PlannedAttention):
            attention.set_tolerance(self.tolerance)
        return attention

    def input_specs(self) -> tuple[InputSpec, ...]:
        """Return the input of an export: x of B×S tokens."""
        return (InputSpec("x", ("B", "S", self.embed_dim)),)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map x (batch, tokens, embed_dim) to the same shape; the mask is as in the attention modules.

        Raises:
            ShapeError, DtypeError, DeviceError: inputs that do not go together.
        """
        check_tokens("x", x, self.embed_dim, self.norm)
        for layer in self.stack:
            x = layer(x, attention_mask)
        output: Tensor = self.norm(x)
        return output
