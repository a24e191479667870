"""SpectralFT: low-rank changes of the top singular vectors themselves.

    W' = W - U S V^T + (U + A_u B_u) S (V + A_v B_v)^T,    U S V^T the p largest singular triplets of W

The rest of the spectrum is kept; the published code drops it. Both large products cancel: what is computed is the
difference [U S B_v^T, A_u] [A_v^T; B_u S (V + A_v B_v)^T] of rank 2 r (maps/thin.py).

Structure: product of changed singular vectors. Start: W. Trained: A_u (m, r), A_v (n, r), B_u, B_v (r, p) = 0 at the
start; r (m + n + 2 p) numbers.

Source: Li et al. 2025, "Spectral-Aware Low-Rank Adaptation for Speaker Verification", after Zhang and Pilanci 2024,
"Spectral Adapter: Fine-Tuning in Spectral Space"; p = 256, r = 16.
"""

import torch
from torch import nn

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.maps import Dense, Diagonal, LowRank, Product, Sum
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def spectralft(*, rank: int = 16, top: int = 256) -> Recipe:
    """Low-rank changes of the top singular vectors.

    Args:
        rank: r, of the changes.
        top: p, singular vectors that change; all of a layer that has fewer.
    """
    check_rank(rank)
    if top < rank:
        raise EckartError(f"top must be at least the rank, got {top} and {rank}")

    def build(layer: Layer) -> Adapter:
        m, n = layer.shape
        r, found = layer.fitting(rank), layer.svd(min(top, m, n))
        p, device = found.values.shape[0], layer.device
        fixed = [nn.Parameter(t, requires_grad=False) for t in (found.left, found.values, found.right)]
        left, values, right = Dense(fixed[0]), Diagonal(fixed[1]), Dense(fixed[2])
        start = Product((left, values, right)).apply(torch.clone)
        drawn = layer.uniform(m + n, r) / r**0.5
        of_left = LowRank(drawn[:m], torch.zeros(r, p, device=device))
        of_right = LowRank(torch.zeros(p, r, device=device), drawn[m:].mT.contiguous())
        moved = Plus(Product((Sum((left, of_left)), values, Sum((right, of_right)))))
        return Adapter([Plus(start, -1.0).requires_grad_(False), moved])

    return Recipe(build, rate=1e-3)
