"""DoRA: the low-rank part moves the directions of the rows, their lengths train on their own.

    W' = diag(g / |rows of V|) V,    V = W + (alpha / r) B A,    g = |rows of W| at the start

The lengths of V's rows are constants to autograd. They come from the factors (|V_j|^2 = base + cross + Gram term), not
from a matrix of W's size, and backward keeps x, A x and the output only (hosts/factored.py).

Structure: magnitude times (W plus low rank). Start: W. Trained: A, B, g; r (m + n) + m numbers.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5 and section 4.3; the factored norm from
"Scaling DoRA: High-Rank Adaptation via Factored Norms and Fused Kernels".
"""

import torch

from eckart.hosts import Adapter, map_of
from eckart.hosts.adapter import Rescaled
from eckart.maps import row_norms
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, added, check_rank


def dora(*, rank: int = 16, alpha: float = 16.0, dropout: float = 0.0) -> Recipe:
    """Magnitude and direction apart: LoRA on the directions, one trained length per row.

    Args:
        rank: r.
        alpha: the low-rank map is scaled by alpha / r.
        dropout: share of the inputs of the low-rank map that is dropped in training.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        with torch.no_grad():
            lengths = row_norms(map_of(layer.module)).float()
        return Adapter([added(layer, rank, alpha / rank, dropout=dropout), Rescaled(lengths)])

    return Recipe(build, rate=1e-3)
