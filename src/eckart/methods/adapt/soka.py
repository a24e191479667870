"""SoKA: a sum of Kronecker products, started from the Kronecker-product SVD of the weight.

    W' = W - K0 + K,    K = sum_k A_k (x) B_k,    K0 the best sum of r such products (Van Loan and Pitsianis)

Structure: Kronecker products added. Start: W. Trained: A, B; r (m1 n1 + m2 n2) numbers (the paper counts the r singular
values besides; here they are part of the factors).

Source: "Singular Value Decomposition on Kronecker Adaptation for Large Language Model" 2025, section 3.
"""

from eckart.errors import EckartError
from eckart.fit import Metric
from eckart.fit.kronecker import fit_kronecker
from eckart.hosts import Adapter
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, check_rank, moved_start


def soka(*, rank: int = 4, block: int = 16) -> Recipe:
    """A trained sum of Kronecker products, started from that of the weight.

    Args:
        rank: number of products r.
        block: side of the left factors; the largest divisor of each side of the weight up to that is taken.
    """
    check_rank(rank)
    if block < 1:
        raise EckartError(f"block must be at least 1, got {block}")

    def build(layer: Layer) -> Adapter:
        left = _divisor(layer.shape[0], block), _divisor(layer.shape[1], block)
        start = fit_kronecker(layer.weight(), Metric(), left, rank)
        return moved_start(start.to(layer.weight().dtype))

    return Recipe(build, rate=3e-4)


def _divisor(size: int, most: int) -> int:
    return next(d for d in range(min(most, size), 0, -1) if size % d == 0)
