"""SVFit: only the leading singular values of the weight train.

    W' = W + U_r diag(d) V_r^T,    d = 0 at the start:  the singular values are S_r + d

Structure: diagonal between frozen singular vectors. Start: W. Trained: d; r numbers.

Source: Sun et al. 2024, "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values".
"""

import torch

from eckart.hosts import Adapter
from eckart.hosts.adapter import Plus
from eckart.maps import Dense, Diagonal, Product
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank, train_only


def svfit(*, rank: int = 64) -> Recipe:
    """Train the leading singular values of the weight.

    Args:
        rank: r.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        found = layer.svd(min(rank, *layer.shape))
        change = Diagonal(torch.zeros_like(found.values))
        return Adapter([train_only(Plus(Product((Dense(found.left), change, Dense(found.right)))), "delta.1.")])

    return Recipe(build, rate=1e-2)
