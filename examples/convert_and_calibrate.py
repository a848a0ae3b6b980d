"""Convert a model with torch's attention, and calibrate it with sample data.

python examples/convert_and_calibrate.py

The model is untrained, and its tokens are made up: most of their variance lies in few directions, which the raw
dimensions of a head do not follow.
"""

import copy

import torch
from torch import nn

import adaattn

torch.manual_seed(0)
WIDTH, HEADS = 128, 4
basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
deviations = 2.0 ** (3 - torch.arange(WIDTH) / 4)


def tokens(batch, length):
    return torch.randn(batch, length, WIDTH) * deviations @ basis


def measure(model, exact, x):
    """Mean rank over all heads, and the relative error of the model's output against float64."""
    with torch.no_grad():
        got, want = model(x), exact(x.double())
    attentions = [m for m in model.modules() if isinstance(m, adaattn.AdaptiveAttention)]
    ranks = [m.get_rank_statistics()["mean_rank"] for m in attentions]
    return sum(ranks) / len(ranks), float((got - want).norm() / want.norm())


layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 256, batch_first=True, norm_first=True)
original = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
exact, fresh = copy.deepcopy(original).double(), tokens(2, 200)

print("converted")
for record in adaattn.convert(copy.deepcopy(original)):
    print(f"  {record.name}: {record.reason or 'replaced'}")

print(f"calibrated: mean rank of {WIDTH // HEADS} and error of the output, on other tokens")
for tolerance in (1e-3, 1e-2, 5e-2):
    model = copy.deepcopy(original)
    adaattn.convert(model, adaattn.Conversion(tolerance=tolerance))
    before = measure(model, exact, fresh)
    result = adaattn.calibrate(model, (tokens(4, 128) for _ in range(10)))
    after = measure(model, exact, fresh)
    print(f"  {tolerance:.0e}: rank {before[0]:.1f} -> {after[0]:.1f}, error {before[1]:.1e} -> {after[1]:.1e}")

print("energy: the rank that holds 99 % of each head's")
for name, spectrum in result.layers.items():
    before, after = spectrum.ranks(0.99)
    print(f"  {name}: {before} -> {after}")
