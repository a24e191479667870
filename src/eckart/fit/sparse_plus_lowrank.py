"""A low-rank map plus a few entries of every row: what low rank misses are outliers, what sparsity misses is structure.

    min over L of rank r and S with s non-zeros per row of  | (W - L - S) D |^2,    D = diag(E[x_j^2])^(1/2)

alternating L = trunc_r and S = keep_s of what the other leaves. With the support of S and its values fixed, L has a
closed form under the whole metric: the regression of W* - S (fit/regression.py), which ends the alternation.

Legend: W (m, n), r rank, s non-zeros per row, W* the unconstrained optimum of the metric.
"""

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.fit.dictionary import keep_largest
from eckart.fit.metric import Metric
from eckart.fit.regression import regress, unconstrained
from eckart.linalg import truncated_svd
from eckart.maps import LinearMap, Sum, bitmap, zero_map


def fit_sparse_plus_lowrank(
    weight: Tensor, metric: Metric, rank: int, nonzeros: int, *, iterations: int = 80
) -> LinearMap:
    """Return a low-rank map plus a sparse one, alternately fitted.

    Args:
        weight: W (m, n).
        metric: what close means. The alternation sees the diagonal of the inputs' second moment; the low-rank part is
            fitted under all of it in the end.
        rank: r, at least 0.
        nonzeros: s, entries kept per row.
        iterations: rounds of truncating and thresholding.

    Returns:
        `Sum(LowRank, Bitmap)`, float64, in r (m + n) + m s numbers and m n bits.

    Raises:
        EckartError: for sizes beyond the matrix.

    Source: Zhang and Papyan 2024, "OATS: Outlier-aware pruning through sparse and low rank decomposition", Algorithm 1.
    """
    m, n = weight.shape
    if not 0 <= rank <= min(m, n) or not 0 <= nonzeros <= n:
        raise EckartError(
            f"rank {rank} plus {nonzeros} entries per row do not fit a {m} x {n} matrix; the rank must be at most "
            f"{min(m, n)}, the entries at most {n}"
        )
    target = unconstrained(weight.double(), metric)
    scale = _scale(metric, n)
    scaled, low = target * scale, torch.zeros_like(target)
    for _ in range(max(iterations, 1)):
        sparse = keep_largest(scaled - low, nonzeros)
        low = truncated_svd(scaled - sparse, rank, method="gram").dense() if rank else low
    sparse = keep_largest(scaled - low, nonzeros) / scale
    if rank == 0:
        return Sum((zero_map((m, n), torch.float64), bitmap(sparse, nonzeros)))
    return Sum((regress(target - sparse, metric.on_seen(), rank=rank).factors(rank), bitmap(sparse, nonzeros)))


def _scale(metric: Metric, count: int) -> Tensor:
    """Return the root mean squares of the inputs, (n,), at least 1e-6 of the largest."""
    if metric.seen is None:
        return torch.ones(count, dtype=torch.float64)
    squares = metric.seen.diagonal() if metric.seen.ndim == 2 else metric.seen
    largest = squares.max()
    return squares.clamp_min(1e-12 * float(largest)).sqrt() if largest > 0 else torch.ones_like(squares)
