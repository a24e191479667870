"""How far a classifier's confidence is from how often it is right, and one number that brings it nearer.

    error  sum_b (n_b / n) |accuracy_b - mean confidence_b|,  b 15 equal bins of the confidence max softmax(z)
    T      the minimum of - sum log softmax(z / T)_y

The loss is convex in 1 / T, so T is where its slope, the mean of E_softmax[z] - z_y, is zero. T changes no answer.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks"; Tomihari and Sato 2024, "Understanding Linear
Probing then Fine-tuning Language Models from NTK Perspective", which needs it: a probed head of large norm is overly
confident.
"""

import math

import torch
from torch import Tensor

from eckart.errors import EckartError

BINS = 15
# T is looked for within a factor of this of 1; it is at an end where every answer is right, or the logits say nothing.
RANGE = 1e3


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T by which logits are divided for the least loss.

    Args:
        logits: (count, classes).
        labels: (count,) int64.

    Raises:
        EckartError: if there are none, they do not fit or are not finite.
    """
    _check(logits, labels)
    z = logits.detach().double()
    own = z.gather(1, labels[:, None]).mean()
    low, high = -math.log(RANGE), math.log(RANGE)  # of log(1 / T)
    for _ in range(60):
        middle = (low + high) / 2
        slope = (torch.softmax(z * math.exp(middle), -1) * z).sum(-1).mean() - own
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error, between 0 and 1.

    Args:
        logits: (count, classes).
        labels: (count,) int64.
        bins: equal bins of the confidence.

    Raises:
        EckartError: if there are none, they do not fit or are not finite.
    """
    _check(logits, labels)
    confidence, answer = torch.softmax(logits.detach().double(), -1).max(-1)
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    excess = confidence - (answer == labels).double()
    summed = excess.new_zeros(bins).index_add(0, which, excess)
    return float(summed.abs().sum()) / len(labels)


def _check(logits: Tensor, labels: Tensor) -> None:
    """Refuse what are no logits of labelled examples."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise EckartError(
            f"calibration takes logits (count, classes) and labels (count,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if not bool(logits.isfinite().all()):
        raise EckartError("calibration takes finite logits; some are NaN or infinite")
