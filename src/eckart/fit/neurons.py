"""Fewer hidden units: some are kept, and the layer behind them makes up for the others by least squares (Nystroem).

    min over W' of  E | W h - W' h_S |^2,    W' = W C_(:,S) C_(S,S)^-1,    C = E[h h^T]
    S the units of largest ridge leverage score  diag( C (C + lambda I)^-1 )

The optimum over W' is the same whatever the metric of the outputs. On shifted inputs h^ the first C is E[h h^^T], the
others are moments of h^.

Source: McCurdy 2018, "Ridge regression and provable deterministic ridge leverage score sampling"; Lin et al. 2024,
"MoDeGPT", Algorithm 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import EckartError
from eckart.fit.error import error_of
from eckart.fit.metric import Metric

# Weights of the identity in the normal equations, over the mean square: for units that never fire, or fire alike.
JITTERS = (1e-10, 1e-8, 1e-6, 1e-4)


@dataclass(frozen=True, slots=True)
class NeuronFit:
    """The layer behind fewer hidden units.

    Attributes:
        kept: indices of the units kept, ascending, (k,) int64.
        weight: W', (m, k) float64.
        error: E |T (W h - W' h_S)|^2.
        relative: the error over that of no units at all.
    """

    kept: Tensor
    weight: Tensor
    error: float
    relative: float


def leverage_scores(second: Tensor, ridge: float = 1.0) -> Tensor:
    """Return the ridge leverage score of every unit, (n,) float64 in [0, 1].

    Args:
        second: C = E[h h^T], (n, n).
        ridge: lambda over the mean of C's diagonal, positive.
    """
    c = second.double()
    amount = ridge * c.diagonal().mean().clamp_min(torch.finfo(c.dtype).tiny)
    damped = c.clone()
    damped.diagonal().add_(amount)
    # C (C + lambda I)^-1 = I - lambda (C + lambda I)^-1
    return 1 - amount * torch.cholesky_inverse(_factor(damped)).diagonal()


def neurons_fitter(weight: Tensor, metric: Metric, *, ridge: float = 1.0) -> Callable[[int], NeuronFit]:
    """Return `fit_neurons` for any count, with the scores computed once; arguments and errors are the same."""
    n = weight.shape[1]
    if metric.seen is None or metric.seen.ndim != 2:
        raise EckartError("choosing hidden units needs their second moment, a matrix, but the metric has none")
    scores = leverage_scores(metric.seen, ridge)
    whole = torch.zeros_like(weight, dtype=torch.float64)
    zero = error_of(weight, whole, metric)

    def fit(count: int) -> NeuronFit:
        if not 0 < count <= n:
            raise EckartError(f"{count} of {n} hidden units cannot be kept; give a number from 1 to {n}")
        kept = scores.topk(count).indices.sort().values
        reduced = best_columns(weight, metric, kept)
        error = error_of(weight, whole.index_copy(1, kept, reduced), metric)
        return NeuronFit(kept, reduced, error, error / zero if zero > 0 else 0.0)

    return fit


def fit_neurons(weight: Tensor, metric: Metric, count: int, *, ridge: float = 1.0) -> NeuronFit:
    """Keep the units of largest leverage and fit the layer behind them.

    Args:
        weight: W (m, n) of the layer that reads the units.
        metric: what close means; needs the units' second moment.
        count: k, units kept.
        ridge: lambda of the leverage scores over the mean of C's diagonal.

    Raises:
        EckartError: for a count beyond the units there are, or a metric without moments of the units.
    """
    return neurons_fitter(weight, metric, ridge=ridge)(count)


def best_columns(weight: Tensor, metric: Metric, kept: Tensor) -> Tensor:
    """Return the layer that reads only some units and is nearest to the one that reads them all, (m, k) float64."""
    if metric.seen is None:
        raise EckartError("fitting columns needs the units' second moment, but the metric has none")
    cross = metric.seen if metric.cross is None else metric.cross  # E[h h^^T]
    return torch.cholesky_solve((weight.double() @ cross[:, kept]).mT, _factor(metric.seen[kept][:, kept])).mT


def _factor(moment: Tensor) -> Tensor:
    """Return the Cholesky factor of a moment with the least of some jitters that makes it regular.

    Moments are sums of float32 products: eigenvalues that should be zero are that much away from it, to either side.
    """
    level = moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
    for jitter in JITTERS:
        damped = moment.clone()
        damped.diagonal().add_(jitter * level)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
    raise EckartError("the second moment of the hidden units is not positive; the calibration run lost its precision")
