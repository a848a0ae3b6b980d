"""Build the model of `make demo`: a causal encoder of four layers with every kind of attention.

python examples/demo_model.py model.pt
"""

import sys
from pathlib import Path

import torch

import adaattn

torch.manual_seed(0)
path = Path(sys.argv[1] if len(sys.argv) > 1 else "model.pt")
path.parent.mkdir(parents=True, exist_ok=True)

encoder = adaattn.Encoder(
    embed_dim=128,
    num_heads=8,
    layers=("dense", "adaptive_precision", "adaptive_rank", "adaptive"),
    causal=True,
)
adaattn.save(
    encoder.eval(),
    path,
    inputs={"x": "B,S,128:float32", "attention_mask": "B,S:bool"},
    dims={"B": "1:2:8", "S": "1:128:512"},
)
print(f"{path}: {sum(p.numel() for p in encoder.parameters())} parameters")
