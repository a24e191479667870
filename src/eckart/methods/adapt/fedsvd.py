"""FedSVD: clients train the second factor alone, and the server turns both into a singular value decomposition.

    client:  W' = W + (alpha / r) B A,   A fixed, A A^T = I          server:  B A = U S V^T,   B <- U S,   A <- V^T

B A is the clients' mean exactly, since all share A. Its new A spans the directions that the clients have found, where a
fixed one (`ffa-lora`) keeps to those it was drawn with. The rows of A being orthonormal, |dW'|_F = (alpha / r) |dB|_F:
the clipped gradient and the noise of differential privacy reach W' as they are. The decomposition is that of the thin
factors (QR and an r x r SVD), not of the m x n matrix that the published code makes.

Structure: low rank added, its first factor frozen between rounds. Start: W, A random with orthonormal rows, where the
published code draws the first A as LoRA does. Trained: B = 0 at the start; m r numbers. `eckart.federate` runs the
rounds, `eckart.recombine` is the server's part for systems of their own.

Source: Lee et al. 2025, "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", and its
published code: r = alpha = 8, every round decomposed.
"""

from collections.abc import Sequence

from eckart.hosts import Adapter
from eckart.linalg import polar_factor, svd_of_product
from eckart.maps import LowRank
from eckart.methods.adapt.layer import Layer
from eckart.methods.adapt.recipe import Recipe, added, check_rank, train_only


def fedsvd(*, rank: int = 8, alpha: float = 8.0) -> Recipe:
    """Clients train the second factor alone, and the server turns both into a singular value decomposition.

    Args:
        rank: r.
        alpha: the added map is scaled by alpha / r.
    """
    check_rank(rank)

    def build(layer: Layer) -> Adapter:
        down = polar_factor(layer.normal(layer.fitting(rank), layer.shape[1]))
        return Adapter([train_only(added(layer, rank, alpha / rank, down=down), "delta.up.")])

    return Recipe(build, rate=1e-3, server=decomposed)


def decomposed(pairs: Sequence[LowRank], rank: int) -> LowRank:
    """Return the best map of a rank of a sum, with factors U S and V^T, V^T having orthonormal rows.

    Args:
        pairs: the terms of the sum.
        rank: r.
    """
    found = svd_of_product([(pair.up, pair.down) for pair in pairs], rank)
    return LowRank(found.left * found.values, found.right)
