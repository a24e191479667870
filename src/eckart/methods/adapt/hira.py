"""HiRA: the weight times a low-rank matrix, entry by entry, added.

    W' = W + W * (B A)        A (r, n) uniform in +-1/sqrt(n), B (m, r) = 0

of the rank that W has, and zero where W is. The product is written out a block of rows at a time and never kept
(hosts/entrywise.py).

Structure: Hadamard product with W added. Start: W. Trained: A, B; r (m + n) numbers.

Source: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models"; r = 32.
"""

import torch

from eckart.hosts import Adapter
from eckart.hosts.entrywise import Multiplied
from eckart.maps import LowRank
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank


def hira(*, rank: int = 32) -> Recipe:
    """The weight times a low-rank matrix, entry by entry, added.

    Args:
        rank: r.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        (m, n), r = layer.shape, layer.fitting(rank)
        up = torch.zeros(m, r, device=layer.device)
        return Adapter([Multiplied(LowRank(up, layer.uniform(r, n) / n**0.5))])

    return Recipe(build, rate=5e-3)
