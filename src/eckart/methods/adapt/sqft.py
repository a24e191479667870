"""SQFT: SparsePEFT, low rank of elastic rank on the support of a sparse weight, which merges without loss.

    W' = W + (alpha / r) M * (B_k A_k),    M = 1 where W is not 0

B_k and A_k are the first k columns and rows of B and A: in every step of training each layer draws k from r, 3 r / 4
and r / 2, and after training k is r. M * (B A) is written out block by block and never kept (hosts/entrywise.py).

Structure: masked low rank added. Start: W. Trained: A, B; r (m + n) numbers.

Source: Munoz et al. 2024, "SQFT: Low-cost Model Adaptation in Low-precision Sparse Foundation Models",
and its published ranks of 32, 24 and 16. Its choice of one k per layer after training is left out; on a base of codes
`merge` codes the merged weight anew and reports the loss, where QA-SparsePEFT trains through the codes.
"""

from eckart.errors import EckartError
from eckart.hosts import Adapter
from eckart.hosts.entrywise import ElasticFactors
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank
from eckart.methods.adapt.support import masked


def sqft(*, rank: int = 32, alpha: float = 64.0, elastic: bool = True) -> Recipe:
    """Low rank of elastic rank on the support of a sparse weight.

    Args:
        rank: r; divisible by 4 if elastic.
        alpha: the masked map is scaled by alpha / r.
        elastic: whether every step of training draws a rank.
    """
    check_rank(rank)
    if elastic and rank % 4:
        raise EckartError(f"rank must be divisible by 4 for elastic ranks of r, 3 r / 4 and r / 2, got {rank}")

    def build(layer: Layer) -> Adapter:
        change = masked(layer, rank, alpha / rank)
        return Adapter([ElasticFactors(change.up, change.down, change.bits, change.scale) if elastic else change])

    return Recipe(build, rate=5e-4)
