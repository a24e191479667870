"""Calibration of classifiers, against plain definitions."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

import eckart
from eckart.errors import EckartError


def drawn(count: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits whose labels are drawn from their softmax, made too confident by a factor."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 4, generator=generator)
    labels = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]
    return scale * logits, labels


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_temperature_has_the_least_loss(scale: float):
    logits, labels = drawn(300, scale)

    def loss(log: float) -> float:
        return float(F.cross_entropy(logits.double() / math.exp(log), labels))

    found = eckart.fit_temperature(logits, labels)
    assert math.log(found) == pytest.approx(minimize_scalar(loss).x, abs=1e-4)


def test_the_error_is_that_of_its_bins_and_falls_with_the_temperature():
    logits, labels = drawn(3000, 4.0)
    wanted, shares = 0.0, torch.softmax(logits.double(), -1)
    for i in range(15):
        inside = [k for k in range(3000) if i / 15 < float(shares[k].max()) <= (i + 1) / 15]
        right = sum(int(shares[k].argmax() == labels[k]) for k in inside)
        wanted += abs(right - sum(float(shares[k].max()) for k in inside)) / 3000
    assert eckart.calibration_error(logits, labels) == pytest.approx(wanted, abs=1e-9)
    scaled = logits / eckart.fit_temperature(logits, labels)
    assert eckart.calibration_error(scaled, labels) < 0.2 * wanted


def test_what_is_no_classification_is_refused():
    with pytest.raises(EckartError, match="takes logits"):
        eckart.fit_temperature(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(EckartError, match="finite"):
        eckart.calibration_error(torch.full((2, 2), math.nan), torch.zeros(2, dtype=torch.int64))
