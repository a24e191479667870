"""LoRS: low rank on the support of a sparse weight, which stays as sparse.

    W' = W + (alpha / r) M * (B A),    M = 1 where W is not 0

M * (B A) is written out a block of rows at a time, again in backward, and never kept; its gradient reaches A and B a
block at a time, so that no (m, n) gradient is formed either (hosts/entrywise.py).

Structure: masked low rank added. Start: W. Trained: A, B; r (m + n) numbers.

Source: Hu et al. 2025, "LoRS: Efficient Low-Rank Adaptation for Sparse Large Language Model". Its better start of A and
B is not verified and left out: A and B start as LoRA's.
"""

from eckart.hosts import Adapter
from eckart.methods.adapt.recipe import Recipe, check_rank
from eckart.methods.adapt.support import masked


def lors(*, rank: int = 16, alpha: float = 16.0) -> Recipe:
    """Low rank on the support of a sparse weight.

    Args:
        rank: r.
        alpha: the masked map is scaled by alpha / r.
    """
    check_rank(rank)
    return Recipe(lambda layer: Adapter([masked(layer, rank, alpha / rank)]), rate=1e-3)
