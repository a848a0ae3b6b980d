"""A GPT as people write it: embeddings, blocks that call `scaled_dot_product_attention`, a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A causal block of width 32 with 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])
        self.qkv, self.out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32, bias=False)
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, 32) to the same shape."""
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(self.norms[0](x)).split(32, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        z: Tensor = x + self.mlp(self.norms[1](x))
        return z


class GPT(nn.Module):
    """Two blocks over a vocabulary of 99."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(99, 32), nn.Embedding(32, 32)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, S) to logits (B, S, 99)."""
        x = self.blocks(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        return F.linear(self.norm(x), self.words.weight)
