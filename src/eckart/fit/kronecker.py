"""The nearest sum of r Kronecker products, under a metric.

    min over A, B of  E | T ( W x - sum_r (A_r (x) B_r) x^ ) |^2

Without a metric it is a truncated SVD: with every block of W as a row, a Kronecker product has rank 1. From there the
left and the right factors take turns, each a least-squares problem that conjugate gradients solve.

Legend: W (m, n), W* the unconstrained optimum of the metric, G the moment of what the layer sees, B the output moment.

Source: Van Loan and Pitsianis 1993, "Approximation with Kronecker products".
"""

import math

from torch import Tensor

from eckart.errors import EckartError
from eckart.fit.metric import Metric, weighted, weighted_rows
from eckart.fit.regression import unconstrained
from eckart.linalg import truncated_svd
from eckart.maps import Kronecker, arranged, rearranged

# Turns of both factors, and steps of conjugate gradients in each.
ROUNDS, STEPS = 3, 10


def fit_kronecker(
    weight: Tensor, metric: Metric, left: tuple[int, int], terms: int, *, rounds: int = ROUNDS
) -> Kronecker:
    """Return a sum of Kronecker products near a weight, float64.

    Args:
        weight: W (m, n).
        metric: what close means.
        left: shape of the left factors; its sides divide those of W.
        terms: r.
        rounds: turns of improving the factors under the metric, after the closed form without one.

    Raises:
        EckartError: for shapes that do not divide W, or more terms than there can be.
    """
    (m, n), (m_a, n_a) = weight.shape, left
    if m % m_a or n % n_a:
        raise EckartError(f"left factors of shape {m_a} x {n_a} do not divide a weight of shape {m} x {n}")
    right = m // m_a, n // n_a
    most = min(math.prod(left), math.prod(right))
    if not 0 < terms <= most:
        raise EckartError(f"a {m} x {n} matrix has 1 to {most} Kronecker products of {m_a} x {n_a} left, got {terms}")
    target = unconstrained(weight.double(), metric)
    factors = truncated_svd(rearranged(target, left, right), terms)
    a, b = factors.left.mT, factors.values[:, None] * factors.right  # (r, m_A n_A), (r, m_B n_B)
    for _ in range(rounds if metric.seen is not None or metric.outputs is not None else 0):
        a = _improved(a, b, target, metric, left, right, is_left=True)
        b = _improved(b, a, target, metric, left, right, is_left=False)
    return Kronecker(a.reshape(terms, *left), b.reshape(terms, *right))


def _improved(
    factor: Tensor,
    other: Tensor,
    target: Tensor,
    metric: Metric,
    left: tuple[int, int],
    right: tuple[int, int],
    *,
    is_left: bool,
) -> Tensor:
    """Return one side's factors with less error, the other's held fixed, by conjugate gradients."""

    def matrix(own: Tensor) -> Tensor:
        return arranged(own.mT @ other if is_left else other.mT @ own, left, right)

    def pulled(error: Tensor) -> Tensor:
        slope = rearranged(weighted(weighted_rows(error, metric.seen), metric.outputs), left, right)
        return other @ slope.mT if is_left else other @ slope

    residual = pulled(target - matrix(factor))
    step, size = residual, float(residual.square().sum())
    for _ in range(STEPS):
        bent = pulled(matrix(step))
        curvature = float((step * bent).sum())
        if not curvature > 0:
            break
        factor, residual = factor + size / curvature * step, residual - size / curvature * bent
        before, size = size, float(residual.square().sum())
        step = residual + size / before * step
    return factor
