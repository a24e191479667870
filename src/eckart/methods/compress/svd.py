"""Plain truncated SVD (Eckart and Young 1936).

    W' = U_k diag(sigma_1 ... sigma_k) V_k^T,    min over rank W' <= k of |W - W'|_F

Structure: low rank. Metric: Frobenius. Budget: uniform. Solver: SVD. Trained: nothing. No data.
"""

from eckart.fit import Metric
from eckart.methods.compress.recipe import Recipe


def svd() -> Recipe:
    """Truncated SVD of every weight, data-free: the baseline that every other method refines."""
    return Recipe(metric=lambda data: Metric())
