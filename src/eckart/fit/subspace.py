"""The subspace that the leading directions of many matrices have in common: Dobi-SVD's update of a weight.

    Y_s = U_s S_s V_s^T  the outputs of a layer on sequence s,   P_k  the top k eigenvectors of  sum_s V_s V_s^T
    W' = P_k P_k^T W,    V_s  the k leading right singular vectors of Y_s

Every sequence weighs alike, and so does every direction of it: this is the incremental PCA of the V_s without its
truncation on the way, and not the PCA of the outputs, which is what the best approximation of Y projects on.

Source: Wang et al. 2025, "Dobi-SVD", section 3.2.
"""

import torch
from torch import Tensor

from eckart.linalg import top_eigen
from eckart.maps import LowRank

# Squared singular values below this share of the largest are rounding.
NOTHING = 1e-12


class SubspaceSum:
    """Adds up the projectors on the leading directions of matrices with m columns.

    Args:
        size: m.
        rank: k.
        device: where they are added up.
    """

    def __init__(self, size: int, rank: int, device: torch.device | None = None) -> None:
        self.rank = rank
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, outputs: Tensor) -> None:
        """Add outputs (sequences, t, m), or (t, m) of one sequence; one shorter than k adds all its directions."""
        sequences = outputs.double().reshape(-1, *outputs.shape[-2:])
        axes = torch.cat([_leading(y, min(self.rank, *y.shape)) for y in sequences], 1)
        self._sum += axes @ axes.mT

    def factors(self, weight: Tensor) -> LowRank:
        """Return P_k, P_k^T W for a weight W (m, n), in its dtype."""
        axes = top_eigen(self._sum, self.rank).vectors[:, : self.rank].to(weight.dtype)
        return LowRank(axes, axes.mT @ weight)


def _leading(y: Tensor, count: int) -> Tensor:
    """Return the leading right singular vectors of y (t, m), (m, count) or fewer where y has no more; from the smaller
    of its two Gram matrices.
    """
    if y.shape[0] >= y.shape[1]:
        return top_eigen(y.mT @ y, count).vectors[:, :count]
    found = top_eigen(y @ y.mT, count)
    values = found.values[:count]
    there = values > NOTHING * values[0]
    return y.mT @ (found.vectors[:, :count] / values.sqrt())[:, there]
