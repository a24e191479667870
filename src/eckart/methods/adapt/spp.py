"""SPP: every weight is rescaled a little, so that zeros stay zeros.

    W'_ij = W_ij (1 + s b_i a_p(i)j),    p(i) = floor(i r / m): r groups of rows, each with a vector a of its own

W' is written out a block of rows at a time, again in backward, and never kept (hosts/entrywise.py).

Structure: entrywise product. Start: W. Trained: a (r, n) uniform in +-1/sqrt(n), b (m) = 0; r n + m numbers.

Source: Lu et al. 2024, "SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large Language Models", and its
published code for the groups, the start and s = alpha / r; r = 16.
"""

import torch

from eckart.hosts import Adapter
from eckart.hosts.entrywise import Grouped
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def spp(*, rank: int = 16, alpha: float = 16.0) -> Recipe:
    """Every weight rescaled, so that zeros stay zeros.

    Args:
        rank: r, groups of rows.
        alpha: the change is scaled by alpha / r.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        m, n = layer.shape
        groups = layer.uniform(min(rank, m), n) / n**0.5
        return Adapter([Grouped(groups, torch.zeros(m, device=layer.device), alpha / rank)])

    return Recipe(build, rate=1e-3)
