"""Compute the basis in which queries and keys need the fewest dimensions, and fold it into the weights.

For one head take L with Lq·Lqᵀ = E[qᵀq] and Lk·Lkᵀ = Cov[k], rows being tokens. The mean square of the scores, keys
centred, is ‖Lqᵀ·Lk‖²; by the singular values Lqᵀ·Lk = U·S·Vᵀ no r dimensions hold more of it than the first r of

    q' = q·A,   k' = k·A⁻ᵀ,   A = Lq⁻ᵀ·U·S^½        (Eckart and Young, Psychometrika 1936)

in which E[q'ᵀq'] = Cov[k'] = S, while q'·k'ᵀ = q·kᵀ exactly. It is what control theory calls a balanced realisation
(Moore, IEEE TAC 1981). Any square root L will do: with the eigenvectors E and roots λ, L = E·λ, A and A⁻¹ are products
of orthogonal matrices and scalings, and never solve a system of equations.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from adaattn.calibration.projections import QueryKeyProjections

# Variances below this share of a head's largest count as this much, for data that are few or constant in a direction.
# A·Aᵀ is the geometric mean of Lq⁻ᵀ·Lq⁻¹ and Lk·Lkᵀ, so the condition of A is at most FLOOR^-½. What it costs to round
# the folded weights does not depend on it: tests find the error of a few float32 roundings on any data.
FLOOR = 1e-8
# Keys whose variance is below this share of their mean square are constant: float32's own rounding looks like that.
CONSTANT = 1e-12


@dataclass(eq=False)
class SecondMoments:
    """Sums over tokens, in float64 on the CPU: they do not grow with the data, and add up in any portions."""

    query: Tensor  # (H, D, D), of qᵀq
    queries: Tensor  # (1,), tokens
    key: Tensor  # (Hk, D, D), of kᵀk about the mean of each batch entry, over the tokens attended to
    keys: Tensor  # (Hk,), tokens
    key_power: Tensor  # (Hk,), of |k|², about no mean

    @classmethod
    def zeros(cls, pair: QueryKeyProjections) -> SecondMoments:
        """Return the second moments of no tokens."""

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64)

        heads, kv_heads, dim = pair.num_heads, pair.num_kv_heads, pair.head_dim
        return cls(zeros(heads, dim, dim), zeros(1), zeros(kv_heads, dim, dim), zeros(kv_heads), zeros(kv_heads))

    def add(self, q: Tensor, k: Tensor, attended: Tensor | None) -> None:
        """Count q (B, H, Sq, D) and k (B, Hk, Sk, D); attended is boolean (B or 1, Hk or 1, Sk), or None for all."""
        q, k = q.double(), k.double()
        counts = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=k.device) if attended is None else attended[..., None]
        counts = counts.expand(*k.shape[:3], 1)
        tokens = counts.sum(2)
        k = torch.where(counts, k, 0)
        centred = torch.where(counts, k - (k.sum(2) / tokens.clamp_min(1)).unsqueeze(2), 0)
        self.query += _gram(q)
        self.queries += q.shape[0] * q.shape[2]
        self.key += _gram(centred)
        self.keys += tokens.sum((0, 2)).cpu()
        self.key_power += k.square().sum((0, 2, 3)).cpu()

    def means(self) -> tuple[Tensor, Tensor]:
        """Return E[qᵀq] (H, D, D) and Cov[k] (Hk, D, D)."""
        return self.query / self.queries[:, None, None], self.key / self.keys.clamp_min(1)[:, None, None]

    def state(self) -> dict[str, Tensor]:
        """Return the sums by name, as a state file keeps them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _gram(x: Tensor) -> Tensor:
    rows = x.transpose(0, 1).flatten(1, 2)
    return (rows.mT @ rows).cpu()


def balance(moments: SecondMoments) -> tuple[Tensor, Tensor]:
    """Return a and A⁻¹ (Hk, D, D) of each key head, from the pooled queries of all heads that use it, float64.

    A head whose queries are zero or whose keys are constant has no energy to gather, and keeps its basis.
    """
    kv_heads, dim = moments.key.shape[:2]
    each_query, key = moments.means()
    query = each_query.unflatten(0, (kv_heads, -1)).mean(1)
    power = moments.key_power / moments.keys.clamp_min(1)
    known = ((_trace(query) > 0) & (_trace(key) > CONSTANT * power))[:, None, None]
    one = torch.eye(dim, dtype=torch.float64).expand_as(key)
    query, key = torch.where(known, query, one), torch.where(known, key, one)

    (q_roots, q_vectors), (k_roots, k_vectors) = _root(query), _root(key)
    q_factor, k_factor = q_vectors * q_roots.unsqueeze(-2), k_vectors * k_roots.unsqueeze(-2)
    left, singular, _ = torch.linalg.svd(q_factor.mT @ k_factor)
    roots = singular.sqrt()
    transform = (q_vectors / q_roots.unsqueeze(-2)) @ left * roots.unsqueeze(-2)
    inverse = (q_factor @ left / roots.unsqueeze(-2)).mT
    return torch.where(known, transform, one), torch.where(known, inverse, one)


def _root(moment: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment)
    return torch.maximum(values, values[..., -1:] * FLOOR).sqrt(), vectors


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def energies(moments: SecondMoments, scale: float, transform: Tensor, inverse: Tensor) -> Tensor:
    """Return w_d = scale²·E[q'_d²]·E[k'_d²] of each query head in the new basis, (H, D), k' centred."""
    group = moments.query.shape[0] // moments.key.shape[0]
    query, key = moments.means()
    a = transform.repeat_interleave(group, 0)
    q_energy = (a.mT @ query @ a).diagonal(dim1=-2, dim2=-1)
    k_energy = (inverse @ key @ inverse.mT).diagonal(dim1=-2, dim2=-1).repeat_interleave(group, 0)
    return scale * scale * q_energy * k_energy


@torch.no_grad()
def fold(pair: QueryKeyProjections, transform: Tensor, inverse: Tensor) -> bool:
    """Write the new basis into the projections: computed in float64, then rounded to the type of the weights.

    Returns:
        False, with nothing changed, where a weight would not be finite in its type.
    """
    of_query = transform.mT.repeat_interleave(pair.num_heads // pair.num_kv_heads, 0)
    changed = [*_folded(pair.query, of_query), *_folded(pair.key, inverse)]
    if any(bool((after.isinf() | after.isnan())[before.isfinite()].any()) for before, after in changed):
        return False
    for before, after in changed:
        before.copy_(after)
    return True


def _folded(linear: nn.Linear, matrices: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return each weight of a projection, such that its output is multiplied by a head's matrix, transposed."""
    folded = list[tuple[Tensor, Tensor]]()
    for parameter in linear.parameters():
        heads = parameter.detach().to("cpu", torch.float64).reshape(*matrices.shape[:2], -1)
        folded.append((parameter, (matrices @ heads).reshape(parameter.shape).to(parameter)))
    return folded
