"""Models as people write them, with masks and sizes in the forms that they usually have."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LONGEST, WORDS = 16, 2, 64, 50


class CausalAttention(nn.Module):
    """As nanoGPT has it: a buffer of ones below the diagonal, cut to the length."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.ones(LONGEST, LONGEST).tril().view(1, 1, LONGEST, LONGEST))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (y.view(batch, tokens, HEADS, width // HEADS).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :tokens, :tokens] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, tokens, width))


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.attention, self.ln = CausalAttention(), nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        _, t = idx.size()
        assert t <= LONGEST, f"Cannot forward sequence of length {t}, block size is only {LONGEST}"
        x = self.wte(idx) + self.wpe(torch.arange(0, t, dtype=torch.long, device=idx.device))
        x = self.ln(x + self.attention(x))
        return self.lm_head(x if targets is not None else x[:, [-1], :])


class ViT(nn.Module):
    """As torchvision has it: patches by a convolution, a class token, learned positions, norms first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.ln_1, self.ln_2, self.ln = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        torch._assert(h == 32, f"Wrong image height! Expected 32 but got {h}!")
        x = self.conv_proj(x).reshape(n, WIDTH, (h // 8) * (w // 8)).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1) + self.pos_embedding
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return self.head(self.ln(x + self.mlp(self.ln_2(x)))[:, 0])


class PaddedEncoder(nn.Module):
    """torch's own encoder; its mask is True where a token is padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return self.encoder(src, src_key_padding_mask=src_key_padding_mask)


class BroadcastMask(nn.Module):
    """One boolean mask (B, 1, 1, S) for all heads and queries, and causal rows of a buffer beside it."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("mask", torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril())

    def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        length = x.shape[1]
        earlier = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:length, :length])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask), earlier


class OnesAndZeros(nn.Module):
    """A mask of numbers, 1 where there is a token, as older models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + (1.0 - mask[:, None, None, :]) * -10000.0
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Ordinary:
    """A model, its inputs as a user describes them, and the sizes of which it is exported by default."""

    model: type[nn.Module]
    inputs: dict[str, str]
    dims: dict[str, str] = field(default_factory=dict)

    def build(self) -> nn.Module:
        torch.manual_seed(3)
        return self.model().eval()


ORDINARY = {
    "nanoGPT": Ordinary(NanoGPT, {"idx": f"B,S:int64<{WORDS}"}, {"B": "1:1:8", "S": f"1:{LONGEST}:{LONGEST}"}),
    "ViT": Ordinary(ViT, {"x": "N,3,32,32"}, {"N": "1:1:8"}),
    "padded encoder": Ordinary(
        PaddedEncoder, {"src": f"B,S,{WIDTH}", "src_key_padding_mask": "B,S:bool"}, {"B": "1:1:8", "S": "1:128:512"}
    ),
    "broadcast mask": Ordinary(
        BroadcastMask,
        {"x": f"B,S,{WIDTH}", "attention_mask": "B,1,1,S:bool"},
        {"B": "1:1:8", "S": f"1:{LONGEST}:{LONGEST}"},
    ),
    "ones and zeros": Ordinary(OnesAndZeros, {"x": f"B,S,{WIDTH}", "mask": "B,S"}, {"B": "1:1:8", "S": "1:128:512"}),
}
