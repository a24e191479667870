"""Fewer hidden units: the fit is least squares on the units kept, the choice is by ridge leverage."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.errors import EckartError
from eckart.fit import metric
from eckart.fit.neurons import best_columns, fit_neurons, leverage_scores


def moments(seed: int, samples: int, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations (samples, n) with correlated units, their second moment, and a weight (m, n)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64) / torch.arange(1, n + 1)
    h = (torch.randn(samples, n, generator=generator, dtype=torch.float64) @ mixing.mT).clamp_min(-0.1)
    return h, h.mT @ h / samples, torch.randn(m, n, generator=generator, dtype=torch.float64)


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 6), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_the_fit_is_least_squares_on_the_units_kept(seed, n, m, share):
    h, second, weight = moments(seed, 200, n, m)
    count = max(1, round(share * n))
    fit = fit_neurons(weight, metric(second), count)
    assert fit.kept.tolist() == sorted(set(fit.kept.tolist()))
    best = torch.linalg.lstsq(h[:, fit.kept], h @ weight.mT).solution.mT
    residual = h @ weight.mT - h[:, fit.kept] @ best.mT
    expected = float(residual.square().sum(1).mean())
    total = float((h @ weight.mT).square().sum(1).mean())
    assert fit.error == pytest.approx(expected, rel=1e-5, abs=1e-8 * total)
    assert fit.relative == pytest.approx(fit.error / total)
    if count == n:
        torch.testing.assert_close(fit.weight, weight, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 10_000), st.integers(1, 10), st.floats(1e-3, 10))
@settings(max_examples=60, deadline=None)
def test_leverage_scores_are_those_of_the_formula(seed, n, ridge):
    _, second, _ = moments(seed, 50, n, 1)
    damped = second + ridge * second.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    scores = leverage_scores(second, ridge)
    torch.testing.assert_close(scores, (second @ torch.linalg.inv(damped)).diagonal(), rtol=1e-8, atol=1e-10)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_shifted_units_are_regressed_on():
    h, second, weight = moments(1, 400, 9, 4)
    hat = h + 0.2 * torch.randn_like(h)
    shifted = metric(second, shifted=hat.mT @ hat / 400, cross=h.mT @ hat / 400)
    kept = torch.tensor([0, 3, 4, 8])
    best = torch.linalg.lstsq(hat[:, kept], h @ weight.mT).solution.mT
    torch.testing.assert_close(best_columns(weight, shifted, kept), best, rtol=1e-6, atol=1e-8)
    fit = fit_neurons(weight, shifted, 9)
    residual = h @ weight.mT - hat @ fit.weight.mT
    assert fit.error == pytest.approx(float(residual.square().sum(1).mean()), rel=1e-6)


def test_copies_and_dead_units_cost_nothing():
    h, _, weight = moments(2, 300, 6, 3)
    h = torch.cat([h, h[:, :2], torch.zeros(300, 2, dtype=torch.float64)], 1)
    weight = torch.cat([weight, torch.randn(3, 4, dtype=torch.float64)], 1)
    fit = fit_neurons(weight, metric(h.mT @ h / 300), 8, ridge=1e-6)
    assert fit.relative < 1e-8
    assert torch.isfinite(fit.weight).all()
    dead = fit_neurons(weight, metric(torch.zeros(10, 10)), 4)
    assert (dead.error, dead.relative) == (0.0, 0.0)
    assert torch.isfinite(dead.weight).all()


@pytest.mark.parametrize("count", [0, 7])
def test_a_count_beyond_the_units_is_refused(count):
    _, second, weight = moments(0, 20, 6, 2)
    with pytest.raises(EckartError, match=f"{count} of 6 hidden units cannot be kept"):
        fit_neurons(weight, metric(second), count)
    with pytest.raises(EckartError, match="needs their second moment"):
        fit_neurons(weight, metric(), 3)
