"""The modules, and what each of them did: dense, adaptive precision, adaptive rank, both, cross-attention, masks.

python examples/basic_usage.py
"""

import copy

import torch

import adaattn
from adaattn.attention.adaptive_precision import AdaptivePrecisionAttention
from adaattn.attention.adaptive_rank import AdaptiveRankAttention
from adaattn.attention.dense import DenseAttention

torch.manual_seed(0)
EMBED, HEADS = 256, 4
x = torch.randn(2, 200, EMBED)


def error(attention, *inputs, **options):
    """Relative error of a module's output on this device, against the same weights, dense, in float64."""
    exact = DenseAttention(EMBED, HEADS, causal=attention.causal).double()
    exact.load_state_dict({n: p.double() for n, p in attention.state_dict().items() if n in exact.state_dict()})
    with torch.no_grad():
        got = attention.eval()(*inputs, **options)[0]
        want = exact.eval()(*(i.double() for i in inputs), **options)[0]
    return float((got - want).norm() / want.norm())


print("dense")
dense = DenseAttention(EMBED, HEADS, causal=True)
output, weights = dense(x, x, x, need_weights=True)
print(f"  output {tuple(output.shape)}, weights {tuple(weights.shape)}, error {error(dense, x, x, x):.1e}")

print(
    "adaptive precision: each head as cheap as the tolerance allows; a CPU, which gains nothing by it, rounds nothing"
)
for tolerance in (1e-4, 1e-3, 1e-2, 1e-1):
    attention = AdaptivePrecisionAttention(EMBED, HEADS, tolerance=tolerance)
    measured = error(attention, x, x, x)
    found = attention.get_precision_statistics()
    chosen = ", ".join(f"{name} {part:.0%}" for name, part in found["share"].items() if part)
    predicted = max(found["predicted_error"])
    print(f"  tolerance {tolerance:.0e}: {chosen}; predicted {predicted:.1e}, error here {measured:.1e}")

print("adaptive rank: heads whose energy lies in few dimensions")
attention = AdaptiveRankAttention(EMBED, HEADS, rank_ratio=0.5, rank_estimation_method="entropy")
narrow = copy.deepcopy(attention)
with torch.no_grad():  # make the last three quarters of each head's dimensions quiet, as calibration does
    quiet = torch.tensor([1.0] * 16 + [1e-2] * 48).repeat(HEADS)
    for projection in (narrow.q_proj, narrow.k_proj):
        projection.weight.mul_(quiet[:, None])
        projection.bias.mul_(quiet)
for name, module in (("spread energy", attention), ("gathered energy", narrow)):
    measured = error(module, x, x, x)
    print(f"  {name}: mean rank {module.get_rank_statistics()['mean_rank']:.0f} of 64; error {measured:.1e}")

print("both, within one tolerance")
both = adaattn.AdaptiveAttention(EMBED, HEADS, policy="balanced")
both.load_state_dict(narrow.state_dict())
measured = error(both, x, x, x)
print(f"  mean rank {both.get_rank_statistics()['mean_rank']:.0f}, error {measured:.1e}")

print("cross-attention: 7 queries over 200 keys, grouped key heads")
cross = adaattn.AdaptiveAttention(EMBED, HEADS, num_kv_heads=2, tolerance=1e-2)
output, weights = cross(torch.randn(2, 7, EMBED), x, x, need_weights=True)
print(f"  output {tuple(output.shape)}, weights {tuple(weights.shape)}")

print("masks: the second sequence has 50 tokens, the rest is padding")
mask = torch.arange(200) < torch.tensor([[200], [50]])
output, weights = both(x, x, x, attention_mask=mask, need_weights=True)
print(f"  weight on padding {weights[1, :, 50:].sum():.0f}, error {error(both, x, x, x, attention_mask=mask):.1e}")
