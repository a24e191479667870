"""Refitting one factor with the other held fixed: weighted least squares."""

from collections.abc import Sequence

import torch
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


def refit_shared_up(weight: Tensor, up: Tensor, downs: Sequence[Tensor], metrics: Sequence[Metric]) -> Tensor:
    """Return the best up factor that maps of several ranks share, each with a down factor and inputs of its own.

        min over U of  sum over s  E | T (W x_s - U_s V_s x^_s) |^2,    U_s the first k_s columns of U

        U sum_s V_s G^_s V_s^T = sum_s W C_s V_s^T    (V_s filled up with rows of 0)

    whatever T is; then the columns are made orthonormal under B one after the other, which keeps what the first k of
    them span, as `refit_down` wants them.

    Args:
        weight: W (m, n).
        up: U (m, k) so far; directions that no V_s x^_s reaches keep it.
        downs: V_s (k_s, n), k_s <= k.
        metrics: one of each, uncentred, with one output moment B.

    Returns:
        (m, k) float64.
    """
    w, up = weight.double(), up.double()
    moment, residual = up.new_zeros(up.shape[1], up.shape[1]), torch.zeros_like(up)
    for down, metric in zip(downs, metrics, strict=True):
        rank, seen = len(down), weighted(down.double().mT, metric.seen)  # G^ V^T
        both = seen if metric.cross is None else metric.cross @ down.double().mT  # C V^T
        products = down.double() @ seen
        moment[:rank, :rank] += products
        residual[:, :rank] += w @ both - up[:, :rank] @ products
    inverse_root = psd_roots(moment, floor=1e-12)[1]
    up = up + residual @ inverse_root @ inverse_root
    root, inverse = metrics[0].roots("outputs") or (None, None)
    return weighted(torch.linalg.qr(weighted(up, root)).Q, inverse)


def shared_up(
    weight: Tensor, up: Tensor, ranks: Sequence[int], metrics: Sequence[Metric], *, rounds: int
) -> tuple[Tensor, list[Tensor]]:
    """Return an up factor for maps of several ranks and a down factor for each, which take turns being the best.

    Args:
        weight: W (m, n).
        up: U (m, k) to start from, as `Regression.factors` returns it.
        ranks: k_s of every map, 0 of one that is none; at most k.
        metrics: one of each, uncentred, with one output moment.
        rounds: how often U is fitted anew; no round makes the sum of the errors larger.

    Returns:
        U (m, k) and V_s (k_s, n), float64.
    """

    def solved() -> list[Tensor]:
        return [refit_down(weight, up[:, :rank], metric) for rank, metric in zip(ranks, metrics, strict=True)]

    used, downs = [i for i, rank in enumerate(ranks) if rank], solved()
    for _ in range(rounds):
        up = refit_shared_up(weight, up, [downs[i] for i in used], [metrics[i] for i in used])
        downs = solved()
    return up.double(), downs
