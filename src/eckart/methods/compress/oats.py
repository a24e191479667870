"""OATS: outliers kept as entries, the rest as low rank, both scaled by the inputs' second moment.

    W D = trunc_r(W D - S) + keep_s(W D - L),    D = diag(E[x_j^2])^(1/2),  80 alternations

Structure: low rank plus a sparse matrix with s entries per row; a quarter of the numbers is low rank. Metric: diagonal
second moment of the input for the alternation; the low-rank part is fitted once more under the full one, which the
paper does not do. Budget: uniform. Solver: truncated SVD and row-wise hard thresholding in turn. Trained: nothing.

Source: Zhang and Papyan 2024, "OATS: Outlier-aware pruning through sparse and low rank decomposition", Algorithm 1;
80 iterations and a rank share of 0.25 as in stephenqz/OATS.
"""

from eckart.errors import EckartError
from eckart.fit.families import sparse_plus_lowrank_family
from eckart.methods.compress.recipe import Recipe, check_least, input_moment


def oats(*, rank_share: float = 0.25, iterations: int = 80) -> Recipe:
    """Low rank plus sparse by alternating truncation and thresholding.

    Args:
        rank_share: share of the numbers that is low rank.
        iterations: rounds.
    """
    if not 0 <= rank_share < 1:
        raise EckartError(f"rank_share must lie in [0, 1), got {rank_share}")
    check_least("iterations", iterations, 1)
    family = sparse_plus_lowrank_family(rank_share, iterations)
    return Recipe(metric=input_moment, families=(family,), uses_inputs=True)
