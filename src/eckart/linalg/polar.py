"""The polar factor: the nearest matrix with orthonormal rows or columns."""

import torch
from torch import Tensor


def polar_factor(matrix: Tensor) -> Tensor:
    """Return P Q^T of M = P diag(s) Q^T: the maximizer of tr(X^T M) with orthonormal rows (columns if M is tall).

    Args:
        matrix: (k, n), real; where it is rank-deficient, one of several maximizers is returned.

    Source: Schoenemann 1966, "A generalized solution of the orthogonal Procrustes problem".
    """
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    product: Tensor = left @ right
    return product
