"""Refitting one factor with the other held fixed: weighted least squares."""

from torch import Tensor

from eckart.fit.metric import Metric, weighted
from eckart.fit.regression import unconstrained
from eckart.linalg import psd_roots
from eckart.maps import LowRank


def refit_up(weight: Tensor, factors: LowRank, second: Tensor) -> LowRank:
    """Return the factors with the left one refitted to the layer's own outputs on given inputs.

        min over U of  E | W x - U V x |^2,    U = W G V^T (V G V^T)^(-1)

    Args:
        weight: W (m, n).
        factors: up (m, k) and down V (k, n).
        second: G = E[x x^T], (n, n); directions of V x without data keep the given up factor.

    Returns:
        The factors in float64.

    Source: Wang et al. 2024, "SVD-LLM", section 3.2 (parameter update).
    """
    w, up, down, g = (t.double() for t in (weight, factors.up, factors.down, second))
    seen = down @ g  # (k, n)
    inverse_root = psd_roots(seen @ down.mT, floor=1e-12)[1]
    # Written as a correction of the given factor, so that what the data do not determine stays as it is.
    residual = (w - up @ down) @ seen.mT
    return LowRank(up + residual @ inverse_root @ inverse_root, down)


def refit_down(weight: Tensor, up: Tensor, metric: Metric) -> Tensor:
    """Return the best down factor V for given up factors U whose columns are orthogonal under the output moment.

        min over V of  E | T (W x - U V x^) |^2,    V = (U^T B U)^(-1) U^T B W*

    U^T B U is diagonal, so a row of V depends on its own column of U only: V of the first k columns is the first k
    rows.

    Args:
        weight: W (m, n).
        up: U (m, k), as `Regression.factors` returns it for a metric with the same output moment.
        metric: the metric, uncentred; its inputs may differ from those that gave U.

    Returns:
        (k, n) float64.
    """
    up = up.double()
    dual = weighted(up, metric.outputs)
    return (dual.mT @ unconstrained(weight.double(), metric)) / (up * dual).sum(0)[:, None]
