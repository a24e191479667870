"""The error of any approximation under a metric, and the bias that makes it least."""

import torch
from torch import Tensor

from eckart.fit.metric import Metric, weighted, weighted_rows
from eckart.maps import LinearMap


def error_of(weight: Tensor, approximation: Tensor, metric: Metric) -> float:
    """Return E |T (W x - W' x^ - c)|^2 with the best c where the metric is centred.

        tr B (W G W^T - W C W'^T - W' C^T W^T + W' G^ W'^T)

    Args:
        weight: W (m, n).
        approximation: W' (m, n).
        metric: the metric; if its inputs are shifted it must know G as well.
    """
    w, a = weight.double(), approximation.double()
    if metric.shifted is None or metric.cross is None:
        change = w - a
        return max(_inner(change, change, metric.inputs, metric.outputs), 0.0)
    before = _inner(w, w, metric.inputs, metric.outputs)
    both = _inner(w, a, metric.cross, metric.outputs)
    return max(before - 2 * both + _inner(a, a, metric.shifted, metric.outputs), 0.0)


def best_bias(weight: Tensor, approximation: LinearMap, metric: Metric) -> Tensor | None:
    """Return c = W E[x] - W' E[x^], (m,) float64, or None where the metric is not centred."""
    if metric.mean is None:
        return None
    seen = metric.mean if metric.shifted_mean is None else metric.shifted_mean
    return weight.double() @ metric.mean - approximation.to(torch.float64)(seen)


def _inner(a: Tensor, b: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> float:
    """Return tr(B a M b^T)."""
    return float(torch.sum(weighted_rows(a, inputs) * weighted(b, outputs)))
